// A rank whose peer does not come, or goes.
#include <gtest/gtest.h>

#include <memory>
#include <thread>
#include <vector>

#include "common/check.h"
#include "common/mapped_memory.h"
#include "engine_worker/collectives/shm/shm_collective.h"
#include "engine_worker/runner/worker.h"
#include "engine_worker/runner/worker_test_util.h"
#include "tests/fakes/fake_model.h"
#include "tests/fakes/fake_work_queue.h"

namespace wintserve {
namespace {

using testing_fakes::FakeModel;
using testing_fakes::FakeWorkQueue;

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
  Worker worker_{&model_,
                 &group_,
                 &queue_,
                 {.join_group = [this](const ConfigureWorker&) { return Join(0); },
                  .fetch_pool = NewPool,
                  .fetch_host_tier = NewHostTier}};
};

// Without an agreement rank 0 would wait in its warm-up for the other.
TEST_F(LonelyRankTest, NoRankKeepsAPoolThatAnotherCouldNotMap) {
  queue_.Push(DetachPool{kAttachPool.pool_epoch});
  queue_.Push(ShutdownWorker{});
  RankGroup other_group{1, 2};
  FakeModel other_model{&other_group};
  FakeWorkQueue other_queue;
  ConfigureWorker configure = kConfigure;
  configure.world_size = 2;
  other_queue.Push(configure);
  other_queue.Push(kAttachPool);
  other_queue.Push(DetachPool{kAttachPool.pool_epoch});
  other_queue.Push(ShutdownWorker{});
  Worker other(&other_model, &other_group, &other_queue,
               {.join_group = [this](const ConfigureWorker&) { return Join(1); },
                .fetch_pool = PoolIsGone,
                .fetch_host_tier = NewHostTier});
  std::thread other_rank([&] { EXPECT_TRUE(other.Run().ok()); });
  EXPECT_TRUE(worker_.Run().ok());
  other_rank.join();
  for (FakeWorkQueue* queue : {&queue_, &other_queue}) {
    EXPECT_EQ(queue->WaitForDetached(1), std::vector<uint64_t>{kAttachPool.pool_epoch});
    EXPECT_EQ(queue->num_ready(), 0);
    EXPECT_TRUE(queue->faults().empty());
  }
}

TEST_F(LonelyRankTest, AStopEndsTheWaitForARankThatIsGone) {
  std::thread stopper([this] {
    queue_.WaitForBeats(2);  // a quarter of a second: the worker waits by then
    EXPECT_FALSE(worker_.RequestStop(/*patience_ms=*/60'000));
  });
  EXPECT_TRUE(worker_.Run().ok());
  EXPECT_TRUE(queue_.faults().empty());
  stopper.join();
}

TEST_F(LonelyRankTest, ARankThatLeavesIsNoFaultOfThisOne) {
  std::thread leaving([this] {
    {
      auto peer = Join(1);
      CHECK(peer.ok());
      queue_.WaitForBeats(2);
    }
    queue_.Push(AbortGroup{3, "rank 1 is gone"});
    queue_.WaitForAborted(1);
    queue_.Push(ShutdownWorker{});
  });
  EXPECT_TRUE(worker_.Run().ok());
  EXPECT_TRUE(queue_.faults().empty());
  EXPECT_EQ(queue_.num_ready(), 0);
  leaving.join();
}

}  // namespace
}  // namespace wintserve
