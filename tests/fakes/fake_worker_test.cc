// A test that passes because its fake is lenient proves nothing: what FakeWorker must notice.
#include "tests/fakes/fake_worker.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include <map>
#include <numeric>

#include "api_server/work_queue/server/work_queue_server.h"
#include "common/check.h"
#include "common/mutex.h"
#include "common/temp_dir_test_util.h"

namespace wintserve {
namespace {

using testing::ElementsAre;

constexpr std::chrono::seconds kPatience(10);
constexpr uint64_t kGroupEpoch = 5;

// A server with one FakeWorker whose next token is the sum of the history, modulo 1000.
class FakeWorkerTest : public testing::Test {
 protected:
  void SetUp() override {
    const std::string socket = (directory_.path() / "q.sock").string();
    auto server = WorkQueueServer::Start({.unix_socket = socket, .token = "t"}, Events());
    CHECK(server.ok(), "{}", server.status().ToString());
    server_ = *std::move(server);
    worker_ = std::make_unique<FakeWorker>(
        FakeWorkerOptions{.target = "unix:" + socket,
                          .token = "t",
                          .hello = FakeHello(0, 1),
                          .next_token = [](const std::vector<int32_t>& history) {
                            return std::accumulate(history.begin(), history.end(), 0) % 1000;
                          }});
    Configure(kGroupEpoch);
    Attach(1);
  }
  ~FakeWorkerTest() override {
    worker_.reset();
    server_.reset();
  }

  void Configure(uint64_t group_epoch) {
    group_epoch_ = group_epoch;
    server_->Send(ConfigureWorker{.group_epoch = group_epoch,
                                  .max_slots = 4,
                                  .max_tokens = 512,
                                  .max_sequence_tokens = 512,
                                  .sampled_vocab_size = 1000,
                                  .stop_ids = {6, 7}});
  }
  // What the worker says that it has left is the group before. Steps count on.
  uint64_t JoinNextGroup() {
    server_->Send(AbortGroup{.group_epoch = group_epoch_});
    {
      MutexLock lock(&mutex_);
      CHECK(changed_.WaitFor(&mutex_, kPatience, [&]() NO_THREAD_SAFETY_ANALYSIS {
        return aborted_ == group_epoch_ || !fault_.empty();
      }));
      CHECK(fault_.empty(), "{}", fault_);
    }
    Configure(group_epoch_ + 1);
    plan_hash_ = 0;
    Attach(pool_epoch_);
    return group_epoch_;
  }
  void Attach(uint64_t pool_epoch) {
    pool_epoch_ = pool_epoch;
    server_->Send(AttachPool{
        .pool_epoch = pool_epoch, .memory_socket = "", .num_blocks = 8, .num_host_slots = 2});
  }

  // Numbers and chains the plan; what was sampled.
  std::vector<int32_t> Execute(StepPlan plan) {
    SendPlan(std::move(plan));
    MutexLock lock(&mutex_);
    CHECK(changed_.WaitFor(&mutex_, kPatience, [&]() NO_THREAD_SAFETY_ANALYSIS {
      return steps_.contains(step_) || !fault_.empty();
    }));
    CHECK(fault_.empty(), "{}", fault_);
    std::vector<int32_t> tokens;
    for (const SampledToken& sampled : steps_[step_].sampled) tokens.push_back(sampled.token);
    return tokens;
  }
  void SendPlan(StepPlan plan) {
    plan.group_epoch = group_epoch_;
    plan.pool_epoch = pool_epoch_;
    plan.step = ++step_;
    plan.previous_plan_hash = plan_hash_;
    plan_hash_ = server_->SendPlan(plan);
  }
  std::string FaultOf(StepPlan plan) {
    SendPlan(std::move(plan));
    return WaitForFault();
  }
  std::string WaitForFault() {
    MutexLock lock(&mutex_);
    CHECK(changed_.WaitFor(&mutex_, kPatience,
                           [&]() NO_THREAD_SAFETY_ANALYSIS { return !fault_.empty(); }));
    return fault_;
  }
  uint64_t WaitForDetached() {
    MutexLock lock(&mutex_);
    CHECK(changed_.WaitFor(&mutex_, kPatience,
                           [&]() NO_THREAD_SAFETY_ANALYSIS { return detached_ != 0; }));
    return detached_;
  }

 private:
  WorkQueueEvents Events() {
    const auto note = [this](auto change) {
      MutexLock lock(&mutex_);
      change();
      changed_.NotifyAll();
    };
    return {.on_hello = [](const WorkerHello&) {},
            .on_ready = [](uint32_t, const ReadyMessage&) {},
            .on_step_done =
                [this, note](uint32_t, StepDone done) {
                  note([&]() NO_THREAD_SAFETY_ANALYSIS { steps_[done.step] = done; });
                },
            .on_heartbeat = [](uint32_t, const HeartbeatMessage&) {},
            .on_pool_detached =
                [this, note](uint32_t, const PoolDetachedMessage& detached) {
                  note([&]() NO_THREAD_SAFETY_ANALYSIS { detached_ = detached.pool_epoch; });
                },
            .on_fault =
                [this, note](uint32_t, const FaultMessage& fault) {
                  note([&]() NO_THREAD_SAFETY_ANALYSIS { fault_ = fault.text; });
                },
            .on_aborted =
                [this, note](uint32_t, const AbortedMessage& aborted) {
                  note([&]() NO_THREAD_SAFETY_ANALYSIS { aborted_ = aborted.group_epoch; });
                },
            .on_detached = [](uint32_t, uint64_t, const absl::Status&) {},
            .on_refused = [](const std::string&) {}};
  }

 protected:
  std::unique_ptr<WorkQueueServer> server_;
  std::unique_ptr<FakeWorker> worker_;

 private:
  const TempDir directory_;
  uint64_t group_epoch_ = 0;
  uint64_t pool_epoch_ = 0;
  uint64_t step_ = 0;
  uint64_t plan_hash_ = 0;
  Mutex mutex_;
  CondVar changed_;
  std::map<uint64_t, StepDone> steps_ GUARDED_BY(mutex_);
  uint64_t detached_ GUARDED_BY(mutex_) = 0;
  uint64_t aborted_ GUARDED_BY(mutex_) = 0;
  std::string fault_ GUARDED_BY(mutex_);
};

TEST_F(FakeWorkerTest, ReadsChunksDecodesAndSharedPrefixesBackThroughTheBlocks) {
  const std::vector<int32_t> ones(64, 1);
  EXPECT_THAT(Execute({.slot_init = {{0, {}, {BlockId{3}}}}, .rows = {{0, 0, 64, false, ones}}}),
              ElementsAre());
  EXPECT_THAT(Execute({.block_append = {{0, {BlockId{5}}}}, .rows = {{0, 64, 1, true, {100}}}}),
              ElementsAre(164));
  EXPECT_THAT(Execute({.rows = {{0, 65, 1, true, {}}}}), ElementsAre(328));
  // Another slot takes the first block over.
  EXPECT_THAT(Execute({.slot_init = {{1, {}, {BlockId{3}, BlockId{0}}}},
                       .rows = {{1, 64, 2, true, {200, 300}}}}),
              ElementsAre(564));
}

TEST_F(FakeWorkerTest, CopiesMoveWhatTheBlocksHold) {
  const std::vector<int32_t> twos(64, 2);
  Execute({.slot_init = {{0, {}, {BlockId{3}}}},
           .rows = {{0, 0, 64, false, twos}},
           .slot_release = {0}});
  Execute({.copies = {{.to_device = false, .block = BlockId{3}, .host_slot = 1}}});
  EXPECT_THAT(Execute({.slot_init = {{0, {}, {BlockId{6}, BlockId{2}}}},
                       .rows = {{0, 64, 1, true, {1}}},
                       .copies = {{.to_device = true, .block = BlockId{6}, .host_slot = 1}}}),
              ElementsAre(129));
}

TEST_F(FakeWorkerTest, GivesNoStopIdBeforeItsPosition) {
  EXPECT_THAT(Execute({.slot_init = {{0, {.first_stop_position = 3}, {BlockId{0}}}},
                       .rows = {{0, 0, 2, true, {1, 5}}}}),
              ElementsAre(8));  // 6 and 7 are stop ids
  EXPECT_THAT(Execute({.slot_init = {{1, {.first_stop_position = 2}, {BlockId{1}}}},
                       .rows = {{1, 0, 2, true, {1, 5}}}}),
              ElementsAre(6));
}

TEST_F(FakeWorkerTest, GoesOnWithTheChainOnANewPoolThatHoldsNothing) {
  Execute({.slot_init = {{0, {}, {BlockId{3}}}}, .rows = {{0, 0, 1, true, {1}}}});
  server_->Send(DetachPool{1});
  EXPECT_EQ(WaitForDetached(), 1u);
  Attach(2);
  EXPECT_THAT(Execute({.slot_init = {{0, {}, {BlockId{3}}}}, .rows = {{0, 0, 1, true, {4}}}}),
              ElementsAre(4));
  EXPECT_EQ(FaultOf({.slot_init = {{1, {}, {BlockId{4}}}}, .rows = {{1, 1, 1, true, {4}}}}),
            "slot 1: position 0 was never written");
}

TEST_F(FakeWorkerTest, LeavesItsGroupWithEmptySlotsAndJoinsTheNextOneWithItsKv) {
  Execute({.slot_init = {{0, {}, {BlockId{3}}}}, .rows = {{0, 0, 2, true, {1, 5}}}});
  EXPECT_EQ(JoinNextGroup(), kGroupEpoch + 1);
  EXPECT_THAT(Execute({.slot_init = {{0, {}, {BlockId{3}}}}, .rows = {{0, 2, 1, true, {4}}}}),
              ElementsAre(10));
  EXPECT_EQ(worker_->num_mappings(), 1);
}

TEST_F(FakeWorkerTest, RefusesToLeaveAnotherGroup) {
  server_->Send(AbortGroup{.group_epoch = 77});
  EXPECT_EQ(WaitForFault(), "AbortGroup of group epoch 4d, which it is not in");
}

TEST_F(FakeWorkerTest, RefusesAPlanOfADetachedPool) {
  server_->Send(DetachPool{1});
  EXPECT_EQ(FaultOf({}), "step 1 is of pool epoch 1, which is not attached");
}

TEST_F(FakeWorkerTest, RefusesADetachOfAnotherPool) {
  server_->Send(DetachPool{9});
  EXPECT_EQ(WaitForFault(), "DetachPool of pool epoch 9, which is not attached");
}

TEST_F(FakeWorkerTest, RefusesWhatARealWorkerRefuses) {
  EXPECT_EQ(FaultOf({.rows = {{0, 0, 1, true, {1}}}}), "row: slot 0 is not in use");
}

TEST_F(FakeWorkerTest, RefusesACopyToWhereThereIsNothing) {
  EXPECT_EQ(FaultOf({.copies = {{.to_device = true, .block = BlockId{0}, .host_slot = 2}}}),
            "copies: host slot 2 is not in 0 … 1");
}

}  // namespace
}  // namespace wintserve
