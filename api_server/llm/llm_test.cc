// What requests get from the LLM.
#include <fmt/core.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <random>

#include "api_server/llm/llm_test_util.h"

namespace wintserve {
namespace {

using testing::Each;
using testing::SizeIs;

TEST_F(LlmTest, StreamsEveryTokenOfARequestInOrder) {
  options_.async_depth = 0;  // a step is over before the next one: no two tokens share an update
  StartServing();
  Updates updates;
  Submit(Request("hello", 20), &updates);
  ASSERT_TRUE(updates.WaitFinished());
  EXPECT_EQ(updates.choice(0).text, Letters(5, 20));
  EXPECT_EQ(updates.choice(0).finish, FinishReason::kLength);
  EXPECT_EQ(updates.num_updates(), 1 + 20);  // one when accepted, one a step
  EXPECT_EQ(updates.last().num_prompt_tokens, 5);
  EXPECT_EQ(updates.last().num_completion_tokens, 20);
  EXPECT_TRUE(updates.last().error.ok());
  EXPECT_TRUE(cache_.WaitUntilAllAvailable());
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
    EXPECT_TRUE(cache_.WaitUntilAllAvailable());
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
  EXPECT_TRUE(cache_.WaitUntilAllAvailable());
}

TEST_F(LlmTest, CancelEndsTheUpdatesAndReturnsTheBlocks) {
  StartServing();
  Updates updates;
  const RequestHandle handle = Submit(Request("abc", 190), &updates);
  ASSERT_TRUE(updates.WaitForTokens(3));
  llm_->Cancel(handle);
  llm_->Cancel(handle);  // ignored
  EXPECT_TRUE(cache_.WaitUntilAllAvailable());
  const int num_updates = updates.num_updates();
  Updates next;
  Submit(Request("abc", 5), &next);
  ASSERT_TRUE(next.WaitFinished());
  EXPECT_EQ(updates.num_updates(), num_updates);
  EXPECT_FALSE(updates.last().finished);
}

TEST_F(LlmTest, ABadRequestIsRefusedAtOnce) {
  StartServing();
  GenerationRequest request = Request("abc", 5);
  request.min_tokens = 6;
  const absl::Status status =
      llm_->Submit(request, [](const GenerationUpdate&) { FAIL() << "no update is due"; }).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message(), "min_tokens is 6, must be from 0 to max_tokens (5)");
}

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
  EXPECT_FALSE(
      llm_->Submit(Request(std::string(100, 'x'), 1), [](const GenerationUpdate&) {}).ok());
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

TEST_F(LlmTest, LogprobsComeWithTheTextOfEveryChoiceThatAsksForThem) {
  StartServing();
  for (const bool asks : {true, false}) {
    SCOPED_TRACE(asks);
    std::vector<TokenLogprobs> logprobs;
    Updates updates;
    GenerationRequest request = Request("abc", 5);
    if (asks) request.num_top_logprobs = 2;
    const auto collect = updates.Callback();
    ASSERT_TRUE(llm_->Submit(request,
                             [&, collect](GenerationUpdate update) {
                               for (const ChoiceDelta& delta : update.choices) {
                                 logprobs.insert(logprobs.end(), delta.logprobs.begin(),
                                                 delta.logprobs.end());
                               }
                               collect(std::move(update));
                             })
                    .ok());
    ASSERT_TRUE(updates.WaitFinished());
    ASSERT_THAT(logprobs, SizeIs(asks ? 5 : 0));
    std::string text;
    for (const TokenLogprobs& token : logprobs) {
      EXPECT_EQ(token.text_offset, static_cast<int>(text.size()));
      text += token.token.text;
      // What the fake worker says of a token.
      EXPECT_EQ(token.token.logprob, -static_cast<float>(token.token.token_id) / 100);
      ASSERT_THAT(token.top, SizeIs(2));
      EXPECT_EQ(token.top[1].token_id, token.token.token_id + 1);
    }
    EXPECT_EQ(text, asks ? updates.choice(0).text : "");
  }
}

TEST_F(LlmTest, PromptLogprobsComeOnceAndWholeHoweverManyStepsThePromptTakes) {
  StartServing();
  for (const int max_tokens : {3, 0}) {
    SCOPED_TRACE(max_tokens);
    std::vector<PromptLogprobs> told;
    Updates updates;
    GenerationRequest request = Request(Letters(0, 150), max_tokens);  // steps of 64 tokens
    request.num_choices = 2;
    request.num_prompt_top_logprobs = 1;
    const auto collect = updates.Callback();
    ASSERT_TRUE(llm_->Submit(request,
                             [&, collect](GenerationUpdate update) {
                               if (update.prompt_logprobs.has_value()) {
                                 told.push_back(*update.prompt_logprobs);
                               }
                               collect(std::move(update));
                             })
                    .ok());
    ASSERT_TRUE(updates.WaitFinished());
    ASSERT_THAT(told, SizeIs(1));
    EXPECT_EQ(told[0].token_ids, request.prompt_ids);
    ASSERT_THAT(told[0].positions, SizeIs(149));
    for (size_t i = 0; i < 149; ++i) {
      const int32_t id = request.prompt_ids[i + 1];
      // What the fake worker says of a token.
      EXPECT_EQ(told[0].positions[i].logprob, -static_cast<float>(id) / 100);
      ASSERT_THAT(told[0].positions[i].top, SizeIs(1));
      EXPECT_EQ(told[0].positions[i].top[0].token, id);
    }
    EXPECT_EQ(updates.last().num_completion_tokens, 2 * max_tokens);
    for (int choice = 0; choice < 2; ++choice) {
      EXPECT_EQ(updates.choice(choice).text, Letters(150, max_tokens));
      EXPECT_EQ(updates.choice(choice).finish, FinishReason::kLength);
    }
  }
}

TEST_F(LlmTest, AStopTokenOfTheRequestEndsIt) {
  StartServing();
  Updates updates;
  GenerationRequest request = Request("abc", 20);
  request.ignore_eos = true;
  request.stop_token_ids = {FakeTokenizer::IdOfByte('g')};
  Submit(request, &updates);
  ASSERT_TRUE(updates.WaitFinished());
  EXPECT_EQ(updates.choice(0).text, "def");
  EXPECT_EQ(updates.choice(0).finish, FinishReason::kStop);
  EXPECT_EQ(updates.choice(0).num_tokens, 4);
}

struct Features {
  const char* name;
  int async_depth;
  bool chunked_prefill;
  bool prefix_caching;
};

class FeaturesTest : public LlmTest, public testing::WithParamInterface<Features> {};

TEST_P(FeaturesTest, DoNotChangeTheText) {
  options_.async_depth = GetParam().async_depth;
  options_.chunked_prefill = GetParam().chunked_prefill;
  options_.prefix_caching = GetParam().prefix_caching;
  options_.num_blocks_override = 8;  // forces preemption
  StartServing();
  std::vector<std::unique_ptr<Updates>> all;
  const auto length = [](int i) { return 1 + i * 37 % 150; };
  for (int i = 0; i < 30; ++i) {
    all.push_back(std::make_unique<Updates>());
    Submit(Request(std::string(length(i), 'x'), 45), all[i].get());
  }
  for (int i = 0; i < 30; ++i) {
    ASSERT_TRUE(all[i]->WaitFinished());
    EXPECT_TRUE(all[i]->last().error.ok()) << all[i]->last().error;
    EXPECT_EQ(all[i]->choice(0).text, Letters(length(i), 45));
  }
  EXPECT_TRUE(cache_.WaitUntilAllAvailable());
  EXPECT_THAT(cache_.refusals(), testing::IsEmpty());
}

INSTANTIATE_TEST_SUITE_P(All, FeaturesTest,
                         testing::Values(Features{"Default", 1, true, true},
                                         Features{"Strict", 0, true, true},
                                         Features{"WholePrompts", 1, false, true},
                                         Features{"NoCache", 1, true, false},
                                         Features{"Plain", 0, false, false}),
                         [](const auto& info) { return info.param.name; });

TEST_F(LlmTest, ASecondRequestOfTheSamePromptComputesItsLastTokensOnly) {
  StartServing();
  const auto run = [&](const std::string& salt) {
    Updates updates;
    GenerationRequest request = Request(std::string(130, 'x'), 5);
    request.cache_salt = salt;
    Submit(request, &updates);
    EXPECT_TRUE(updates.WaitFinished());
    EXPECT_TRUE(cache_.WaitUntilAllAvailable());  // a flush would overtake its commits
    EXPECT_EQ(updates.choice(0).text, Letters(130, 5));
    return updates.last().num_cached_tokens;
  };
  EXPECT_EQ(run(""), 0);
  EXPECT_EQ(run(""), 128);
  EXPECT_EQ(run("alice"), 0);
  EXPECT_EQ(Metric("fastdeploy:prefix_gpu_cache_token_num_total"), "128");
  EXPECT_EQ(*llm_->ResetPrefixCache("alice"), 2u);
  EXPECT_EQ(run(""), 128);
  EXPECT_EQ(run("alice"), 0);
  EXPECT_EQ(*llm_->ResetPrefixCache(std::nullopt), 4u);
  EXPECT_EQ(run(""), 0);
}

TEST_F(LlmTest, WithoutPrefixCachingNothingIsFound) {
  options_.prefix_caching = false;
  StartServing();
  for (int i = 0; i < 2; ++i) {
    Updates updates;
    Submit(Request(std::string(130, 'x'), 5), &updates);
    ASSERT_TRUE(updates.WaitFinished());
    EXPECT_EQ(updates.last().num_cached_tokens, 0);
  }
}

TEST_F(LlmTest, MinTokensAndIgnoreEosKeepAStopTokenFromEndingTheText) {
  StartServing();
  Updates held;
  GenerationRequest request = Request("Ending", 30);
  request.min_tokens = 20;
  Submit(request, &held);
  ASSERT_TRUE(held.WaitFinished());
  EXPECT_EQ(held.choice(0).num_tokens, 30);
  EXPECT_EQ(held.choice(0).finish, FinishReason::kLength);
  Updates ignored;
  request.min_tokens = 0;
  request.ignore_eos = true;
  Submit(request, &ignored);
  ASSERT_TRUE(ignored.WaitFinished());
  EXPECT_EQ(ignored.choice(0).num_tokens, 30);
}

TEST_F(LlmTest, ACancelledRequestIsInNoPlanThatIsMadeLater) {
  struct Seen {
    std::atomic<uint64_t> last_step = 0;
  };
  auto seen = std::make_shared<Seen>();  // the worker may run a last plan after the test's end
  FakeWorkerOptions worker = WorkerOptions();
  worker.step_delay = std::chrono::milliseconds(2);
  worker.before_step = [seen](const StepPlan& plan) {
    if (!plan.rows.empty()) seen->last_step = plan.step;
    return true;
  };
  StartServing(worker);
  Updates updates;
  const RequestHandle handle = Submit(Request("abc", 190), &updates);
  ASSERT_TRUE(updates.WaitForTokens(3));
  llm_->Cancel(handle);
  const uint64_t at_cancel = seen->last_step;
  ASSERT_TRUE(cache_.WaitUntilAllAvailable());
  // What was in flight, and a plan that was being made.
  EXPECT_LE(seen->last_step, at_cancel + 2);
}

// Sets the worker's clock still until the test opens the gate.
class StalledTest : public LlmTest {
 protected:
  void StartStalled() {
    FakeWorkerOptions worker = WorkerOptions();
    worker.before_step = [gate = gate_, begun = begun_](const StepPlan&) {
      begun->Open();
      gate->Pass();
      return true;
    };
    options_.max_num_seqs = 1;
    StartServing(worker);
    Submit(Request("abc", 5), &running_);
    begun_->Pass();
  }
  ~StalledTest() override { gate_->Open(); }

  // The worker may run a last plan after the test's end.
  const std::shared_ptr<Gate> gate_ = std::make_shared<Gate>();
  const std::shared_ptr<Gate> begun_ = std::make_shared<Gate>();
  Updates running_;
};

TEST_F(StalledTest, AFullQueueRefusesWithATimeToComeAgain) {
  options_.max_queue_requests = 1;
  StartStalled();
  Updates waiting;
  Submit(Request("abc", 5), &waiting);
  Updates refused;
  Submit(Request("abc", 5), &refused);
  ASSERT_TRUE(refused.WaitFinished());
  EXPECT_EQ(refused.num_updates(), 1);
  EXPECT_EQ(refused.last().error.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_GE(RetryAfterSeconds(refused.last().error), 1);
  gate_->Open();
  ASSERT_TRUE(waiting.WaitFinished());
  EXPECT_TRUE(waiting.last().error.ok());
}

TEST_F(StalledTest, ARequestWhoseTimeIsUpEndsThoughNothingElseHappens) {
  StartStalled();
  Updates waiting;
  GenerationRequest request = Request("abc", 5);
  request.timeout_ms = 50;
  const auto start = std::chrono::steady_clock::now();
  Submit(request, &waiting);
  ASSERT_TRUE(waiting.WaitFinished());
  EXPECT_GE(std::chrono::steady_clock::now() - start, std::chrono::milliseconds(50));
  EXPECT_EQ(waiting.last().error.code(), absl::StatusCode::kDeadlineExceeded);
  gate_->Open();
  ASSERT_TRUE(running_.WaitFinished());
  EXPECT_TRUE(running_.last().error.ok());
}

TEST_F(StalledTest, TheServersMaximumIsTheDefaultTimeout) {
  options_.request_timeout_ms = 50;
  StartStalled();
  Updates waiting;
  Submit(Request("abc", 5), &waiting);
  ASSERT_TRUE(waiting.WaitFinished());
  EXPECT_EQ(waiting.last().error.code(), absl::StatusCode::kDeadlineExceeded);
}

}  // namespace
}  // namespace wintserve
