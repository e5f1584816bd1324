#include "api_server/llm/step_tracker.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "api_server/work_queue/messages.h"

namespace wintserve {
namespace {

using testing::HasSubstr;

constexpr uint64_t kEpoch = 5;

StepPlan Plan(uint64_t step, const std::vector<uint32_t>& row_lengths = {1}) {
  StepPlan plan{.group_epoch = kEpoch, .step = step};
  for (const uint32_t length : row_lengths) plan.rows.push_back({.length = length});
  return plan;
}

// Of a step that has sampled `ids`.
StepDone Done(uint64_t step, uint64_t hash, uint32_t execute_us = 0,
              const std::vector<int32_t>& ids = {}) {
  return {.group_epoch = kEpoch,
          .step = step,
          .plan_hash = hash,
          .execute_us = execute_us,
          .sampled_digest = SampledDigest(ids)};
}

TEST(StepTracker, AStepIsFinishedOnceEveryRankHasDoneItAndTheStepsBefore) {
  StepTracker tracker(2, kEpoch);
  tracker.Add(Plan(1), 11, 0);
  tracker.Add(Plan(2), 12, 0);
  ASSERT_TRUE(tracker.Take(0, Done(1, 11)).ok());
  ASSERT_TRUE(tracker.Take(0, Done(2, 12)).ok());  // the fast rank is a step ahead
  EXPECT_FALSE(tracker.TakeFinished(1)->has_value());
  ASSERT_TRUE(tracker.Take(1, Done(1, 11)).ok());
  EXPECT_EQ(tracker.TakeFinished(2)->value().step, 1u);
  EXPECT_FALSE(tracker.TakeFinished(2)->has_value());
  EXPECT_FALSE(tracker.idle());
  ASSERT_TRUE(tracker.Take(1, Done(2, 12)).ok());
  EXPECT_EQ(tracker.TakeFinished(3)->value().step, 2u);
  EXPECT_TRUE(tracker.idle());
}

TEST(StepTracker, CountsAsRunningTheTimeAfterTheStepBefore) {
  StepTracker tracker(1, kEpoch);
  tracker.Add(Plan(1, {7, 1}), 11, 100);
  tracker.Add(Plan(2), 12, 150);  // queued at the worker until step 1 is done
  ASSERT_TRUE(tracker.Take(0, Done(1, 11, 40)).ok());
  const FinishedStep first = **tracker.TakeFinished(200);
  EXPECT_EQ(first.running_us, 100);
  EXPECT_EQ(first.latency_us, 100);
  EXPECT_EQ(first.execute_us, 40u);
  EXPECT_EQ(first.num_sequences, 2);
  EXPECT_EQ(first.num_tokens, 8);
  ASSERT_TRUE(tracker.Take(0, Done(2, 12)).ok());
  const FinishedStep second = **tracker.TakeFinished(230);
  EXPECT_EQ(second.running_us, 30);
  EXPECT_EQ(second.latency_us, 80);
  tracker.Add(Plan(3), 13, 500);  // the workers were idle
  ASSERT_TRUE(tracker.Take(0, Done(3, 13)).ok());
  EXPECT_EQ((**tracker.TakeFinished(510)).running_us, 10);
}

TEST(StepTracker, TheSlowestRankSaysHowLongAStepTook) {
  StepTracker tracker(2, kEpoch);
  tracker.Add(Plan(1), 11, 0);
  StepDone done = Done(1, 11, 40, {77});
  done.sampled = {{3, 77}};
  ASSERT_TRUE(tracker.Take(0, done).ok());
  ASSERT_TRUE(tracker.Take(1, Done(1, 11, 90, {77})).ok());
  const FinishedStep step = **tracker.TakeFinished(100);
  EXPECT_EQ(step.execute_us, 90u);
  ASSERT_EQ(step.sampled.size(), 1u);
  EXPECT_EQ(step.sampled[0].token, 77);
}

// Numbers count on over groups; those of a new group begin anywhere.
TEST(StepTracker, TheFirstPlanSaysWhereTheNumbersBegin) {
  StepTracker tracker(2, kEpoch);
  EXPECT_EQ(tracker.last_finished_step(), 0u);
  tracker.Add(Plan(7000), 11, 0);
  EXPECT_EQ(tracker.last_finished_step(), 6999u);
  tracker.Add(Plan(7001), 12, 0);
  ASSERT_TRUE(tracker.Take(0, Done(7000, 11)).ok());
  ASSERT_TRUE(tracker.Take(0, Done(7001, 12)).ok());
  EXPECT_FALSE(tracker.Take(1, Done(7001, 12)).ok());
  EXPECT_FALSE(tracker.Take(1, Done(1, 11)).ok());
  ASSERT_TRUE(tracker.Take(1, Done(7000, 11)).ok());
  EXPECT_EQ(tracker.TakeFinished(1)->value().step, 7000u);
  EXPECT_EQ(tracker.last_finished_step(), 7000u);
  ASSERT_TRUE(tracker.Take(1, Done(7001, 12)).ok());
  EXPECT_EQ(tracker.TakeFinished(1)->value().step, 7001u);
}

TEST(StepTracker, SaysWhatRunsSinceWhenAndWhoIsMissing) {
  StepTracker tracker(2, kEpoch);
  EXPECT_FALSE(tracker.running().has_value());
  StepPlan plan = Plan(1, {1, 30, 1});
  plan.copies.resize(4);
  tracker.Add(plan, 11, 100);
  tracker.Add(Plan(2), 12, 150);
  ASSERT_TRUE(tracker.Take(0, Done(1, 11)).ok());
  const RunningStep running = *tracker.running();
  EXPECT_EQ(running.step, 1u);
  EXPECT_EQ(running.shape,
            (StepShape{.num_decodes = 2, .num_prefill_tokens = 30, .num_copies = 4}));
  EXPECT_EQ(running.began_us, 100);
  EXPECT_EQ(running.missing_rank, 1u);
  ASSERT_TRUE(tracker.Take(1, Done(1, 11)).ok());
  EXPECT_EQ((**tracker.TakeFinished(180)).shape, running.shape);
  EXPECT_EQ(tracker.running()->began_us, 180);
  tracker.RestartClock(900);
  EXPECT_EQ(tracker.running()->began_us, 900);
}

TEST(StepTracker, RefusesAStepThatIsNotTheNextOfThatRank) {
  StepTracker tracker(2, kEpoch);
  EXPECT_THAT(std::string(tracker.Take(1, Done(1, 0)).message()),
              HasSubstr("engine worker 1 reports step 1 of group epoch 5 done; it was sent steps "
                        "up to 0 of 5 and has done 0"));
  tracker.Add(Plan(1), 11, 0);
  tracker.Add(Plan(2), 12, 0);
  EXPECT_FALSE(tracker.Take(1, Done(2, 12)).ok());
  StepDone other_epoch = Done(1, 11);
  other_epoch.group_epoch = 4;
  EXPECT_FALSE(tracker.Take(1, other_epoch).ok());
  ASSERT_TRUE(tracker.Take(1, Done(1, 11)).ok());
  EXPECT_FALSE(tracker.Take(1, Done(1, 11)).ok());  // twice
}

TEST(StepTracker, NamesTheRankThatRanAnotherPlan) {
  StepTracker tracker(2, kEpoch);
  tracker.Add(Plan(1), 11, 0);
  EXPECT_EQ(tracker.Take(1, Done(1, 12)).message(),
            "engine worker 1 ran another plan as step 1: hash 000000000000000c, sent was "
            "000000000000000b");
}

// What TakeFinished says of a step of two ranks, of which rank 0 tells the token 77.
std::string Verdict(uint64_t digest_of_0, uint64_t digest_of_1) {
  StepTracker tracker(2, kEpoch);
  tracker.Add(Plan(1), 11, 0);
  StepDone first = Done(1, 11);
  first.sampled = {{3, 77}};
  first.sampled_digest = digest_of_0;
  StepDone second = Done(1, 11);
  second.sampled_digest = digest_of_1;
  EXPECT_TRUE(tracker.Take(0, first).ok());
  EXPECT_TRUE(tracker.Take(1, second).ok());
  return std::string(tracker.TakeFinished(1).status().message());
}

TEST(StepTracker, NamesTheRankThatWentOnWithOtherTokens) {
  const std::vector<int32_t> told = {77};
  const uint64_t digest = SampledDigest(told);
  EXPECT_EQ(Verdict(digest, digest), "");
  EXPECT_THAT(Verdict(digest, digest + 1),
              HasSubstr("engine workers 0 and 1 went on with different tokens after step 1"));
  EXPECT_EQ(Verdict(digest, 0),
            "engine worker 1 does not say which tokens it went on with after step 1");
  EXPECT_EQ(Verdict(0, 0),
            "engine worker 0 does not say which tokens it went on with after step 1");
  EXPECT_THAT(Verdict(digest + 1, digest + 1),
              HasSubstr("engine worker 0 tells other tokens of step 1 than it went on with"));
}

}  // namespace
}  // namespace wintserve
