#include "engine_worker/runner/worker.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <thread>

#include "common/check.h"
#include "engine_worker/collectives/shm/shm_collective.h"
#include "engine_worker/collectives/single_rank_collective.h"
#include "tests/fakes/fake_model.h"
#include "tests/fakes/fake_work_queue.h"

namespace wintserve {
namespace {

using testing::HasSubstr;
using testing_fakes::FakeModel;
using testing_fakes::FakeWorkQueue;

constexpr ConfigureWorker kConfigure = {.group_epoch = 3,
                                        .world_size = 1,
                                        .max_slots = 2,
                                        .max_tokens = 64,
                                        .max_sequence_tokens = 128,
                                        .sampled_vocab_size = FakeModel::kVocabSize};
const AttachPool kAttachPool = {.pool_epoch = 4, .memory_socket = "unused", .num_blocks = 8};

absl::StatusOr<MappedMemory> NewPool(const AttachPool& attach) {
  return MappedMemory::Create(
      "worker_test", int64_t{attach.num_blocks} * FakeModel::kBlockTokens * sizeof(int32_t));
}

absl::StatusOr<std::unique_ptr<Collective>> JoinAlone(const ConfigureWorker&) {
  return MakeSingleRankCollective();
}

// A worker of one rank that runs in a thread of its own.
class WorkerTest : public testing::Test {
 protected:
  void Start(WorkerLinks links = {.join_group = JoinAlone, .fetch_pool = NewPool}) {
    worker_ = std::make_unique<Worker>(&model_, &group_, &queue_, std::move(links));
    thread_ = std::thread([this] { status_ = worker_->Run(); });
  }
  absl::Status End() {
    thread_.join();
    return status_;
  }

  void PushPlan(StepPlan plan) {
    plan.group_epoch = kConfigure.group_epoch;
    plan.pool_epoch = kAttachPool.pool_epoch;
    plan.step = ++step_;
    plan.previous_plan_hash = step_ == 1 ? 0 : 100 + step_ - 1;
    queue_.Push(ReceivedPlan{plan, 100 + step_});
  }

  StepPlan FirstPlan() const {
    return {.slot_init = {{0, {}, {BlockId{5}}}}, .rows = {{0, 0, 3, true, {7, 8, 9}}}};
  }

  RankGroup group_{0, 1};
  FakeModel model_{&group_};
  FakeWorkQueue queue_;
  std::unique_ptr<Worker> worker_;
  std::thread thread_;
  absl::Status status_;
  uint64_t step_ = 0;
};

TEST_F(WorkerTest, ExecutesPlansInOrderUntilShutdown) {
  queue_.Push(kConfigure);
  queue_.Push(kAttachPool);
  PushPlan(FirstPlan());
  PushPlan({.rows = {{0, 3, 1, true, {}}}});
  queue_.Push(ShutdownWorker{});
  Start();
  EXPECT_TRUE(End().ok());
  EXPECT_EQ(queue_.num_ready(), 1);
  const std::vector<StepDone> steps = queue_.WaitForSteps(2);
  ASSERT_EQ(steps.size(), 2u);
  EXPECT_EQ(steps[0].plan_hash, 101u);
  EXPECT_EQ(steps[1].step, 2u);
  EXPECT_EQ(steps[1].sampled.size(), 1u);
  EXPECT_TRUE(queue_.faults().empty());
}

TEST_F(WorkerTest, AStopEndsTheWaitForTheNextPlan) {
  queue_.Push(kConfigure);
  queue_.Push(kAttachPool);
  PushPlan(FirstPlan());
  Start();
  queue_.WaitForSteps(1);
  worker_->RequestStop(5000);
  EXPECT_TRUE(End().ok());
}

TEST_F(WorkerTest, AStopLetsThePlanInHandFinish) {
  Mutex mutex;
  CondVar changed;
  bool fetching = false;
  bool go_on = false;
  queue_.Push(kConfigure);
  queue_.Push(kAttachPool);
  PushPlan(FirstPlan());  // comes after the stop and is not taken up
  Start({.join_group = JoinAlone, .fetch_pool = [&](const AttachPool& attach) {
           MutexLock lock(&mutex);
           fetching = true;
           changed.NotifyAll();
           changed.Wait(&mutex, [&] { return go_on; });
           return NewPool(attach);
         }});
  {
    MutexLock lock(&mutex);
    changed.Wait(&mutex, [&] { return fetching; });
  }
  std::thread stopper([&] { worker_->RequestStop(60'000); });
  {
    MutexLock lock(&mutex);
    go_on = true;
    changed.NotifyAll();
  }
  stopper.join();
  // The stop may come just after the work in hand: then Close() ends the stream behind the plan.
  EXPECT_TRUE(End().ok());
  EXPECT_EQ(queue_.num_ready(), 1);
  EXPECT_TRUE(queue_.faults().empty());
}

TEST_F(WorkerTest, TheEndOfTheStreamIsUnavailable) {
  queue_.Push(kConfigure);
  queue_.EndStream();
  Start();
  EXPECT_EQ(End().code(), absl::StatusCode::kUnavailable);
  EXPECT_TRUE(queue_.faults().empty());
}

TEST_F(WorkerTest, ABadPlanIsAFaultThatSaysWhatIsWrong) {
  queue_.Push(kConfigure);
  queue_.Push(kAttachPool);
  PushPlan({.rows = {{1, 0, 1, true, {7}}}});
  Start();
  EXPECT_EQ(End().message(), "row: slot 1 is not in use");
  ASSERT_EQ(queue_.faults().size(), 1u);
  EXPECT_EQ(queue_.faults()[0].text, "row: slot 1 is not in use");
  EXPECT_EQ(queue_.faults()[0].kind, FaultKind::kInternal);
}

TEST_F(WorkerTest, APlanBeforeThePoolIsAFault) {
  queue_.Push(kConfigure);
  PushPlan(FirstPlan());
  Start();
  EXPECT_EQ(End().message(), "a plan before the pool");
}

TEST_F(WorkerTest, APoolBeforeTheConfigurationIsAFault) {
  queue_.Push(kAttachPool);
  Start();
  EXPECT_EQ(End().message(), "a pool before the configuration");
}

TEST_F(WorkerTest, AConfigurationForOtherRanksIsAFault) {
  ConfigureWorker configure = kConfigure;
  configure.world_size = 2;
  queue_.Push(configure);
  Start();
  EXPECT_EQ(End().message(), "configured for 2 ranks, the model was loaded for 1");
}

TEST_F(WorkerTest, APoolOfAnotherSizeIsAFault) {
  queue_.Push(kConfigure);
  queue_.Push(kAttachPool);
  Start({.join_group = JoinAlone, .fetch_pool = [](const AttachPool&) {
           return MappedMemory::Create("worker_test", 4096);
         }});
  EXPECT_EQ(End().message(), "the pool has 4096 bytes, 8 blocks of 256 bytes need 2048");
}

TEST_F(WorkerTest, BeatsTellTheStepsTakenUpAndDone) {
  queue_.Push(kConfigure);
  queue_.Push(kAttachPool);
  PushPlan(FirstPlan());
  Start();
  queue_.WaitForSteps(1);
  const size_t num_before = queue_.WaitForBeats(1).size();
  const FakeWorkQueue::Beat beat = queue_.WaitForBeats(num_before + 2).back();
  EXPECT_EQ(beat.step_started, 1u);
  EXPECT_EQ(beat.step_done, 1u);
  EXPECT_GT(beat.resident_bytes, 1u << 20);
  queue_.Push(ShutdownWorker{});
  EXPECT_TRUE(End().ok());
}

// Rank 0 of a group whose rank 1 never arrives.
class LonelyRankTest : public testing::Test {
 protected:
  LonelyRankTest() {
    auto memory = MappedMemory::Create("worker_test", ShmGroupMemoryBytes(2, kSlotBytes));
    CHECK(memory.ok());
    memory_ = std::make_shared<MappedMemory>(*std::move(memory));
    ConfigureWorker configure = kConfigure;
    configure.world_size = 2;
    queue_.Push(configure);
    queue_.Push(kAttachPool);  // its warm-up waits for rank 1
  }

  absl::StatusOr<std::unique_ptr<Collective>> Join(int rank) {
    return ShmCollective::Create(
        memory_, {.group_epoch = 3, .rank = rank, .world_size = 2, .slot_bytes = kSlotBytes});
  }

  static constexpr int64_t kSlotBytes = 4096;
  std::shared_ptr<MappedMemory> memory_;
  RankGroup group_{0, 2};
  FakeModel model_{&group_};
  FakeWorkQueue queue_;
  Worker worker_{
      &model_,
      &group_,
      &queue_,
      {.join_group = [this](const ConfigureWorker&) { return Join(0); }, .fetch_pool = NewPool}};
};

TEST_F(LonelyRankTest, AStopEndsTheWaitForARankThatIsGone) {
  std::thread stopper([this] {
    queue_.WaitForBeats(2);  // a quarter of a second: the worker waits by then
    worker_.RequestStop(/*patience_ms=*/10);
  });
  EXPECT_TRUE(worker_.Run().ok());
  EXPECT_TRUE(queue_.faults().empty());
  stopper.join();
}

TEST_F(LonelyRankTest, ARankThatLeavesWithoutAStopIsAFaultOfTheCollective) {
  std::thread leaving([this] {
    auto peer = Join(1);
    CHECK(peer.ok());
    queue_.WaitForBeats(2);
  });
  const absl::Status status = worker_.Run();
  EXPECT_THAT(status.message(), HasSubstr("a rank has left it"));
  ASSERT_EQ(queue_.faults().size(), 1u);
  EXPECT_EQ(queue_.faults()[0].kind, FaultKind::kCollective);
  leaving.join();
}

}  // namespace
}  // namespace wintserve
