// What a client sees when engine workers die, hang or disagree: the text of a run without faults.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <thread>

#include "api_server/llm/llm_recovery_test_util.h"

namespace wintserve {
namespace {

using std::chrono::milliseconds;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::Pair;

TEST_F(RecoveryTest, StreamsGoOnFromTheirKvWhenARankIsKilled) {
  for (const size_t rank : {0u, 1u}) {
    SCOPED_TRACE(rank);
    StartTwo();
    SubmitStreams();
    ASSERT_TRUE(streams_[0]->WaitForTokens(20));
    Kill(rank);
    ASSERT_TRUE(WaitFor([&] { return IsRecovering(); }));
    EXPECT_FALSE(llm_->Readiness().ready);
    EXPECT_THAT(llm_->Readiness().reason, HasSubstr("engine worker"));
    Replace(rank, SlowWorker(rank));
    ExpectStreamsAsWithoutFaults();
    EXPECT_TRUE(WaitUntilReady());
    EXPECT_EQ(workers_[1 - rank]->num_mappings(), 1);  // the survivor keeps what it maps
    EXPECT_EQ(cache_.num_pools(), 1u);
    EXPECT_NE(Metric("wintserve:resumed_sequences_total{from=\"kv\"}"), "0");
    EXPECT_EQ(Metric("wintserve:resumed_sequences_total{from=\"recompute\"}"), "0");
    EXPECT_EQ(Metric("wintserve:recovery_seconds_count"), "1");
    llm_.reset();
    workers_.clear();
    streams_.clear();
    registry_ = std::make_shared<prometheus::Registry>();
  }
}

TEST_F(RecoveryTest, ThePromptsLogprobsAreToldOnceAndAsWithoutFaultsWhenARankDiesInMidPrompt) {
  for (const bool kv_trusted : {true, false}) {
    SCOPED_TRACE(kv_trusted);
    std::atomic<int> num_steps = 0;
    FakeWorkerOptions dying = WorkerOptions();
    dying.before_step = [&](const StepPlan&) { return ++num_steps <= 2; };  // of 64 tokens each
    StartServing(std::move(dying));
    std::vector<PromptLogprobs> told;
    Updates updates;
    GenerationRequest request = Request(Letters(0, 190), 5);
    request.num_prompt_top_logprobs = 2;
    const auto collect = updates.Callback();
    ASSERT_TRUE(llm_->Submit(request,
                             [&, collect](GenerationUpdate update) {
                               if (update.prompt_logprobs.has_value()) {
                                 told.push_back(*update.prompt_logprobs);
                               }
                               collect(std::move(update));
                             })
                    .ok());
    ASSERT_TRUE(WaitFor([&] { return num_steps > 2; }));
    Kill(0, kv_trusted);
    Replace(0, WorkerOptions());
    ASSERT_TRUE(updates.WaitFinished()) << llm_->Readiness().reason;
    EXPECT_TRUE(updates.last().error.ok()) << updates.last().error;
    EXPECT_EQ(updates.choice(0).text, Letters(190, 5));
    ASSERT_EQ(told.size(), 1u);
    ASSERT_EQ(told[0].positions.size(), 189u);
    for (size_t i = 0; i < 189; ++i) {
      EXPECT_EQ(told[0].positions[i].logprob, -static_cast<float>(request.prompt_ids[i + 1]) / 100);
    }
    llm_.reset();
    workers_.clear();
    registry_ = std::make_shared<prometheus::Registry>();
  }
}

TEST_F(RecoveryTest, AtOneRankToo) {
  StartServing(SlowWorker());
  SubmitStreams();
  for (int kill = 0; kill < 5; ++kill) {
    ASSERT_TRUE(streams_[0]->WaitForTokens(10 + 15 * kill));
    Kill(0);
    Replace(0, SlowWorker());
  }
  ExpectStreamsAsWithoutFaults();
  EXPECT_EQ(std::stoi(Metric("wintserve:group_faults_total{cause=\"exit\"}")) +
                std::stoi(Metric("wintserve:group_faults_total{cause=\"stream\"}")),
            5);
}

// What a crashed process wrote last may be wrong, so all is computed again, from what had been
// committed before the last 256 steps.
TEST_F(RecoveryTest, AfterACrashEverythingIsComputedAgain) {
  StartTwo();
  SubmitStreams();
  ASSERT_TRUE(streams_[0]->WaitForTokens(20));
  Kill(1, /*kv_trusted=*/false);
  Replace(1, SlowWorker(1));
  ExpectStreamsAsWithoutFaults();
  EXPECT_EQ(Metric("wintserve:resumed_sequences_total{from=\"kv\"}"), "0");
  EXPECT_NE(Metric("wintserve:resumed_sequences_total{from=\"recompute\"}"), "0");
  // Nothing that was committed before is matched.
  EXPECT_EQ(cache_.num_pools(), 1u);
}

// It has left the group as it was told to; what is wrong with it is not known since when.
TEST_F(RecoveryTest, KvIsWrongAfterACrashOfASurvivorThatHasLeftItsGroup) {
  StartTwo();
  SubmitStreams();
  ASSERT_TRUE(streams_[0]->WaitForTokens(20));
  Kill(1);
  ASSERT_TRUE(WaitForReadiness([](const ReadinessReport& report) {
    return report.reason.find("1 of 2 connected") != std::string::npos;
  }));
  Kill(0, /*kv_trusted=*/false);
  Replace(0, SlowWorker(0));
  Replace(1, SlowWorker(1));
  ExpectStreamsAsWithoutFaults();
  EXPECT_NE(Metric("wintserve:resumed_sequences_total{from=\"recompute\"}"), "0");
}

// The plan hash cannot see a device that went wrong, the digest of the sampled ids does.
TEST_F(RecoveryTest, RanksThatWentOnWithDifferentTokensStartOver) {
  FakeWorkerOptions astray = SlowWorker(1);
  auto spoilt = std::make_shared<std::atomic<int>>(0);
  astray.spoil = [spoilt](StepDone* done) {
    if (++*spoilt == 30) done->sampled_digest ^= 1;
  };
  StartTwo(SlowWorker(0), astray);
  SubmitStreams();
  ExpectStreamsAsWithoutFaults();
  EXPECT_EQ(Metric("wintserve:group_faults_total{cause=\"divergence\"}"), "1");
  EXPECT_NE(Metric("wintserve:resumed_sequences_total{from=\"recompute\"}"), "0");
}

TEST_F(RecoveryTest, ARankThatRanAnotherPlanStartsOver) {
  FakeWorkerOptions astray = SlowWorker(0);
  auto spoilt = std::make_shared<std::atomic<int>>(0);
  astray.spoil = [spoilt](StepDone* done) {
    if (done->sampled.empty()) return;  // a step that only reads a part of a prompt
    if (++*spoilt == 10) done->plan_hash ^= 1;
  };
  StartTwo(astray, SlowWorker(1));
  SubmitStreams();
  ExpectStreamsAsWithoutFaults();
  EXPECT_EQ(Metric("wintserve:group_faults_total{cause=\"divergence\"}"), "1");
}

// Its weights are damaged: it goes wrong in every group, until it is another process.
TEST_F(RecoveryTest, RanksThatDisagreeAgainAreReplacedAndTheStreamsGoOn) {
  FakeWorkerOptions astray = SlowWorker(1);
  auto steps = std::make_shared<std::atomic<int>>(0);
  astray.spoil = [steps](StepDone* done) {
    if (++*steps % 20 == 0) done->sampled_digest ^= 1;
  };
  StartTwo(SlowWorker(0), astray);
  SubmitStreams();
  EXPECT_THAT(processes_.WaitForEnds(2), ElementsAre(Pair(0, 1), Pair(1, 2)));
  EXPECT_EQ(processes_.num_at_fault(), 2);
  ASSERT_TRUE(WaitFor([&] { return IsRecovering(); }));
  EXPECT_THAT(llm_->Readiness().reason, HasSubstr("every engine worker is replaced"));
  for (const size_t rank : {0u, 1u}) {
    Kill(rank, /*kv_trusted=*/false);
    Replace(rank, SlowWorker(rank));
  }
  ExpectStreamsAsWithoutFaults();
  EXPECT_EQ(Metric("wintserve:group_faults_total{cause=\"divergence\"}"), "2");
  EXPECT_EQ(Metric("wintserve:resumed_sequences_total{from=\"kv\"}"), "0");
}

TEST_F(RecoveryTest, AReportedFaultIsRecoveredFrom) {
  StartTwo();
  SubmitStreams();
  ASSERT_TRUE(streams_[0]->WaitForTokens(20));
  ASSERT_TRUE(workers_[1]->SendFault(FaultKind::kDevice, "an illegal address").ok());
  ASSERT_TRUE(WaitFor([&] { return IsRecovering(); }));
  EXPECT_THAT(llm_->Readiness().reason,
              HasSubstr("engine worker 1 reports a fault (device): an illegal address"));
  Kill(1);
  Replace(1, SlowWorker(1));
  ExpectStreamsAsWithoutFaults();
  EXPECT_EQ(Metric("wintserve:group_faults_total{cause=\"reported\"}"), "1");
  EXPECT_EQ(Metric("wintserve:resumed_sequences_total{from=\"kv\"}"), "0");
}

// The fence: plans of the new group must not meet a write of the old one.
TEST_F(RecoveryTest, NothingIsPlannedBeforeEveryRankHasLeftTheOldGroup) {
  auto may_leave = std::make_shared<std::atomic<bool>>(false);
  auto is_told = std::make_shared<std::atomic<bool>>(false);
  FakeWorkerOptions slow = SlowWorker(0);
  slow.before_abort = [may_leave, is_told] {
    *is_told = true;
    while (!*may_leave) std::this_thread::sleep_for(milliseconds(1));
    return true;
  };
  StartTwo(slow, SlowWorker(1));
  SubmitStreams();
  ASSERT_TRUE(streams_[0]->WaitForTokens(20));
  Kill(1);
  Replace(1, SlowWorker(1));
  ASSERT_TRUE(WaitFor([&] { return is_told->load(); }));
  std::this_thread::sleep_for(milliseconds(100));
  EXPECT_TRUE(IsRecovering());
  EXPECT_THAT(llm_->Readiness().reason,
              HasSubstr("waiting for engine workers to leave their group: 1 of 2 have"));
  *may_leave = true;
  ExpectStreamsAsWithoutFaults();
}

TEST_F(RecoveryTest, ARankThatDoesNotLeaveIsEndedAndReplaced) {
  FakeWorkerOptions deaf = SlowWorker(0);
  deaf.before_abort = [] { return false; };
  StartTwo(deaf, SlowWorker(1));
  SubmitStreams();
  ASSERT_TRUE(streams_[0]->WaitForTokens(20));
  Kill(1);
  Replace(1, SlowWorker(1));
  EXPECT_THAT(processes_.WaitForEnds(1), ElementsAre(Pair(0, 1)));
  Kill(0);
  Replace(0, SlowWorker(0));
  ExpectStreamsAsWithoutFaults();
}

// Its heartbeats and its stream are all right: only the step's deadline tells.
TEST_F(RecoveryTest, AStepThatHangsIsOverdue) {
  FakeWorkerOptions hanging = SlowWorker(1);
  auto steps = std::make_shared<std::atomic<int>>(0);
  hanging.before_step = [steps](const StepPlan&) { return ++*steps < 40 || *steps > 1000; };
  hanging.before_abort = [steps] {
    *steps = 1000;
    return true;
  };
  StartTwo(SlowWorker(0), hanging);
  SubmitStreams();
  ExpectStreamsAsWithoutFaults();
  EXPECT_EQ(Metric("wintserve:group_faults_total{cause=\"deadline\"}"), "1");
  EXPECT_EQ(Metric("wintserve:resumed_sequences_total{from=\"recompute\"}"), "0");
}

TEST_F(RecoveryTest, WithoutALauncherABrokenStreamIsEnoughButTheKvIsNotKept) {
  StartTwo();
  processes_.SetWatching(false);
  SubmitStreams();
  ASSERT_TRUE(streams_[0]->WaitForTokens(20));
  const auto start = std::chrono::steady_clock::now();
  workers_[1]->Kill();
  ASSERT_TRUE(WaitForMetric("wintserve:group_faults_total{cause=\"stream\"}", "1"));
  EXPECT_GE(std::chrono::steady_clock::now() - start, milliseconds(1900));
  Replace(1, SlowWorker(1));
  ExpectStreamsAsWithoutFaults();
  EXPECT_EQ(Metric("wintserve:resumed_sequences_total{from=\"kv\"}"), "0");
}

// A worker whose stream broke attaches anew by itself, with its weights and its pool.
TEST_F(RecoveryTest, AWorkerThatComesBackIsASurvivor) {
  StartTwo();
  SubmitStreams();
  ASSERT_TRUE(streams_[0]->WaitForTokens(20));
  workers_[1]->Kill();
  FakeWorkerOptions again = SlowWorker(1);
  again.hello.mapped_pool_epoch = 99;
  workers_[1] = std::make_unique<FakeWorker>(again);
  ExpectStreamsAsWithoutFaults();
  EXPECT_EQ(workers_[1]->num_mappings(), 0);
  EXPECT_EQ(Metric("wintserve:resumed_sequences_total{from=\"recompute\"}"), "0");
}

TEST_F(RecoveryTest, DeathsAtAnyMomentLoseNoToken) {
  StartTwo();
  SubmitStreams();
  for (int i = 0; i < 12; ++i) {
    std::this_thread::sleep_for(milliseconds(5 * i));
    const size_t rank = i % 3 == 0 ? 0 : 1;
    // Not more than twice a crash: with the third a request that got no token between would fail.
    Kill(rank, /*kv_trusted=*/i % 6 != 3);
    if (i % 5 == 4) {
      Kill(1 - rank);
      Replace(1 - rank, SlowWorker(1 - rank));
    }
    Replace(rank, SlowWorker(rank));
  }
  ExpectStreamsAsWithoutFaults();
}

TEST_F(RecoveryTest, TheCacheManagerAndARankMayDieTogether) {
  StartTwo();
  SubmitStreams();
  ASSERT_TRUE(streams_[0]->WaitForTokens(20));
  Kill(0);
  cache_.Die();
  std::this_thread::sleep_for(milliseconds(20));
  Replace(0, SlowWorker(0));
  ASSERT_TRUE(streams_[0]->WaitForTokens(60));
  cache_.Die();
  std::this_thread::sleep_for(milliseconds(3));
  Kill(1, /*kv_trusted=*/false);
  Replace(1, SlowWorker(1));
  ASSERT_TRUE(streams_[0]->WaitForTokens(90));
  cache_.DropSession();
  Kill(1, /*kv_trusted=*/false);
  Replace(1, SlowWorker(1));
  ExpectStreamsAsWithoutFaults();
}

// A rank dies while pools are replaced: it has let go of the lost one by that.
TEST_F(RecoveryTest, ARankMayDieInsteadOfLettingGoOfALostPool) {
  FakeWorkerOptions dying = SlowWorker(1);
  auto is_told = std::make_shared<std::atomic<bool>>(false);
  dying.before_detach = [is_told] {
    *is_told = true;
    std::this_thread::sleep_for(milliseconds(200));
  };
  dying.never_detached = true;
  StartTwo(SlowWorker(0), dying);
  SubmitStreams();
  ASSERT_TRUE(streams_[0]->WaitForTokens(20));
  cache_.Die();
  ASSERT_TRUE(WaitFor([&] { return is_told->load(); }));
  Kill(1);
  Replace(1, SlowWorker(1));
  ExpectStreamsAsWithoutFaults();
  EXPECT_EQ(cache_.num_pools(), 2u);
}

TEST_F(RecoveryTest, ARankThatDiesBeforeTheFirstGroupComputesIsWaitedFor) {
  options_.world_size = 2;
  Create();
  AddWorker(SlowWorker(0));
  FakeWorkerOptions second = SlowWorker(1);
  second.never_ready = true;
  AddWorker(second);
  ASSERT_TRUE(WaitForReason("engine worker 1 is warming up"));
  Kill(1);
  ASSERT_TRUE(WaitForReadiness([](const ReadinessReport& report) {
    return report.reason.find("waiting for engine workers: 1 of 2 connected") != std::string::npos;
  }));
  EXPECT_FALSE(IsRecovering());  // no request is taken before it was ready for the first time
  Replace(1, SlowWorker(1));
  ASSERT_TRUE(WaitUntilReady());
  SubmitStreams();
  ExpectStreamsAsWithoutFaults();
}

// Its stream is all right, and it may beat as ever.
TEST_F(RecoveryTest, ARankThatHangsBeforeItIsReadyIsEndedForAFaultOfItsOwn) {
  options_.world_size = 2;
  options_.stall_timeout_ms = 300;
  Create();
  AddWorker(SlowWorker(0));
  FakeWorkerOptions hanging = SlowWorker(1);
  hanging.never_ready = true;
  hanging.before_abort = [] { return false; };
  AddWorker(hanging);
  EXPECT_THAT(processes_.WaitForEnds(1), ElementsAre(Pair(1, workers_[1]->hello().worker_id)));
  EXPECT_EQ(processes_.num_at_fault(), 1);
  Kill(1);
  Replace(1, SlowWorker(1));
  ASSERT_TRUE(WaitUntilReady()) << llm_->Readiness().reason;
  EXPECT_EQ(Metric("wintserve:group_faults_total{cause=\"stall\"}"), "1");
  SubmitStreams();
  ExpectStreamsAsWithoutFaults();
}

TEST_F(RecoveryTest, ARankThatGetsFurtherIsWaitedFor) {
  options_.stall_timeout_ms = 1000;
  Create();
  FakeWorkerOptions slow = SlowWorker();
  slow.never_ready = true;
  AddWorker(slow);
  ASSERT_TRUE(WaitForReason("engine worker 0 is warming up"));
  for (uint64_t progress = 1; progress <= 60; ++progress) {
    ASSERT_TRUE(workers_[0]->SendProgress(progress).ok());
    std::this_thread::sleep_for(milliseconds(50));
  }
  EXPECT_EQ(Metric("wintserve:group_faults_total{cause=\"stall\"}"), "0");
  // Beats alone are no progress.
  ASSERT_TRUE(WaitFor([&] {
    EXPECT_TRUE(workers_[0]->SendProgress(60).ok());
    return Metric("wintserve:group_faults_total{cause=\"stall\"}") == "1";
  }));
}

TEST_F(RecoveryTest, RequestsThatComeMeanwhileWait) {
  StartServing(SlowWorker());
  Kill(0);
  ASSERT_TRUE(WaitFor([&] { return IsRecovering(); }));
  SubmitStreams();
  std::this_thread::sleep_for(milliseconds(50));
  EXPECT_EQ(streams_[0]->choice(0).num_tokens, 0);
  Replace(0, SlowWorker());
  ExpectStreamsAsWithoutFaults();
}

TEST_F(RecoveryTest, NobodyWaitsLongerThanTheFaultHold) {
  options_.fault_hold_ms = 300;
  StartServing(SlowWorker());
  Updates running;
  Submit(Request("abc", 150), &running);
  ASSERT_TRUE(running.WaitForTokens(3));
  Kill(0);
  ASSERT_TRUE(WaitFor([&] { return IsRecovering(); }));
  std::this_thread::sleep_for(milliseconds(100));
  Updates late;
  const auto start = std::chrono::steady_clock::now();
  Submit(Request("abc", 30), &late);
  ASSERT_TRUE(running.WaitFinished());
  EXPECT_EQ(running.last().error.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(running.last().error.message()), HasSubstr("have not recovered within"));
  EXPECT_FALSE(late.last().finished);
  ASSERT_TRUE(late.WaitFinished());
  EXPECT_EQ(late.last().error.code(), absl::StatusCode::kUnavailable);
  EXPECT_GE(std::chrono::steady_clock::now() - start, milliseconds(300));
  Replace(0, SlowWorker());
  ASSERT_TRUE(WaitUntilReady());
  SubmitStreams();
  ExpectStreamsAsWithoutFaults();
}

// The engine finds the last step done and the group lost at one look.
TEST_F(RecoveryTest, ARequestThatFinishedWithTheLastStepOfAGroupHasNotFailed) {
  options_.fault_hold_ms = 0;
  FakeWorkerOptions faulty = WorkerOptions();
  std::atomic<int> num_steps = 0;
  faulty.after_step = [&] {
    if (num_steps == 3) (void)workers_[0]->SendFault(FaultKind::kDevice, "hot");
    ++num_steps;
  };
  StartServing(faulty);
  Updates updates;
  Gate gate;
  const auto handle = llm_->Submit(Request("abc", 4),
                                   [&, tell = updates.Callback()](const GenerationUpdate& update) {
                                     tell(update);
                                     if (update.num_completion_tokens == 3)
                                       gate.Pass();  // the engine's thread, too
                                   });
  ASSERT_TRUE(handle.ok());
  ASSERT_TRUE(WaitFor([&] { return num_steps == 4; }));
  std::this_thread::sleep_for(milliseconds(100));  // both have come
  gate.Open();
  ASSERT_TRUE(updates.WaitFinished());
  EXPECT_TRUE(updates.last().error.ok()) << updates.last().error;
  EXPECT_EQ(updates.choice(0).text, Letters(3, 4));
  EXPECT_EQ(updates.choice(0).finish, FinishReason::kLength);
}

// Whoever runs a prompt that begins with 'P' crashes at its 75th token.
TEST_F(RecoveryTest, APoisonRequestFailsAloneAndTheOthersFinish) {
  auto must_die = std::make_shared<std::atomic<bool>>(false);
  const auto poisoned = [&] {
    FakeWorkerOptions worker = SlowWorker();
    worker.next_token = [must_die](const std::vector<int32_t>& history) {
      if (history[0] == FakeTokenizer::IdOfByte('P') && history.size() == 75) {
        *must_die = true;
        while (*must_die) std::this_thread::sleep_for(milliseconds(1));
      }
      return NextLetter(history);
    };
    return worker;
  };
  StartServing(poisoned());
  SubmitStreams();
  Updates poison;
  Submit(Request("P" + std::string(69, 'x'), 120), &poison);
  int num_deaths = 0;
  while (!poison.last().finished && num_deaths < 10) {
    ASSERT_TRUE(WaitFor([&] { return must_die->load() || poison.last().finished; }));
    if (!*must_die) break;
    ++num_deaths;
    workers_[0]->Kill();
    *must_die = false;
    processes_.TellExit(0, workers_[0]->hello().worker_id, /*kv_trusted=*/false);
    Replace(0, poisoned());
  }
  ASSERT_TRUE(poison.WaitFinished());
  EXPECT_EQ(poison.last().error.code(), absl::StatusCode::kInternal);
  EXPECT_EQ(poison.choice(0).text, Letters(70, 5));
  EXPECT_EQ(num_deaths, 3);
  ExpectStreamsAsWithoutFaults();
  EXPECT_EQ(Metric("wintserve:poison_requests_total"), "1");
}

// The workers of an API server that has died attach to the next one, which finds their KV cached;
// the pool also if some of them have died as well, or all. But nobody knows how those have ended,
// so that nothing in it is trusted.
TEST_F(RecoveryTest, AnotherApiServerTakesOverWorkersAndPool) {
  for (const uint32_t num_left : {2u, 1u, 0u}) {
    SCOPED_TRACE(num_left);
    StartTwo();
    const std::string prompt(130, static_cast<char>('k' + num_left));
    const auto ask = [this](const std::string& text, int max_tokens) {
      Updates updates;
      Submit(Request(text, max_tokens), &updates);
      EXPECT_TRUE(updates.WaitFinished());
      EXPECT_EQ(updates.choice(0).text, Letters(static_cast<int>(text.size()), max_tokens));
      return updates.last().num_cached_tokens;
    };
    ask(prompt, 30);
    llm_.reset();
    for (auto& worker : workers_) worker->WaitForShutdown();
    workers_.clear();
    registry_ = std::make_shared<prometheus::Registry>();
    Create();
    for (const uint32_t rank : {0u, 1u}) {
      FakeWorkerOptions again = SlowWorker(rank);
      if (rank < num_left) again.hello.mapped_pool_epoch = 99;
      // As on a GPU that the pool fills.
      if (rank >= num_left) again.hello.kv_bytes_available = 0;
      AddWorker(again);
    }
    ASSERT_TRUE(WaitUntilReady()) << llm_->Readiness().reason;
    EXPECT_EQ(cache_.num_pools(), 1u);
    for (const uint32_t rank : {0u, 1u}) {
      EXPECT_EQ(workers_[rank]->num_mappings(), rank < num_left ? 0 : 1);
    }
    EXPECT_EQ(ask(prompt, 30), num_left == 2 ? 128 : 0);
    llm_.reset();
    workers_.clear();
    registry_ = std::make_shared<prometheus::Registry>();
  }
}

// The checkpoint was exchanged while the instance ran.
TEST_F(RecoveryTest, AReplacementWithAnotherModelStopsTheEngine) {
  StartServing();
  Kill(0);
  FakeWorkerOptions other = WorkerOptions();
  ++other.hello.weights_digest;
  Replace(0, other);
  expected_fatal_ =
      "engine worker 0: came back with another model than it had before: weights_digest 8, it was "
      "7";
  EXPECT_EQ(WaitForFatal(), expected_fatal_);
}

// The last steps of a rank that crashes then are those of the API server before, whose numbers say
// nothing about how long they are past.
TEST_F(RecoveryTest, ACrashSoonAfterATakeoverMakesWhatWasComputedBeforeWrong) {
  StartTwo();
  const std::string prompt(130, 'x');
  Updates first;
  Submit(Request(prompt, 30), &first);
  ASSERT_TRUE(first.WaitFinished());
  llm_.reset();
  for (auto& worker : workers_) worker->WaitForShutdown();
  workers_.clear();
  registry_ = std::make_shared<prometheus::Registry>();
  Create();
  for (const uint32_t rank : {0u, 1u}) {
    FakeWorkerOptions again = SlowWorker(rank);
    again.hello.mapped_pool_epoch = 99;
    AddWorker(again);
  }
  ASSERT_TRUE(WaitUntilReady()) << llm_->Readiness().reason;
  Updates second;
  Submit(Request(prompt, 30), &second);
  ASSERT_TRUE(second.WaitForTokens(10));
  EXPECT_EQ(second.last().num_cached_tokens, 128);
  Kill(1, /*kv_trusted=*/false);
  Replace(1, SlowWorker(1));
  ASSERT_TRUE(second.WaitFinished());
  EXPECT_EQ(second.choice(0).text, Letters(130, 30));
  EXPECT_EQ(cache_.num_pools(), 1u);
  EXPECT_EQ(cache_.stats().device_hit_tokens, 128u);  // none when it was computed again
}

TEST_F(RecoveryTest, WithoutTheirPoolWorkersOfAnotherApiServerGetANewOne) {
  options_.world_size = 2;
  Create();
  for (const uint32_t rank : {0u, 1u}) {
    FakeWorkerOptions again = SlowWorker(rank);
    again.hello.mapped_pool_epoch = 7;
    AddWorker(again);
  }
  ASSERT_TRUE(WaitUntilReady()) << llm_->Readiness().reason;
  EXPECT_EQ(cache_.num_pools(), 1u);
  EXPECT_EQ(workers_[0]->num_mappings(), 1);
  SubmitStreams();
  ExpectStreamsAsWithoutFaults();
}

}  // namespace
}  // namespace wintserve
