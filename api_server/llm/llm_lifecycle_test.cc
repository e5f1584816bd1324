// The LLM from its start to its end: who is waited for, what ends it.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>

#include "api_server/llm/llm_test_util.h"

namespace wintserve {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

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
  const absl::Status status =
      llm_->Submit(Request("abc", 5), [](const GenerationUpdate&) {}).status();
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

TEST_F(LlmTest, AfterAFatalErrorTheMetricsShowThatNothingRuns) {
  options_.max_num_seqs = 1;
  FakeWorkerOptions worker = WorkerOptions();
  worker.before_step = [n = 0](const StepPlan&) mutable { return ++n < 4; };
  StartServing(worker);
  Updates running;
  Updates waiting[2];
  Submit(Request("abc", 30), &running);
  for (Updates& updates : waiting) Submit(Request("abc", 30), &updates);
  ASSERT_TRUE(WaitForMetric("fastdeploy:num_requests_running", "1"));
  ASSERT_TRUE(WaitForMetric("fastdeploy:num_requests_waiting", "2"));
  Kill(0);
  FakeWorkerOptions unfit = WorkerOptions();
  unfit.hello.max_slots = 0;
  Replace(0, unfit);
  EXPECT_EQ(WaitForFatal(), "engine worker 0: holds 0 sequences, --max-num-seqs is 1");
  ASSERT_TRUE(running.WaitFinished());
  EXPECT_EQ(running.last().error.code(), absl::StatusCode::kUnavailable);
  for (Updates& updates : waiting) ASSERT_TRUE(updates.WaitFinished());
  for (const char* gauge : {"fastdeploy:num_requests_running", "fastdeploy:num_requests_waiting",
                            "fastdeploy:gpu_cache_usage_perc", "wintserve:plans_in_flight"}) {
    EXPECT_EQ(Metric(gauge), "0") << gauge;
  }
  EXPECT_FALSE(llm_->Readiness().is_recovering);
  EXPECT_EQ(llm_->Submit(Request("abc", 5), [](const GenerationUpdate&) {}).status().code(),
            absl::StatusCode::kUnavailable);
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
  worker.before_step = [n = 0](const StepPlan&) mutable { return ++n < 4; };
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

TEST_F(LlmTest, ShuttingDownCanLeaveTheWorkersToTheNextOne) {
  options_.leaves_workers = true;
  StartServing();
  llm_.reset();
  EXPECT_FALSE(workers_[0]->WaitForShutdown());
  registry_ = std::make_shared<prometheus::Registry>();
  Create();
  FakeWorkerOptions again = WorkerOptions();
  again.hello.mapped_pool_epoch = 99;
  workers_[0] = std::make_unique<FakeWorker>(again);
  ASSERT_TRUE(WaitUntilReady()) << llm_->Readiness().reason;
  EXPECT_EQ(cache_.num_pools(), 1u);
  EXPECT_EQ(workers_[0]->num_mappings(), 0);
  Updates updates;
  Submit(Request("abc", 30), &updates);
  ASSERT_TRUE(updates.WaitFinished());
  EXPECT_EQ(updates.choice(0).text, Letters(3, 30));
}

TEST_F(LlmTest, StoppingEndsOpenRequestsAndRefusesMore) {
  FakeWorkerOptions worker = WorkerOptions();
  worker.before_step = [n = 0](const StepPlan&) mutable { return ++n < 4; };
  StartServing(worker);
  Updates updates;
  Submit(Request("abc", 30), &updates);
  ASSERT_TRUE(updates.WaitForTokens(3));
  llm_->Stop();
  ASSERT_TRUE(updates.WaitFinished());
  EXPECT_EQ(updates.last().error.code(), absl::StatusCode::kUnavailable);
  const auto refused = llm_->Submit(Request("abc", 30), [](const GenerationUpdate&) {});
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kUnavailable);
  llm_->Stop();
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
  const absl::Status status = CreateLlmWith(options_, std::make_unique<FakeTokenizer>(),
                                            std::make_shared<prometheus::Registry>(),
                                            cache_.Connector(), [](const auto&) { return 0; })
                                  .status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message(), "--max-num-batched-tokens is 3, must be at least --max-num-seqs (4)");
}

}  // namespace
}  // namespace wintserve
