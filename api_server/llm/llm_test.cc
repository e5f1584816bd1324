// LLM with real work-queue streams, a fake worker at the other end and a fake cache manager.
#include <fmt/core.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <prometheus/registry.h>
#include <stdlib.h>

#include <filesystem>
#include <map>
#include <random>
#include <thread>

#include "api_server/llm/llm_factory.h"
#include "common/mutex.h"
#include "tests/fakes/fake_cache.h"
#include "tests/fakes/fake_tokenizer.h"
#include "tests/fakes/fake_worker.h"

namespace wintserve {
namespace {

using testing::Each;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::SizeIs;

constexpr auto kPatience = std::chrono::seconds(10);

// The text of a sequence is the alphabet, by position; "E…" prompts end at position 10.
int32_t NextLetter(const std::vector<int32_t>& history) {
  if (history[0] == FakeTokenizer::IdOfByte('E') && history.size() == 10)
    return FakeTokenizer::kEos;
  return FakeTokenizer::IdOfByte(static_cast<char>('a' + history.size() % 26));
}

std::string Letters(int first_position, int count) {
  std::string text;
  for (int i = 0; i < count; ++i) text += static_cast<char>('a' + (first_position + i) % 26);
  return text;
}

// Collects the updates of one request.
class Updates {
 public:
  std::function<void(GenerationUpdate)> Callback() {
    return [this](GenerationUpdate update) {
      MutexLock lock(&mutex_);
      EXPECT_FALSE(finished_) << "an update after the last";
      for (const ChoiceDelta& delta : update.choices) {
        Choice& choice = choices_[delta.index];
        EXPECT_FALSE(choice.finish.has_value());
        choice.text += delta.text;
        choice.num_tokens += static_cast<int>(delta.token_ids.size());
        choice.finish = delta.finish_reason;
      }
      finished_ = update.finished;
      last_ = std::move(update);
      ++num_updates_;
      changed_.NotifyAll();
    };
  }
  bool WaitFinished() {
    MutexLock lock(&mutex_);
    return changed_.WaitFor(&mutex_, kPatience, [this] { return finished_; });
  }
  bool WaitForTokens(int count) {
    MutexLock lock(&mutex_);
    return changed_.WaitFor(&mutex_, kPatience, [&] { return choices_[0].num_tokens >= count; });
  }
  struct Choice {
    std::string text = {};
    int num_tokens = 0;
    std::optional<FinishReason> finish = {};
  };
  Choice choice(int index) {
    MutexLock lock(&mutex_);
    return choices_[index];
  }
  GenerationUpdate last() {
    MutexLock lock(&mutex_);
    return last_;
  }
  int num_updates() {
    MutexLock lock(&mutex_);
    return num_updates_;
  }

 private:
  Mutex mutex_;
  CondVar changed_;
  std::map<int, Choice> choices_;
  GenerationUpdate last_;
  bool finished_ = false;
  int num_updates_ = 0;
};

// Holds plans back until it is opened.
class Gate {
 public:
  void Open() {
    MutexLock lock(&mutex_);
    open_ = true;
    changed_.NotifyAll();
  }
  void Pass() {
    MutexLock lock(&mutex_);
    changed_.Wait(&mutex_, [this] { return open_; });
  }

 private:
  Mutex mutex_;
  CondVar changed_;
  bool open_ = false;
};

class LlmTest : public testing::Test {
 protected:
  LlmTest() {
    std::string path = (std::filesystem::temp_directory_path() / "llm_XXXXXX").string();
    EXPECT_NE(::mkdtemp(path.data()), nullptr);
    directory_ = path;
    options_.model_path = path;
    options_.model_name = "fake";
    options_.work_queue_socket = path + "/q.sock";
    options_.token = "secret";
    options_.max_model_len = 200;
    options_.max_num_seqs = 4;
    options_.max_num_batched_tokens = 64;
    options_.on_fatal = [this](const std::string& reason) {
      MutexLock lock(&mutex_);
      fatal_ = reason;
      changed_.NotifyAll();
    };
  }
  ~LlmTest() override {
    llm_.reset();
    workers_.clear();
    std::filesystem::remove_all(directory_);
  }

  void Create() {
    auto llm = CreateLlmWith(options_, std::make_unique<FakeTokenizer>(),
                             std::make_shared<prometheus::Registry>(), cache_.Connector());
    ASSERT_TRUE(llm.ok()) << llm.status();
    llm_ = *std::move(llm);
  }
  FakeWorkerOptions WorkerOptions(uint32_t rank = 0) {
    return {.target = "unix:" + options_.work_queue_socket,
            .token = options_.token,
            .hello = FakeHello(rank, options_.world_size),
            .next_token = NextLetter};
  }
  void AddWorker(FakeWorkerOptions options) {
    workers_.push_back(std::make_unique<FakeWorker>(std::move(options)));
  }
  // One rank, ready.
  void StartServing() { StartServing(WorkerOptions()); }
  void StartServing(FakeWorkerOptions worker) {
    Create();
    AddWorker(std::move(worker));
    ASSERT_TRUE(WaitUntilReady()) << llm_->Readiness().reason;
  }
  bool WaitUntilReady() {
    return WaitForReadiness([](const ReadinessReport& report) { return report.ready; });
  }
  bool WaitForReason(const std::string& reason) {
    return WaitForReadiness([&](const ReadinessReport& report) { return report.reason == reason; });
  }
  // Readiness has no event to wait for, as it is made for probes.
  bool WaitForReadiness(const std::function<bool(const ReadinessReport&)>& condition) {
    const auto deadline = std::chrono::steady_clock::now() + kPatience;
    while (!condition(llm_->Readiness())) {
      if (std::chrono::steady_clock::now() > deadline) return false;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return true;
  }
  std::string WaitForFatal() {
    MutexLock lock(&mutex_);
    changed_.WaitFor(&mutex_, kPatience, [this] { return !fatal_.empty(); });
    return fatal_;
  }

  GenerationRequest Request(const std::string& prompt, int max_tokens) {
    return {.id = "test",
            .prompt_ids = tokenizer_.Encode(prompt),
            .temperature = 0,
            .max_tokens = max_tokens};
  }
  RequestHandle Submit(const GenerationRequest& request, Updates* updates) {
    auto handle = llm_->Submit(request, updates->Callback());
    EXPECT_TRUE(handle.ok()) << handle.status();
    return handle.value_or(0);
  }

  std::filesystem::path directory_;
  LlmOptions options_;
  FakeTokenizer tokenizer_;
  FakeCache cache_;
  Mutex mutex_;
  CondVar changed_;
  std::string fatal_;
  std::unique_ptr<LLM> llm_;
  std::vector<std::unique_ptr<FakeWorker>> workers_;
};

TEST_F(LlmTest, StreamsEveryTokenOfARequestInOrder) {
  StartServing();
  Updates updates;
  Submit(Request("hello", 20), &updates);
  ASSERT_TRUE(updates.WaitFinished());
  EXPECT_EQ(updates.choice(0).text, Letters(5, 20));
  EXPECT_EQ(updates.choice(0).finish, FinishReason::kLength);
  EXPECT_EQ(updates.num_updates(), 20);  // one a step
  EXPECT_EQ(updates.last().num_prompt_tokens, 5);
  EXPECT_EQ(updates.last().num_completion_tokens, 20);
  EXPECT_TRUE(updates.last().error.ok());
  EXPECT_TRUE(cache_.WaitUntilAllFree());
}

TEST_F(LlmTest, AStopTokenCountsButHasNoText) {
  StartServing();
  Updates updates;
  Submit(Request("Ending", 100), &updates);
  ASSERT_TRUE(updates.WaitFinished());
  EXPECT_EQ(updates.choice(0).text, Letters(6, 4));
  EXPECT_EQ(updates.choice(0).finish, FinishReason::kStop);
  EXPECT_EQ(updates.last().num_completion_tokens, 5);
}

TEST_F(LlmTest, AStopStringEndsAChoiceAndFreesItsBlocks) {
  StartServing();
  for (const bool include : {false, true}) {
    Updates updates;
    GenerationRequest request = Request("abc", 100);
    request.stop = {"ghi"};
    request.include_stop_in_output = include;
    Submit(request, &updates);
    ASSERT_TRUE(updates.WaitFinished());
    EXPECT_EQ(updates.choice(0).text, include ? "defghi" : "def");
    EXPECT_EQ(updates.choice(0).finish, FinishReason::kStop);
    EXPECT_EQ(updates.last().num_completion_tokens, 6);
    EXPECT_TRUE(cache_.WaitUntilAllFree());
  }
}

TEST_F(LlmTest, TheChoicesOfARequestFinishInOneUpdateStream) {
  StartServing();
  Updates updates;
  GenerationRequest request = Request("abc", 7);
  request.num_choices = 3;
  Submit(request, &updates);
  ASSERT_TRUE(updates.WaitFinished());
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(updates.choice(i).text, Letters(3, 7));
    EXPECT_EQ(updates.choice(i).finish, FinishReason::kLength);
  }
  EXPECT_EQ(updates.last().num_completion_tokens, 21);
}

TEST_F(LlmTest, ManyMoreRequestsThanSlotsAllGetExactlyTheirText) {
  StartServing();
  const auto seed = std::random_device{}();
  SCOPED_TRACE(fmt::format("seed={}", seed));
  std::mt19937 rng(seed);
  std::vector<std::pair<int, int>> lengths;
  std::vector<std::unique_ptr<Updates>> all;
  for (int i = 0; i < 100; ++i) {
    lengths.emplace_back(1 + rng() % 120, 1 + rng() % 60);
    all.push_back(std::make_unique<Updates>());
    Submit(Request(std::string(lengths[i].first, 'x'), lengths[i].second), all[i].get());
  }
  for (int i = 0; i < 100; ++i) {
    ASSERT_TRUE(all[i]->WaitFinished());
    EXPECT_EQ(all[i]->choice(0).text, Letters(lengths[i].first, lengths[i].second));
  }
  EXPECT_TRUE(cache_.WaitUntilAllFree());
}

TEST_F(LlmTest, CancelEndsTheUpdatesAndReturnsTheBlocks) {
  StartServing();
  Updates updates;
  const RequestHandle handle = Submit(Request("abc", 190), &updates);
  ASSERT_TRUE(updates.WaitForTokens(3));
  llm_->Cancel(handle);
  llm_->Cancel(handle);  // ignored
  EXPECT_TRUE(cache_.WaitUntilAllFree());
  const int num_updates = updates.num_updates();
  Updates next;
  Submit(Request("abc", 5), &next);
  ASSERT_TRUE(next.WaitFinished());
  EXPECT_EQ(updates.num_updates(), num_updates);
  EXPECT_FALSE(updates.last().finished);
}

struct BadRequest {
  const char* name;
  std::function<void(GenerationRequest*)> spoil;
  const char* error;
};

class BadRequestTest : public LlmTest, public testing::WithParamInterface<BadRequest> {};

TEST_P(BadRequestTest, IsRefusedByName) {
  StartServing();
  GenerationRequest request = Request("abc", 5);
  GetParam().spoil(&request);
  const absl::Status status =
      llm_->Submit(request, [](GenerationUpdate) { FAIL() << "no update is due"; }).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message(), GetParam().error);
}

INSTANTIATE_TEST_SUITE_P(
    All, BadRequestTest,
    testing::Values(
        BadRequest{"EmptyPrompt", [](auto* r) { r->prompt_ids.clear(); },
                   "the prompt has no tokens"},
        BadRequest{"PromptTooLong", [](auto* r) { r->prompt_ids.assign(200, 100); },
                   "Input text is too long: 200 tokens, at most 199 (max_model_len 200 leaves room "
                   "for one output token)"},
        BadRequest{"UnknownId", [](auto* r) { r->prompt_ids[1] = 1000; },
                   "the prompt holds token id 1000, must be from 0 to 999"},
        BadRequest{"NegativeId", [](auto* r) { r->prompt_ids[1] = -1; },
                   "the prompt holds token id -1, must be from 0 to 999"},
        BadRequest{"NegativeTemperature", [](auto* r) { r->temperature = -0.5f; },
                   "temperature is -0.5, must be at least 0"},
        BadRequest{"TopPAboveOne", [](auto* r) { r->top_p = 1.5f; },
                   "top_p is 1.5, must be from 0 to 1"},
        BadRequest{"TopKBelowMinusOne", [](auto* r) { r->top_k = -2; },
                   "top_k is -2, must be -1 or more"},
        BadRequest{"NoChoice", [](auto* r) { r->num_choices = 0; }, "n is 0, must be at least 1"},
        BadRequest{"NoTokens", [](auto* r) { r->max_tokens = 0; },
                   "max_tokens is 0, must be at least 1"}),
    [](const auto& info) { return info.param.name; });

TEST_F(LlmTest, ThePromptMayLeaveRoomForOneTokenOnly) {
  StartServing();
  Updates updates;
  Submit(Request(std::string(199, 'x'), 50), &updates);
  ASSERT_TRUE(updates.WaitFinished());
  EXPECT_EQ(updates.choice(0).text, Letters(199, 1));
  EXPECT_EQ(updates.choice(0).finish, FinishReason::kLength);
}

TEST_F(LlmTest, WithoutMaxTokensTheModelLengthIsTheLimit) {
  StartServing();
  Updates updates;
  GenerationRequest request = Request("abc", 1);
  request.max_tokens.reset();
  Submit(request, &updates);
  ASSERT_TRUE(updates.WaitFinished());
  EXPECT_EQ(updates.choice(0).num_tokens, 197);
}

TEST_F(LlmTest, LowersMaxModelLenToWhatTheModelWasMadeFor) {
  FakeWorkerOptions worker = WorkerOptions();
  worker.hello.max_position = 100;
  StartServing(worker);
  EXPECT_EQ(llm_->max_model_len(), 100);
  EXPECT_FALSE(llm_->Submit(Request(std::string(100, 'x'), 1), [](GenerationUpdate) {}).ok());
}

TEST_F(LlmTest, ARequestOfTopPZeroOrTemperatureZeroIsGreedyAndSeedsReachTheWorker) {
  struct Seen {
    Mutex mutex;
    std::vector<SamplingParams> sampling;
  };
  auto shared = std::make_shared<Seen>();  // the worker may run a last plan after the test's end
  FakeWorkerOptions worker = WorkerOptions();
  worker.before_step = [shared](const StepPlan& plan) {
    MutexLock lock(&shared->mutex);
    for (const SlotInit& init : plan.slot_init) shared->sampling.push_back(init.sampling);
    return true;
  };
  StartServing(worker);
  const auto run = [&](float temperature, float top_p, std::optional<int64_t> seed) {
    Updates updates;
    GenerationRequest request = Request("abc", 1);
    request.temperature = temperature;
    request.top_p = top_p;
    request.top_k = -1;
    request.seed = seed;
    Submit(request, &updates);
    EXPECT_TRUE(updates.WaitFinished());
  };
  run(0, 0.5f, 1);
  run(1, 0, 2);
  run(0.7f, 0.9f, -3);
  run(0.7f, 0.9f, std::nullopt);
  run(0.7f, 0.9f, std::nullopt);
  MutexLock lock(&shared->mutex);
  const std::vector<SamplingParams>& seen = shared->sampling;
  ASSERT_THAT(seen, SizeIs(5));
  EXPECT_THAT(std::vector({seen[0].temperature, seen[1].temperature}), Each(0.0f));
  EXPECT_THAT(std::vector({seen[0].top_p, seen[1].top_p}), Each(1.0f));
  EXPECT_EQ(seen[2].temperature, 0.7f);
  EXPECT_EQ(seen[2].top_k, 0);
  EXPECT_EQ(seen[2].seed, -3);
  EXPECT_NE(seen[3].seed, seen[4].seed);
}

TEST_F(LlmTest, RefusesMoreOpenRequestsThanTheLimit) {
  auto gate = std::make_shared<Gate>();  // the worker may run a last plan after the test's end
  FakeWorkerOptions worker = WorkerOptions();
  worker.before_step = [gate](const StepPlan&) {
    gate->Pass();
    return true;
  };
  options_.max_open_requests = 2;
  StartServing(worker);
  Updates first;
  Updates second;
  Submit(Request("abc", 5), &first);
  const RequestHandle handle = Submit(Request("abc", 5), &second);
  const absl::Status refused = llm_->Submit(Request("abc", 5), [](GenerationUpdate) {}).status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(refused.message(),
            "too many requests: 2 are open, which is the limit (--max-concurrency)");
  llm_->Cancel(handle);
  Updates third;
  Submit(Request("abc", 5), &third);
  gate->Open();
  EXPECT_TRUE(first.WaitFinished());
  EXPECT_TRUE(third.WaitFinished());
}

TEST_F(LlmTest, ReadinessNamesWhatIsMissingAtEveryStage) {
  options_.world_size = 2;
  cache_.SetReachable(false);
  Create();
  EXPECT_TRUE(WaitForReason("waiting for engine workers: 0 of 2 connected"));
  AddWorker(WorkerOptions(0));
  EXPECT_TRUE(WaitForReason("waiting for engine workers: 1 of 2 connected"));
  FakeWorkerOptions second = WorkerOptions(1);
  second.never_ready = true;
  AddWorker(second);
  EXPECT_TRUE(WaitForReason("waiting for the cache manager"));
  const absl::Status status = llm_->Submit(Request("abc", 5), [](GenerationUpdate) {}).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(status.message(), "not ready: waiting for the cache manager");
  cache_.SetReachable(true);
  EXPECT_TRUE(WaitForReason("engine worker 1 is warming up"));
  EXPECT_THAT(cache_.spec().block_bytes_by_rank, ElementsAre(4096, 4096));
}

TEST_F(LlmTest, TwoRanksRunTheSamePlans) {
  options_.world_size = 2;
  Create();
  AddWorker(WorkerOptions(1));
  AddWorker(WorkerOptions(0));
  ASSERT_TRUE(WaitUntilReady());
  Updates updates;
  Submit(Request("abc", 30), &updates);
  ASSERT_TRUE(updates.WaitFinished());
  EXPECT_EQ(updates.choice(0).text, Letters(3, 30));
}

TEST_F(LlmTest, DifferentTokensOnARankStopTheEngine) {
  options_.world_size = 2;
  Create();
  FakeWorkerOptions astray = WorkerOptions(1);
  astray.next_token = [](const std::vector<int32_t>& history) {
    return NextLetter(history) + (history.size() == 8 ? 1 : 0);
  };
  AddWorker(WorkerOptions(0));
  AddWorker(astray);
  ASSERT_TRUE(WaitUntilReady());
  Updates updates;
  Submit(Request("abc", 30), &updates);
  ASSERT_TRUE(updates.WaitFinished());
  EXPECT_EQ(updates.choice(0).text, Letters(3, 5));  // what all ranks agree on
  EXPECT_EQ(updates.last().error.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(WaitForFatal(),
              HasSubstr("engine workers 0 and 1 went on with different tokens after step 6"));
  EXPECT_FALSE(llm_->Readiness().ready);
}

TEST_F(LlmTest, AnotherPlanHashStopsTheEngine) {
  FakeWorkerOptions worker = WorkerOptions();
  worker.spoil = [](StepDone* done) { done->plan_hash ^= 1; };
  StartServing(worker);
  Updates updates;
  Submit(Request("abc", 30), &updates);
  ASSERT_TRUE(updates.WaitFinished());
  EXPECT_THAT(WaitForFatal(), HasSubstr("engine worker 0 ran another plan as step 1"));
}

TEST_F(LlmTest, AResultOutOfPlaceStopsTheEngine) {
  FakeWorkerOptions worker = WorkerOptions();
  worker.spoil = [](StepDone* done) { done->sampled[0].token = 5000; };
  StartServing(worker);
  Updates updates;
  Submit(Request("abc", 30), &updates);
  ASSERT_TRUE(updates.WaitFinished());
  EXPECT_THAT(WaitForFatal(),
              HasSubstr("engine worker 0 is out of step: step 1 sampled token 5000"));
}

TEST_F(LlmTest, ADeadWorkerEndsEveryRequestAndIsNamed) {
  FakeWorkerOptions worker = WorkerOptions();
  worker.before_step = [](const StepPlan& plan) { return plan.step < 4; };
  StartServing(worker);
  Updates running;
  std::vector<std::unique_ptr<Updates>> waiting;
  Submit(Request("abc", 30), &running);
  for (int i = 0; i < 6; ++i) {
    waiting.push_back(std::make_unique<Updates>());
    Submit(Request("abc", 30), waiting.back().get());
  }
  ASSERT_TRUE(running.WaitForTokens(3));
  workers_[0]->Kill();
  ASSERT_TRUE(running.WaitFinished());
  EXPECT_EQ(running.last().error.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(running.last().error.message()), HasSubstr("engine worker 0 is gone"));
  for (auto& updates : waiting) ASSERT_TRUE(updates->WaitFinished());
  EXPECT_THAT(WaitForFatal(), HasSubstr("engine worker 0 is gone"));
  EXPECT_THAT(llm_->Readiness().reason, HasSubstr("engine worker 0 is gone"));
  EXPECT_EQ(llm_->Submit(Request("abc", 5), [](GenerationUpdate) {}).status().code(),
            absl::StatusCode::kUnavailable);
}

TEST_F(LlmTest, AFaultOfAWorkerIsPassedOn) {
  StartServing();
  ASSERT_TRUE(workers_[0]->SendFault(FaultKind::kOutOfMemory, "no 3 GiB left").ok());
  EXPECT_EQ(WaitForFatal(), "engine worker 0 reports a fault (out of memory): no 3 GiB left");
}

TEST_F(LlmTest, ALostCacheManagerEndsEveryRequest) {
  FakeWorkerOptions worker = WorkerOptions();
  worker.before_step = [](const StepPlan& plan) { return plan.step < 4; };
  StartServing(worker);
  Updates updates;
  Submit(Request("abc", 30), &updates);
  ASSERT_TRUE(updates.WaitForTokens(3));
  cache_.Die();
  ASSERT_TRUE(updates.WaitFinished());
  EXPECT_EQ(updates.last().error.message(), "the cache manager is lost: killed");
  EXPECT_EQ(WaitForFatal(), "the cache manager is lost: killed");
}

TEST_F(LlmTest, APoolTooSmallForOneRequestStopsTheStartUp) {
  options_.num_blocks_override = 3;
  Create();
  AddWorker(WorkerOptions());
  EXPECT_EQ(WaitForFatal(),
            "--num-gpu-blocks-override 3 holds no sequence of --max-model-len 200: 4 blocks of 64 "
            "tokens are needed");
}

TEST_F(LlmTest, ShuttingDownEndsOpenRequestsAndTellsTheWorkers) {
  FakeWorkerOptions worker = WorkerOptions();
  worker.before_step = [](const StepPlan& plan) { return plan.step < 4; };
  StartServing(worker);
  Updates updates;
  Submit(Request("abc", 30), &updates);
  ASSERT_TRUE(updates.WaitForTokens(3));
  llm_.reset();
  ASSERT_TRUE(updates.WaitFinished());
  EXPECT_EQ(updates.last().error.code(), absl::StatusCode::kUnavailable);
  EXPECT_TRUE(workers_[0]->WaitForShutdown());
  EXPECT_EQ(fatal_, "");
}

TEST_F(LlmTest, ShuttingDownBeforeAnybodyHasConnectedIsQuick) {
  cache_.SetReachable(false);
  Create();
  const auto start = std::chrono::steady_clock::now();
  llm_.reset();
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(5));
}

TEST_F(LlmTest, RefusesARowBudgetBelowTheNumberOfSequences) {
  options_.max_num_batched_tokens = 3;
  const absl::Status status =
      CreateLlmWith(options_, std::make_unique<FakeTokenizer>(),
                    std::make_shared<prometheus::Registry>(), cache_.Connector())
          .status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message(), "--max-num-batched-tokens is 3, must be at least --max-num-seqs (4)");
}

}  // namespace
}  // namespace wintserve
