// Engine-worker processes that survive the end of a peer, of their group and of the API server.
#include <gmock/gmock.h>

#include <functional>

#include "common/exit_code.h"
#include "tests/integration/engine_worker_process.h"

namespace wintserve::testing_engine_worker {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;
using testing::HasSubstr;

// Two ranks on the demo model. Slot 0 generates on blocks 0 to 3; the rest of the pool is for what
// goes on beside it.
class Recovery : public EngineWorkerProcess {
 protected:
  static constexpr int kRanks = 2;
  static constexpr size_t kNumBefore = 6;  // tokens before the fault

  void StartReady() {
    Start(kRanks);
    MakeReady(kRanks);
    num_hellos_ = num_ready_ = kRanks;
    for (int i = 0; i < 100; ++i) prompt_.push_back(3 + i * 37 % 1000);
    for (int i = 0; i < 4; ++i) blocks_.push_back(BlockId{i});
    expected_ = Generate(prompt_, 0, prompt_.size(), blocks_);
  }

  // The sequence once more, with a fault on the way that ends in a new group. Its block table and
  // what it has computed stay; the first row after the fault brings its token.
  std::vector<int32_t> GenerateOver(const std::function<void()>& fault) {
    std::vector<int32_t> output = {
        Execute({.slot_init = {{0, kSampling, blocks_}},
                 .rows = {{0, 0, static_cast<uint32_t>(prompt_.size()), true, prompt_}}})
            .sampled.at(0)
            .token};
    while (output.size() < kNumBefore) output.push_back(Decode(output.size()));
    fault();
    StepPlan resume = {.slot_init = {{0, kSampling, blocks_}},
                       .rows = {{0, PositionOf(output.size()), 1, true, {output.back()}}}};
    output.push_back(Execute(resume).sampled.at(0).token);
    while (output.size() < kNumSampled) output.push_back(Decode(output.size()));
    Execute({.slot_release = {0}});
    return output;
  }

  // Of the last of num_sampled tokens, which the next pass takes.
  uint32_t PositionOf(size_t num_sampled) const {
    return static_cast<uint32_t>(prompt_.size() + num_sampled - 1);
  }
  StepPlan DecodePlan(size_t num_sampled) const {
    return {.rows = {{0, PositionOf(num_sampled), 1, true, {}}}};
  }
  int32_t Decode(size_t num_sampled) {
    return Execute(DecodePlan(num_sampled)).sampled.at(0).token;
  }

  // Sends what comes next of the sequence, behind a row that keeps the ranks busy for a while.
  void SendLongStep() {
    std::vector<BlockId> blocks;
    for (int i = 8; i < 40; ++i) blocks.push_back(BlockId{i});
    StepPlan plan = DecodePlan(kNumBefore);
    plan.slot_init = {{1, {}, blocks}};
    plan.rows.push_back({1, 0, 1900, false, std::vector<int32_t>(1900, 5)});
    SendPlan(plan);
  }

  void Abort() { server_->Send(AbortGroup{group_epoch_, "the test says so"}); }

  // Of a rank that has nothing to wait for but its peers.
  void ExpectAbortedSoon(uint32_t rank) {
    const auto begin = steady_clock::now();
    inbox_.WaitForAborted(group_epoch_, rank);
    EXPECT_LT(steady_clock::now() - begin, std::chrono::seconds(10));
  }

  void Kill(int rank) {
    ::kill(children_[rank], SIGKILL);
    ::waitpid(children_[rank], nullptr, 0);
    children_[rank] = -1;
    inbox_.WaitForTheEndOf(hellos_[rank].worker_id);
  }

  // In place of one that was killed.
  void Replace(int rank) {
    Spawn(rank);
    children_[rank] = children_.back();
    children_.pop_back();
    hellos_[rank] = inbox_.WaitForHellos(++num_hellos_).back();
    EXPECT_EQ(hellos_[rank].rank, static_cast<uint32_t>(rank));
    EXPECT_EQ(hellos_[rank].mapped_pool_epoch, 0u);
  }

  // All ranks, in the next group, on the same pool. Steps count on.
  void Rejoin() {
    ++group_epoch_;
    plan_hash_ = 0;
    SendConfigure(kRanks);
    SendAttachPool();
    inbox_.WaitForReady(num_ready_ += kRanks);
  }

  void ExpectCleanEnd() {
    EXPECT_FALSE(inbox_.HasFault());
    server_->Send(ShutdownWorker{});
    for (int rank = 0; rank < kRanks; ++rank) EXPECT_EQ(WaitForExit(), kExitOk) << Log(rank);
  }

  std::vector<int32_t> prompt_;
  std::vector<BlockId> blocks_;
  std::vector<int32_t> expected_;  // without a fault
  size_t num_hellos_ = 0;
  int num_ready_ = 0;
};

TEST_F(Recovery, GoesOnAfterTheDeathOfAnIdleRank) {
  StartReady();
  for (const int rank : {1, 0}) {
    SCOPED_TRACE(rank);
    EXPECT_EQ(GenerateOver([&] {
                Kill(rank);
                Abort();
                ExpectAbortedSoon(1 - rank);
                Replace(rank);
                Rejoin();
              }),
              expected_);
  }
  ExpectCleanEnd();
}

TEST_F(Recovery, GoesOnAfterTheDeathOfARankInsideAStep) {
  StartReady();
  for (const int delay_ms : {1, 30, 120}) {
    SCOPED_TRACE(delay_ms);
    EXPECT_EQ(GenerateOver([&] {
                SendLongStep();
                std::this_thread::sleep_for(milliseconds(delay_ms));
                Kill(1);
                SendPlan(DecodePlan(kNumBefore + 1));  // sent ahead
                Abort();
                ExpectAbortedSoon(0);
                Replace(1);
                Rejoin();
              }),
              expected_);
  }
  ExpectCleanEnd();
}

// The survivor waits for its peer in the warm-up of the group that follows a fault.
TEST_F(Recovery, GoesOnAfterTheDeathOfARankThatWarmsUp) {
  StartReady();
  EXPECT_EQ(GenerateOver([&] {
              Abort();
              ExpectAbortedSoon(0);
              ExpectAbortedSoon(1);
              ::kill(children_[1], SIGSTOP);
              ++group_epoch_;
              SendConfigure(kRanks);
              SendAttachPool();
              std::this_thread::sleep_for(milliseconds(200));
              Kill(1);
              Abort();
              ExpectAbortedSoon(0);
              Replace(1);
              Rejoin();
            }),
            expected_);
  ExpectCleanEnd();
}

// As at a first start: no pool is mapped yet by the rank that dies.
TEST_F(Recovery, StartsAfterTheDeathOfARankInTheFirstWarmUp) {
  Start(kRanks);
  WaitForWorkers(kRanks);
  num_hellos_ = kRanks;
  ::kill(children_[1], SIGSTOP);
  PublishPool(kPoolEpoch);
  SendConfigure(kRanks);
  SendAttachPool();
  std::this_thread::sleep_for(milliseconds(200));
  Kill(1);
  Abort();
  ExpectAbortedSoon(0);
  Replace(1);
  Rejoin();
  ExpectCleanEnd();
}

TEST_F(Recovery, AStoppedPeerHoldsNobodyUp) {
  StartReady();
  EXPECT_EQ(GenerateOver([&] {
              ::kill(children_[1], SIGSTOP);
              SendPlan(DecodePlan(kNumBefore));
              std::this_thread::sleep_for(milliseconds(100));
              Abort();
              ExpectAbortedSoon(0);
              Kill(1);
              Replace(1);
              Rejoin();
            }),
            expected_);
  ExpectCleanEnd();
}

TEST_F(Recovery, AStoppedPeerThatGoesOnJoinsTheNextGroup) {
  StartReady();
  EXPECT_EQ(GenerateOver([&] {
              ::kill(children_[1], SIGSTOP);
              SendPlan(DecodePlan(kNumBefore));
              std::this_thread::sleep_for(milliseconds(100));
              Abort();
              ExpectAbortedSoon(0);
              ::kill(children_[1], SIGCONT);
              ExpectAbortedSoon(1);
              Rejoin();
            }),
            expected_);
  ExpectCleanEnd();
}

TEST_F(Recovery, AnAbortBeforeAnyPlanIsAnswered) {
  Start(kRanks);
  MakeReady(kRanks);
  num_ready_ = kRanks;
  Abort();
  ExpectAbortedSoon(0);
  ExpectAbortedSoon(1);
  Rejoin();
  Execute({});
  ExpectCleanEnd();
}

// The survivor has lost its group before anybody tells it so.
TEST_F(Recovery, ARankThatLeavesItsGroupIsNoFaultOfTheOthers) {
  StartReady();
  EXPECT_EQ(GenerateOver([&] {
              ::kill(children_[1], SIGTERM);
              ::waitpid(children_[1], nullptr, 0);
              inbox_.WaitForTheEndOf(hellos_[1].worker_id);
              SendPlan(DecodePlan(kNumBefore));
              std::this_thread::sleep_for(milliseconds(500));
              EXPECT_FALSE(inbox_.HasFault());
              Abort();
              ExpectAbortedSoon(0);
              Replace(1);
              Rejoin();
            }),
            expected_);
  ExpectCleanEnd();
}

TEST_F(Recovery, WorkersOutliveTheApiServer) {
  StartReady();
  EXPECT_EQ(GenerateOver([&] {
              SendLongStep();
              std::this_thread::sleep_for(milliseconds(30));
              server_.reset();
              std::this_thread::sleep_for(milliseconds(700));
              StartServer(kRanks);
              const std::vector<WorkerHello> hellos = inbox_.WaitForHellos(num_hellos_ += kRanks);
              for (size_t i = kRanks; i < hellos.size(); ++i) {
                const WorkerHello& before = hellos_[hellos[i].rank];
                EXPECT_EQ(hellos[i].worker_id, before.worker_id);
                EXPECT_EQ(hellos[i].weights_digest, before.weights_digest);
                EXPECT_EQ(hellos[i].mapped_pool_epoch, kPoolEpoch);
              }
              Abort();
              ExpectAbortedSoon(0);
              ExpectAbortedSoon(1);
              Rejoin();
            }),
            expected_);
  ExpectCleanEnd();
}

TEST_F(Recovery, WorkersDoNotOutliveTheOrphanTimeout) {
  instance_.options.orphan_timeout_ms = 1'000;
  Start(kRanks);
  MakeReady(kRanks);
  const auto begin = steady_clock::now();
  server_.reset();
  for (int rank = 0; rank < kRanks; ++rank) {
    EXPECT_EQ(WaitForExit(), kExitInternal);
    EXPECT_THAT(Log(rank), HasSubstr("no other came within 1000 ms"));
  }
  EXPECT_GE(steady_clock::now() - begin, milliseconds(1'000));
}

TEST_F(Recovery, AStopEndsAnOrphanAtOnce) {
  Start(kRanks);
  MakeReady(kRanks);
  server_.reset();
  std::this_thread::sleep_for(milliseconds(400));
  const auto begin = steady_clock::now();
  for (const pid_t child : children_) ::kill(child, SIGTERM);
  for (int rank = 0; rank < kRanks; ++rank) EXPECT_EQ(WaitForExit(), kExitOk) << Log(rank);
  // Below the 2 s that a plan in hand gets.
  EXPECT_LT(steady_clock::now() - begin, milliseconds(1'900));
}

TEST_F(Recovery, TheLauncherNamesTheProcess) {
  instance_.worker_id = 0xabcdef;
  Start(1);
  EXPECT_EQ(inbox_.WaitForHellos(1)[0].worker_id, 0xabcdefu);
}

}  // namespace
}  // namespace wintserve::testing_engine_worker
