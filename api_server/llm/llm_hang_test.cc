// Engine workers that hang: whom that costs what, and for how long.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <memory>

#include "api_server/llm/llm_recovery_test_util.h"
#include "api_server/llm/poison_guard.h"

namespace wintserve {
namespace {

using testing::ElementsAre;
using testing::Pair;

class HangTest : public RecoveryTest {};

// Whoever has the 75th token of a sequence in a step never ends it, and does nothing else until it
// is told to leave its group. The KV of the others is all right, so that none of it is distrusted.
TEST_F(HangTest, ARequestThatHangsTheDeviceEveryTimeFailsAloneAndTheOthersFinish) {
  constexpr int64_t kDeadlineUs = 1'000'000;
  options_.step_deadline = {.least_us = kDeadlineUs, .unknown_us = kDeadlineUs};
  auto hangs = std::make_shared<std::atomic<bool>>(false);
  auto num_hangs = std::make_shared<std::atomic<int>>(0);
  FakeWorkerOptions worker = SlowWorker();
  worker.before_step = [hangs, num_hangs](const StepPlan& plan) {
    for (const PlanRow& row : plan.rows) {
      if (row.position + row.length >= 75 && !hangs->exchange(true)) ++*num_hangs;
    }
    return !*hangs;
  };
  worker.before_abort = [hangs] {
    *hangs = false;
    return true;
  };
  StartServing(worker);
  std::vector<std::unique_ptr<Updates>> others;
  for (int i = 0; i < 5; ++i) {
    others.push_back(std::make_unique<Updates>());
    Submit(Request(std::string(20 + i, 'x'), 40), others[i].get());
  }
  Updates poison;
  Submit(Request("P" + std::string(69, 'x'), 120), &poison);
  ASSERT_TRUE(poison.WaitFinished());
  EXPECT_EQ(poison.last().error.code(), absl::StatusCode::kInternal);
  EXPECT_THAT(std::string(poison.last().error.message()), testing::HasSubstr("also alone"));
  EXPECT_EQ(poison.choice(0).text, Letters(70, 5));
  for (int i = 0; i < 5; ++i) {
    ASSERT_TRUE(others[i]->WaitFinished()) << llm_->Readiness().reason;
    EXPECT_TRUE(others[i]->last().error.ok()) << others[i]->last().error;
    EXPECT_EQ(others[i]->choice(0).text, Letters(20 + i, 40));
  }
  EXPECT_EQ(*num_hangs, PoisonGuard::kSuspiciousFaults + 1);
  EXPECT_EQ(Metric("wintserve:poison_requests_total"), "1");
  EXPECT_EQ(Metric("wintserve:group_faults_total{cause=\"deadline\"}"), "3");
}

// The stream of the one that hangs is all right, and no step runs that could be overdue.
TEST_F(HangTest, ARankThatDoesNotLetGoOfALostPoolIsEndedAndTheOthersStay) {
  options_.stall_timeout_ms = 500;
  FakeWorkerOptions hanging = SlowWorker(1);
  hanging.never_detached = true;
  hanging.before_abort = [] { return false; };
  StartTwo(SlowWorker(0), hanging);
  SubmitStreams();
  ASSERT_TRUE(streams_[0]->WaitForTokens(20));
  const uint64_t survivor = workers_[0]->hello().worker_id;
  cache_.Die();
  EXPECT_THAT(processes_.WaitForEnds(1), ElementsAre(Pair(1, workers_[1]->hello().worker_id)));
  EXPECT_EQ(processes_.num_at_fault(), 1);
  Kill(1);
  Replace(1, SlowWorker(1));
  ExpectStreamsAsWithoutFaults();
  EXPECT_EQ(cache_.num_pools(), 2u);
  EXPECT_EQ(workers_[0]->hello().worker_id, survivor);
}

// As above, while there is no group that could be given up: another rank has died.
TEST_F(HangTest, ARankThatDoesNotLetGoWhileAnotherIsAwaitedIsEnded) {
  options_.stall_timeout_ms = 500;
  FakeWorkerOptions hanging = SlowWorker(1);
  hanging.never_detached = true;
  StartTwo(SlowWorker(0), hanging);
  SubmitStreams();
  ASSERT_TRUE(streams_[0]->WaitForTokens(20));
  Kill(0);
  cache_.Die();
  EXPECT_THAT(processes_.WaitForEnds(1), ElementsAre(Pair(1, workers_[1]->hello().worker_id)));
  EXPECT_EQ(processes_.num_at_fault(), 1);
  Kill(1);
  Replace(0, SlowWorker(0));
  Replace(1, SlowWorker(1));
  ExpectStreamsAsWithoutFaults();
}

}  // namespace
}  // namespace wintserve
