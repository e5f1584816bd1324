// What the tests of the LLM share: an LLM with real work-queue streams, fake workers at the other
// end and a fake cache manager.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <prometheus/registry.h>
#include <prometheus/text_serializer.h>

#include <chrono>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "api_server/llm/llm_factory.h"
#include "common/mutex.h"
#include "common/temp_dir_test_util.h"
#include "tests/fakes/fake_cache.h"
#include "tests/fakes/fake_tokenizer.h"
#include "tests/fakes/fake_worker.h"
#include "tests/fakes/fake_worker_processes.h"

namespace wintserve {

inline constexpr auto kPatience = std::chrono::seconds(10);

// The text of a sequence is the alphabet, by position; "E…" prompts end at position 10.
inline int32_t NextLetter(const std::vector<int32_t>& history) {
  if (history[0] == FakeTokenizer::IdOfByte('E') && history.size() == 10)
    return FakeTokenizer::kEos;
  return FakeTokenizer::IdOfByte(static_cast<char>('a' + history.size() % 26));
}

inline std::string Letters(int first_position, int count) {
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
    options_.model_path = directory_.path().string();
    options_.model_name = "fake";
    options_.work_queue_socket = (directory_.path() / "q.sock").string();
    options_.token = "secret";
    options_.max_model_len = 200;
    options_.max_num_seqs = 4;
    options_.max_num_batched_tokens = 64;
    options_.watch_workers = processes_.Watcher();
    options_.on_fatal = [this](const std::string& reason) {
      MutexLock lock(&mutex_);
      fatal_ = reason;
      changed_.NotifyAll();
    };
  }
  ~LlmTest() override {
    llm_.reset();
    workers_.clear();
  }

  void Create() {
    auto llm =
        CreateLlmWith(options_, std::make_unique<FakeTokenizer>(), registry_, cache_.Connector(),
                      [this](const auto& salt) { return cache_.Flush(salt); });
    ASSERT_TRUE(llm.ok()) << llm.status();
    llm_ = *std::move(llm);
  }
  FakeWorkerOptions WorkerOptions(uint32_t rank = 0) {
    return {.target = "unix:" + options_.work_queue_socket,
            .token = options_.token,
            .hello = FakeHello(rank, options_.world_size),
            .next_token = NextLetter,
            .memory = memory_[rank]};
  }
  void AddWorker(FakeWorkerOptions options) {
    workers_.push_back(std::make_unique<FakeWorker>(std::move(options)));
  }
  // workers_[index] dies, and the launcher says so.
  void Kill(size_t index, bool kv_trusted = true) {
    workers_[index]->Kill();
    const WorkerHello& hello = workers_[index]->hello();
    processes_.TellExit(hello.rank, hello.worker_id, kv_trusted);
  }
  // Another process in place of that of the same rank.
  void Replace(size_t index, FakeWorkerOptions options) {
    options.hello.worker_id = ++last_worker_id_;
    workers_[index] = std::make_unique<FakeWorker>(std::move(options));
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
  bool WaitForReadiness(const std::function<bool(const ReadinessReport&)>& condition) {
    return WaitFor([&] { return condition(llm_->Readiness()); });
  }
  bool WaitForMetric(const std::string& name, const std::string& value) {
    return WaitFor([&] { return Metric(name) == value; });
  }
  // Of what has no event to wait for, as it is made for probes and scrapes.
  bool WaitFor(const std::function<bool()>& condition) {
    const auto deadline = std::chrono::steady_clock::now() + kPatience;
    while (!condition()) {
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

  // One line of /metrics without its name; empty: no such series.
  std::string Metric(const std::string& name) {
    const std::string text = prometheus::TextSerializer().Serialize(registry_->Collect());
    const size_t at = text.find("\n" + name + " ");
    if (at == std::string::npos) return "";
    const size_t value = at + name.size() + 2;
    return text.substr(value, text.find('\n', value) - value);
  }

  const TempDir directory_;
  LlmOptions options_;
  std::shared_ptr<prometheus::Registry> registry_ = std::make_shared<prometheus::Registry>();
  FakeTokenizer tokenizer_;
  FakeCache cache_;
  FakeWorkerProcesses processes_;
  std::map<uint32_t, std::shared_ptr<FakePoolMemory>> memory_ = {
      {0, std::make_shared<FakePoolMemory>()}, {1, std::make_shared<FakePoolMemory>()}};
  uint64_t last_worker_id_ = 1000;
  Mutex mutex_;
  CondVar changed_;
  std::string fatal_;
  std::unique_ptr<LLM> llm_;
  std::vector<std::unique_ptr<FakeWorker>> workers_;
};

}  // namespace wintserve
