#include "engine_worker/runner/worker.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <thread>

#include "common/check.h"
#include "common/shared_memory.h"
#include "engine_worker/collectives/single_rank_collective.h"
#include "engine_worker/runner/worker_test_util.h"
#include "tests/fakes/fake_model.h"
#include "tests/fakes/fake_work_queue.h"

namespace wintserve {
namespace {

using testing::HasSubstr;
using testing_fakes::FakeModel;
using testing_fakes::FakeWorkQueue;

absl::StatusOr<std::unique_ptr<Collective>> JoinAlone(const ConfigureWorker&) {
  return MakeSingleRankCollective();
}

// A worker of one rank that runs in a thread of its own.
class WorkerTest : public testing::Test {
 protected:
  void Start(WorkerLinks links = {.join_group = JoinAlone,
                                  .fetch_pool = NewPool,
                                  .fetch_host_tier = NewHostTier},
             bool use_graphs = false) {
    worker_ = std::make_unique<Worker>(&model_, &group_, &queue_, std::move(links),
                                       WorkerOptions{.use_graphs = use_graphs});
    thread_ = std::thread([this] { status_ = worker_->Run(); });
  }
  absl::Status End() {
    thread_.join();
    return status_;
  }

  void PushPlan(StepPlan plan, uint64_t pool_epoch = kAttachPool.pool_epoch) {
    plan.group_epoch = kConfigure.group_epoch;
    plan.pool_epoch = pool_epoch;
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

// What a worker is at work on until the test lets it go on.
class Gate {
 public:
  void Pass() {
    MutexLock lock(&mutex_);
    waiting_ = true;
    changed_.NotifyAll();
    changed_.Wait(&mutex_, [this]() NO_THREAD_SAFETY_ANALYSIS { return open_; });
  }
  void WaitForSomeone() {
    MutexLock lock(&mutex_);
    changed_.Wait(&mutex_, [this]() NO_THREAD_SAFETY_ANALYSIS { return waiting_; });
  }
  void Open() {
    MutexLock lock(&mutex_);
    open_ = true;
    changed_.NotifyAll();
  }

 private:
  Mutex mutex_;
  CondVar changed_;
  bool waiting_ GUARDED_BY(mutex_) = false;
  bool open_ GUARDED_BY(mutex_) = false;
};

// A group of one in which the `slow`-th pass waits at a gate.
class GatedCollective : public Collective {
 public:
  GatedCollective(int slow, Gate* gate) : slow_(slow), gate_(gate) {}
  int rank() const override { return 0; }
  int world_size() const override { return 1; }
  absl::Status AllReduceSum(float*, int64_t) override {
    if (++num_passes_ == slow_) gate_->Pass();
    return absl::OkStatus();
  }
  absl::Status AllGather(const float*, int64_t, float*) override { return absl::OkStatus(); }
  absl::Status Broadcast(void*, int64_t) override { return absl::OkStatus(); }
  void Abort() override {}

 private:
  const int slow_;
  Gate* const gate_;
  int num_passes_ = 0;
};

TEST_F(WorkerTest, AStopLetsThePlanInHandFinish) {
  Gate gate;
  queue_.Push(kConfigure);
  queue_.Push(kAttachPool);
  PushPlan(FirstPlan());
  PushPlan({.rows = {{0, 3, 1, true, {}}}});  // comes after the stop and is not taken up
  Start({.join_group = [&](const ConfigureWorker&) -> absl::StatusOr<std::unique_ptr<Collective>> {
           return std::make_unique<GatedCollective>(/*slow=*/3,
                                                    &gate);  // behind mapping and warm-up
         },
         .fetch_pool = NewPool,
         .fetch_host_tier = NewHostTier});
  gate.WaitForSomeone();
  bool stopped = false;
  std::thread stopper([&] { stopped = worker_->RequestStop(60'000); });
  // Not before the stop is known; a heartbeat is as good a clock as any.
  queue_.WaitForBeats(queue_.WaitForBeats(1).size() + 1);
  gate.Open();
  stopper.join();
  EXPECT_TRUE(stopped);
  EXPECT_TRUE(End().ok());
  EXPECT_EQ(queue_.WaitForSteps(1).size(), 1u);
  EXPECT_TRUE(queue_.faults().empty());
}

TEST_F(WorkerTest, AStopDoesNotWaitForAWorkerThatWaitsForOthers) {
  Gate gate;
  queue_.Push(kConfigure);
  queue_.Push(kAttachPool);
  Start({.join_group = JoinAlone,
         .fetch_pool =
             [&](const AttachPool& attach) {
               gate.Pass();
               return NewPool(attach);
             },
         .fetch_host_tier = NewHostTier});
  gate.WaitForSomeone();
  EXPECT_FALSE(worker_->RequestStop(60'000));
  gate.Open();
  EXPECT_TRUE(End().ok());
}

TEST_F(WorkerTest, ANewPoolStartsWithoutSlotsAndGoesOnWithTheChain) {
  AttachPool second = kAttachPool;
  second.pool_epoch = 5;
  second.num_host_slots = 2;
  queue_.Push(kConfigure);
  queue_.Push(kAttachPool);
  PushPlan(FirstPlan());
  queue_.Push(DetachPool{kAttachPool.pool_epoch});
  queue_.Push(second);
  PushPlan(FirstPlan(), 5);  // its slot is free again
  PushPlan({.copies = {{.to_device = false, .block = BlockId{5}, .host_slot = 1}}}, 5);
  queue_.Push(ShutdownWorker{});
  Start();
  EXPECT_TRUE(End().ok());
  EXPECT_EQ(queue_.WaitForDetached(1), std::vector<uint64_t>{kAttachPool.pool_epoch});
  EXPECT_EQ(queue_.num_ready(), 2);
  const std::vector<StepDone> steps = queue_.WaitForSteps(3);
  EXPECT_EQ(steps[1].step, 2u);
  EXPECT_EQ(steps[1].sampled[0].token, steps[0].sampled[0].token);
}

TEST_F(WorkerTest, GraphsAreMadeForEveryPool) {
  AttachPool second = kAttachPool;
  second.pool_epoch = 5;
  queue_.Push(kConfigure);
  queue_.Push(kAttachPool);
  PushPlan(FirstPlan());
  PushPlan({.rows = {{0, 3, 1, true, {}}}});
  queue_.Push(DetachPool{kAttachPool.pool_epoch});
  queue_.Push(second);
  PushPlan(FirstPlan(), 5);
  PushPlan({.rows = {{0, 3, 1, true, {}}}}, 5);
  queue_.Push(ShutdownWorker{});
  Start({.join_group = JoinAlone, .fetch_pool = NewPool, .fetch_host_tier = NewHostTier},
        /*use_graphs=*/true);
  EXPECT_TRUE(End().ok());
  const std::vector<StepDone> steps = queue_.WaitForSteps(4);
  EXPECT_EQ(steps[3].sampled[0].token, steps[1].sampled[0].token);
  // The pass before the graph of two rows has one of padding.
  EXPECT_EQ(model_.num_padding_rows(), 2);
}

TEST_F(WorkerTest, UnmapsBothTiersBeforeItAnswersADetach) {
  const auto mapped = [] {
    std::ifstream maps("/proc/self/maps");
    const std::string text(std::istreambuf_iterator<char>(maps), {});
    return std::pair(text.find("detach_test_pool") != std::string::npos,
                     text.find("detach_test_host") != std::string::npos);
  };
  AttachPool attach = kAttachPool;
  attach.num_host_slots = 2;
  queue_.Push(kConfigure);
  queue_.Push(attach);
  PushPlan(FirstPlan());
  Start({.join_group = JoinAlone,
         .fetch_pool = [](const AttachPool&) { return NewMemory("detach_test_pool", 8 * 256); },
         .fetch_host_tier =
             [](const AttachPool&) { return NewMemory("detach_test_host", 2 * 256); }});
  queue_.WaitForSteps(1);
  EXPECT_EQ(mapped(), std::pair(true, true));
  queue_.Push(DetachPool{kAttachPool.pool_epoch});
  queue_.WaitForDetached(1);
  EXPECT_EQ(mapped(), std::pair(false, false));
  queue_.Push(ShutdownWorker{});
  EXPECT_TRUE(End().ok());
}

TEST_F(WorkerTest, ADetachWithoutAPoolIsAFault) {
  queue_.Push(kConfigure);
  queue_.Push(DetachPool{4});
  Start();
  EXPECT_EQ(End().message(), "detach of pool epoch 4, but no pool is attached");
}

// A cache manager that dies after it has opened the pool, and another one after that.
TEST_F(WorkerTest, APoolThatIsGoneWhenItIsToBeMappedIsWaitedOutAndTheNextOneServes) {
  AttachPool second = kAttachPool;
  second.pool_epoch = 5;
  AttachPool third = kAttachPool;
  third.pool_epoch = 6;
  queue_.Push(kConfigure);
  queue_.Push(kAttachPool);
  queue_.Push(DetachPool{4});
  queue_.Push(second);
  PushPlan(FirstPlan(), 5);
  queue_.Push(DetachPool{5});
  queue_.Push(third);
  queue_.Push(DetachPool{6});
  queue_.Push(kAttachPool);
  PushPlan(FirstPlan(), 4);  // the chain goes on over pools that were never mapped
  queue_.Push(ShutdownWorker{});
  int num_fetches = 0;
  Start({.join_group = JoinAlone,
         .fetch_pool =
             [&](const AttachPool& attach) {
               ++num_fetches;
               return num_fetches % 2 == 1 ? PoolIsGone(attach) : NewPool(attach);
             },
         .fetch_host_tier = NewHostTier});
  EXPECT_TRUE(End().ok()) << status_;
  EXPECT_EQ(queue_.WaitForDetached(3), (std::vector<uint64_t>{4, 5, 6}));
  EXPECT_EQ(queue_.num_ready(), 2);
  EXPECT_EQ(queue_.WaitForSteps(2)[1].step, 2u);
  EXPECT_TRUE(queue_.faults().empty());
}

TEST_F(WorkerTest, AHostTierThatIsGoneLeavesThePoolUnmapped) {
  AttachPool attach = kAttachPool;
  attach.num_host_slots = 2;
  queue_.Push(kConfigure);
  queue_.Push(attach);
  Start({.join_group = JoinAlone,
         .fetch_pool = [](const AttachPool&) { return NewMemory("half_mapped_pool", 8 * 256); },
         .fetch_host_tier = PoolIsGone});
  queue_.Push(DetachPool{4});
  queue_.WaitForDetached(1);
  std::ifstream maps("/proc/self/maps");
  EXPECT_THAT(std::string(std::istreambuf_iterator<char>(maps), {}),
              testing::Not(HasSubstr("half_mapped_pool")));
  queue_.Push(ShutdownWorker{});
  EXPECT_TRUE(End().ok());
  EXPECT_EQ(queue_.num_ready(), 0);
}

TEST_F(WorkerTest, AMappingThatFailsWhileThePoolIsThereIsAFault) {
  const struct {
    absl::Status error;
    FaultKind kind;
  } kCases[] = {
      {absl::ResourceExhaustedError("mmap: Cannot allocate memory"), FaultKind::kOutOfMemory},
      {absl::FailedPreconditionError("the pool has no host tier"), FaultKind::kInternal},
      {absl::UnavailableError("no KV pool memory from m.sock: nobody"), FaultKind::kInternal},
      {absl::UnauthenticatedError("the memory socket demands the token"), FaultKind::kInternal},
  };
  for (const auto& [error, kind] : kCases) {
    SCOPED_TRACE(std::string(error.message()));
    FakeWorkQueue queue;
    RankGroup group(0, 1);
    FakeModel model(&group);
    queue.Push(kConfigure);
    queue.Push(kAttachPool);
    Worker worker(&model, &group, &queue,
                  {.join_group = JoinAlone,
                   .fetch_pool = [&](const AttachPool&) { return error; },
                   .fetch_host_tier = NewHostTier});
    EXPECT_EQ(worker.Run().message(), error.message());
    ASSERT_EQ(queue.faults().size(), 1u);
    EXPECT_EQ(queue.faults()[0].kind, kind);
  }
}

TEST_F(WorkerTest, APlanForAPoolThatWasGoneIsAFault) {
  queue_.Push(kConfigure);
  queue_.Push(kAttachPool);
  PushPlan(FirstPlan());
  Start({.join_group = JoinAlone, .fetch_pool = PoolIsGone, .fetch_host_tier = NewHostTier});
  EXPECT_EQ(End().message(), "plan of step 1, but no pool is mapped");
}

TEST_F(WorkerTest, ADetachOfAnotherPoolIsAFault) {
  queue_.Push(kConfigure);
  queue_.Push(kAttachPool);
  queue_.Push(DetachPool{9});
  Start();
  EXPECT_EQ(End().message(), "detach of pool epoch 9, the attached pool is 4");
}

TEST_F(WorkerTest, APlanOfTheDetachedPoolIsAFault) {
  AttachPool second = kAttachPool;
  second.pool_epoch = 5;
  queue_.Push(kConfigure);
  queue_.Push(kAttachPool);
  queue_.Push(DetachPool{kAttachPool.pool_epoch});
  queue_.Push(second);
  PushPlan(FirstPlan());
  Start();
  EXPECT_EQ(End().message(), "plan of pool epoch 4, the mapped pool is 5");
}

TEST_F(WorkerTest, ASecondPoolBesideTheFirstIsAFault) {
  queue_.Push(kConfigure);
  queue_.Push(kAttachPool);
  queue_.Push(kAttachPool);
  Start();
  EXPECT_EQ(End().message(), "a pool is attached already");
}

TEST_F(WorkerTest, AHostTierOfAnotherSizeIsAFault) {
  AttachPool attach = kAttachPool;
  attach.num_host_slots = 3;
  queue_.Push(kConfigure);
  queue_.Push(attach);
  Start({.join_group = JoinAlone, .fetch_pool = NewPool, .fetch_host_tier = [](const AttachPool&) {
           return NewMemory("worker_test", 512);
         }});
  EXPECT_EQ(End().message(), "the host tier has 512 bytes, 3 slots of 256 bytes need 768");
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

TEST_F(WorkerTest, AStepThatFailsIsOneFaultAndTheEnd) {
  queue_.Push(kConfigure);
  queue_.Push(kAttachPool);
  PushPlan(FirstPlan());
  PushPlan({.rows = {{0, 3, 1, true, {}}}});  // planned ahead; too late for it
  model_.BreakLogits();
  Start();
  EXPECT_EQ(End().message(), "slot 0 at position 3: the logit of token 0 is not a finite number");
  ASSERT_EQ(queue_.faults().size(), 1u);
  EXPECT_EQ(queue_.faults()[0].text, status_.message());
  EXPECT_TRUE(queue_.WaitForSteps(0).empty());
}

TEST_F(WorkerTest, APlanBeforeThePoolIsAFault) {
  queue_.Push(kConfigure);
  PushPlan(FirstPlan());
  Start();
  EXPECT_EQ(End().message(), "plan of step 1, but no pool is mapped");
}

// There is no group that could have been lost with the stream.
TEST_F(WorkerTest, APlanBeforeTheConfigurationIsAFaultAlsoWhenTheStreamHasEnded) {
  PushPlan(FirstPlan());
  queue_.EndStream();
  Start();
  EXPECT_EQ(End().message(), "plan of step 1, but no pool is mapped");
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
  Start({.join_group = JoinAlone,
         .fetch_pool = [](const AttachPool&) { return NewMemory("worker_test", 4096); },
         .fetch_host_tier = NewHostTier});
  EXPECT_EQ(End().message(), "the pool has 4096 bytes, 8 blocks of 256 bytes need 2048");
}

// What its device cannot compute in.
TEST_F(WorkerTest, MemoryOfAnotherKindOfDeviceIsAFault) {
  queue_.Push(kConfigure);
  queue_.Push(kAttachPool);
  Start({.join_group = JoinAlone,
         .fetch_pool = [](const AttachPool& attach) -> absl::StatusOr<SharedMemory> {
           auto pool = NewPool(attach);
           pool->kind = SharedMemory::Kind::kGpu;
           return pool;
         },
         .fetch_host_tier = NewHostTier});
  EXPECT_EQ(End().message(), "memory of a GPU cannot be mapped into the host's");
  EXPECT_EQ(queue_.faults().size(), 1u);
}

TEST_F(WorkerTest, BeatsTellHowTheRankGetsReady) {
  const auto progress = [this] {
    const size_t num_before = queue_.WaitForBeats(1).size();
    return queue_.WaitForBeats(num_before + 2).back().progress;
  };
  Gate gate;
  Start({.join_group = JoinAlone,
         .fetch_pool = [&](const AttachPool& attach) -> absl::StatusOr<SharedMemory> {
           gate.Pass();
           return NewPool(attach);
         },
         .fetch_host_tier = NewHostTier});
  const uint64_t at_start = progress();
  queue_.Push(kConfigure);
  queue_.Push(kAttachPool);
  gate.WaitForSomeone();
  const uint64_t joined = progress();
  EXPECT_NE(joined, at_start);
  EXPECT_EQ(progress(), joined) << "it waits for its memory";
  gate.Open();
  queue_.WaitForReady(1);
  const uint64_t ready = progress();
  EXPECT_NE(ready, joined);
  EXPECT_EQ(progress(), ready) << "it waits for plans";
  queue_.Push(ShutdownWorker{});
  EXPECT_TRUE(End().ok());
}

TEST_F(WorkerTest, BeatsTellTheStepsTakenUpAndDone) {
  queue_.Push(kConfigure);
  queue_.Push(kAttachPool);
  PushPlan(FirstPlan());
  Start();
  queue_.WaitForSteps(1);
  const size_t num_before = queue_.WaitForBeats(1).size();
  const HeartbeatMessage beat = queue_.WaitForBeats(num_before + 2).back();
  EXPECT_EQ(beat.step_started, 1u);
  EXPECT_EQ(beat.step_done, 1u);
  EXPECT_GT(beat.resident_bytes, 1u << 20);
  queue_.Push(ShutdownWorker{});
  EXPECT_TRUE(End().ok());
}

}  // namespace
}  // namespace wintserve
