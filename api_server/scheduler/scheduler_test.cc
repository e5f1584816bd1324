#include "api_server/scheduler/scheduler.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>

#include "api_server/scheduler/scheduler_test_util.h"

namespace wintserve {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::SizeIs;

constexpr int32_t kWord = 50;

TEST(Scheduler, PlansThePromptOnceAndThenOneTokenAStepFromTheSlot) {
  FakeWorld world({.async_depth = 0});
  const uint64_t id = world.Submit(/*prompt_len=*/3, /*max_tokens=*/3);
  const StepPlan first = NextPlan(&world);
  EXPECT_EQ(first.step, 1u);
  ASSERT_THAT(first.slot_init, SizeIs(1));
  EXPECT_THAT(first.slot_init[0].block_table, SizeIs(1));
  ASSERT_THAT(first.rows, SizeIs(1));
  EXPECT_THAT(first.rows[0].tokens, ElementsAre(100, 101, 102));
  EXPECT_TRUE(first.rows[0].sample);
  world.FinishPlan();
  const StepPlan second = NextPlan(&world);
  EXPECT_THAT(second.slot_init, IsEmpty());
  EXPECT_EQ(second.rows.at(0).position, 3u);
  EXPECT_THAT(second.rows.at(0).tokens, IsEmpty());
  EXPECT_THAT(second.slot_release, IsEmpty());
  world.FinishPlan();
  // The last row is known ahead, and with it the slot is free again.
  EXPECT_THAT(NextPlan(&world).slot_release, ElementsAre(first.rows[0].slot));
  const auto tokens = world.FinishPlan();
  ASSERT_THAT(tokens, SizeIs(1));
  EXPECT_EQ(tokens[0].end, SequenceEnd::kLength);
  world.RunToEnd();
  EXPECT_THAT(world.tokens(id), SizeIs(3));
  world.ExpectAllBlocksBack();
  world.ExpectAllTokens();
}

TEST(Scheduler, AsyncDepthOneSendsADecodeBeforeItsTokenIsKnownAndNoneBeyondMaxTokens) {
  FakeWorld world({.async_depth = 1});
  world.Submit(3, 2);
  world.Settle();
  ASSERT_THAT(world.plans(), SizeIs(2));
  EXPECT_EQ(world.plans()[1].rows.at(0).position, 3u);
  EXPECT_THAT(world.plans()[1].rows.at(0).tokens, IsEmpty());
  world.FinishPlan();
  world.Settle();
  EXPECT_THAT(world.plans(), SizeIs(1));  // nothing follows the second token
  world.RunToEnd();
  EXPECT_EQ(world.scheduler().stats().overshoot_rows, 0u);
  world.ExpectAllTokens();
}

TEST(Scheduler, AStopTokenAtDepthOneMakesTheNextRowAnOvershootWhoseTokenIsDropped) {
  FakeWorld world({.max_num_seqs = 1, .async_depth = 1});
  ASSERT_TRUE(world.Submit({.id = 1, .prompt_ids = Prompt(64), .max_tokens = 10}).ok());
  world.Settle();
  ASSERT_THAT(world.plans(), SizeIs(2));
  world.forced_token = kEos;
  const auto tokens = world.FinishPlan();
  ASSERT_THAT(tokens, SizeIs(1));
  EXPECT_EQ(tokens[0].end, SequenceEnd::kStop);
  world.Submit(3, 1);
  world.Settle();
  ASSERT_THAT(world.plans(), SizeIs(2));
  EXPECT_THAT(world.plans()[1].slot_release, ElementsAre(0u));
  EXPECT_THAT(world.plans()[1].rows, IsEmpty());
  EXPECT_THAT(world.FinishPlan(), IsEmpty());  // the overshoot
  EXPECT_EQ(world.scheduler().stats().overshoot_rows, 1u);
  world.Settle();
  EXPECT_THAT(world.plans().back().slot_init, SizeIs(1));  // in the plan after the release
  world.forced_token = kWord;
  world.RunToEnd();
  world.ExpectAllBlocksBack();
}

TEST(Scheduler, StopTokensCountFromMinTokensOnAndNotAtAllWithIgnoreEos) {
  struct Case {
    const char* name;
    int min_tokens;
    bool ignore_eos;
    size_t length;
    SequenceEnd end;
    std::vector<int32_t> stop_tokens = {};
    int32_t token = kEos;
  };
  for (const Case& c :
       {Case{"plain", 0, false, 1, SequenceEnd::kStop},
        Case{"min_tokens 3", 3, false, 4, SequenceEnd::kStop},
        Case{"ignore_eos", 0, true, 5, SequenceEnd::kLength},
        Case{"a stop on the last place", 4, false, 5, SequenceEnd::kStop},
        Case{"a stop token", 0, false, 1, SequenceEnd::kStop, {9, 8}, 8},
        Case{"a stop token with ignore_eos", 2, true, 3, SequenceEnd::kStop, {8}, 8},
        Case{"another token", 0, false, 5, SequenceEnd::kLength, {9}, 8}}) {
    SCOPED_TRACE(c.name);
    FakeWorld world({.async_depth = 0});
    world.forced_token = c.token;
    ASSERT_TRUE(world
                    .Submit({.id = 1,
                             .prompt_ids = Prompt(7),
                             .max_tokens = 5,
                             .min_tokens = c.min_tokens,
                             .ignore_eos = c.ignore_eos,
                             .stop_tokens = c.stop_tokens})
                    .ok());
    const StepPlan plan = NextPlan(&world);
    EXPECT_EQ(plan.slot_init.at(0).sampling.first_stop_position, 7u + c.min_tokens);
    std::vector<SequenceToken> all;
    for (int i = 0; i < 10; ++i) {
      world.Settle();
      if (world.plans().empty()) break;
      for (const SequenceToken& token : world.FinishPlan()) all.push_back(token);
    }
    ASSERT_THAT(all, SizeIs(c.length));
    EXPECT_EQ(all.back().end, c.end);
  }
}

TEST(ChunkedPrefill, UsesTheWholeBudgetWhileNothingDecodesAndTheFloorBesideUnmeasuredDecodes) {
  FakeWorld world({.max_num_batched_tokens = 64, .async_depth = 0});
  world.Submit(150, 100);
  for (const auto& [length, sample] :
       std::vector<std::pair<int, bool>>{{64, 0}, {64, 0}, {22, 1}}) {
    const StepPlan plan = NextPlan(&world);
    EXPECT_THAT(RowLengths(plan), ElementsAre(length));
    EXPECT_EQ(plan.rows.at(0).sample, sample);
    world.FinishPlan(/*step_us=*/0);  // not measured
  }
  world.SubmitPrompt(Prompt(100, 500), 5);
  world.Settle();
  world.FinishPlan(0);  // made before it came
  EXPECT_THAT(RowLengths(NextPlan(&world)), ElementsAre(1, 64 / 8));
}

TEST(ChunkedPrefill, MeasuredStepTimesSizeTheChunkBesideDecodes) {
  FakeWorld world({.max_num_batched_tokens = 256, .async_depth = 0, .max_step_slowdown = 3});
  world.Submit(100, 100);
  NextPlan(&world);
  world.FinishPlan(/*step_us=*/100 * 50);  // 50 us a token
  NextPlan(&world);
  world.FinishPlan(/*step_us=*/2000);
  world.SubmitPrompt(Prompt(200, 500), 5);
  world.Settle();
  world.FinishPlan(2000);
  // (3 - 1) * 2000 us / 50 us
  EXPECT_THAT(RowLengths(NextPlan(&world)), ElementsAre(1, 80));
}

// The floor of the prefill share yields to the decodes.
TEST(ChunkedPrefill, TheFloorYieldsWhenDecodesFillTheBudget) {
  FakeWorld world({.max_num_seqs = 20,
                   .max_num_batched_tokens = 20,
                   .async_depth = 0,
                   .prefix_caching = false});
  for (int i = 0; i < 19; ++i) world.Submit(1, 50);
  world.Settle();
  world.FinishPlan(0);
  world.Submit(60, 5);
  world.Settle();
  world.FinishPlan(0);
  const StepPlan plan = NextPlan(&world);
  ASSERT_THAT(plan.rows, SizeIs(20));      // all 19 decodes, and
  EXPECT_EQ(plan.rows.back().length, 1u);  // one place is left of a floor of 20 / 8 = 2
}

TEST(ChunkedPrefill, AShortPromptPassesTheSecondLongOne) {
  FakeWorld world({.max_num_batched_tokens = 32,
                   .async_depth = 0,
                   .prefix_caching = false,
                   .max_partial_prefills = 2,
                   .max_long_partial_prefills = 1,
                   .long_prefill_token_threshold = 16});
  world.Submit(100, 5);
  const uint64_t second = world.Submit(100, 5);
  const uint64_t third = world.Submit(10, 5);
  const StepPlan plan = NextPlan(&world);
  EXPECT_THAT(RowLengths(plan), ElementsAre(16, 10));
  EXPECT_FALSE(world.started().contains({second, 0}));
  EXPECT_TRUE(world.started().contains({third, 0}));
}

TEST(WholePrompts, APromptBeyondTheBudgetRunsAloneAndDecodesGetEverySecondStep) {
  FakeWorld world({.max_num_seqs = 4,
                   .max_num_batched_tokens = 20,
                   .async_depth = 0,
                   .chunked_prefill = false,
                   .prefix_caching = false});
  world.Submit(5, 20);
  world.Settle();
  world.FinishPlan();
  world.Submit(50, 20);
  world.Submit(60, 20);
  world.Settle();
  world.FinishPlan();  // a decode, during which the leases come in
  std::vector<std::vector<int>> steps;
  for (int i = 0; i < 4; ++i) {
    steps.push_back(RowLengths(NextPlan(&world)));
    world.FinishPlan();
  }
  EXPECT_THAT(steps, ElementsAre(ElementsAre(50), ElementsAre(1, 1), ElementsAre(60),
                                 ElementsAre(1, 1, 1)));
}

TEST(WholePrompts, RunBesideTheDecodesWithinTheBudget) {
  FakeWorld world({.max_num_seqs = 8,
                   .max_num_batched_tokens = 20,
                   .async_depth = 0,
                   .chunked_prefill = false,
                   .prefix_caching = false});
  for (int i = 0; i < 4; ++i) world.Submit(9, 10);
  EXPECT_THAT(RowLengths(NextPlan(&world)), ElementsAre(9, 9));
  world.FinishPlan();
  EXPECT_THAT(RowLengths(NextPlan(&world)), ElementsAre(1, 1, 9, 9));
}

TEST(Scheduler, RefusesARequestThatCanNeverFitThePool) {
  FakeWorld world({.num_blocks = 2});
  const absl::Status status = world.Submit({.id = 1, .prompt_ids = Prompt(100), .max_tokens = 40});
  EXPECT_EQ(status,
            absl::InvalidArgumentError("the request needs 3 KV blocks for 100 prompt tokens "
                                       "and max_tokens 40, the pool has 2"));
  EXPECT_EQ(world.scheduler().stats().num_waiting, 0);
}

TEST(Scheduler, RefusesAResultThatDoesNotFitThePlanAndChangesNothing) {
  struct Case {
    uint64_t step;
    std::vector<SampledToken> sampled;
    const char* error;
  };
  const Case cases[] = {
      {2, {{0, 5}}, "step 2 is reported done, next in flight is 1"},
      {1, {}, "step 1 sampled 0 tokens, its plan asks for 1"},
      {1, {{3, 5}}, "sampled token 5 in slot 3, expected one below 1000 in slot 0"},
      {1, {{0, 1000}}, "sampled token 1000 in slot 0, expected one below 1000 in slot 0"},
  };
  for (const Case& bad : cases) {
    FakeWorld world({});
    world.Submit(3, 5);
    world.Settle();
    const absl::Status status =
        world.scheduler().OnStepDone(bad.step, bad.sampled, 1000, 0).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
    EXPECT_THAT(std::string(status.message()), HasSubstr(bad.error));
    world.RunToEnd();
    world.ExpectAllTokens();
  }
}

TEST(Scheduler, CancelledChoicesReportNoMoreAndFreeTheirSlotWithTheNextPlan) {
  FakeWorld world({.max_num_seqs = 1, .async_depth = 1});
  const uint64_t id = world.Submit(3, 10);
  world.Settle();
  ASSERT_THAT(world.plans(), SizeIs(2));
  world.Cancel(id);
  EXPECT_THAT(world.FinishPlan(), IsEmpty());
  world.Settle();
  EXPECT_THAT(world.plans().back().slot_release, ElementsAre(0u));
  world.RunToEnd();
  world.ExpectAllBlocksBack();
}

TEST(Scheduler, StatsTakeNoLongerWithALongQueue) {
  const auto best_of = [](int num_waiting) {
    Scheduler scheduler({.num_blocks = 100});
    for (int i = 1; i <= num_waiting; ++i) {
      const auto id = static_cast<uint64_t>(i);
      EXPECT_TRUE(scheduler.Submit({.id = id, .prompt_ids = {5}, .max_tokens = 1}, 0).ok());
    }
    auto best = std::chrono::steady_clock::duration::max();
    for (int attempt = 0; attempt < 5; ++attempt) {
      const auto start = std::chrono::steady_clock::now();
      for (int i = 0; i < 100; ++i) EXPECT_EQ(scheduler.stats().num_waiting, num_waiting);
      best = std::min(best, std::chrono::steady_clock::now() - start);
    }
    return best;
  };
  // Were it linear, the ratio would be in the thousands.
  EXPECT_LT(best_of(20'000), 50 * best_of(1));
}

TEST(Scheduler, StatsCountAPreemptedSequenceAndItsTokensAmongTheWaiting) {
  FakeWorld world({.max_num_seqs = 2,
                   .max_num_batched_tokens = 64,
                   .block_size_tokens = 4,
                   .num_blocks = 8,
                   .async_depth = 1});
  world.SubmitPrompt(Prompt(9), 20);
  const uint64_t latest = world.SubmitPrompt(Prompt(9, 500), 20);
  for (int i = 0; i < 200 && world.scheduler().stats().preemptions == 0; ++i) {
    world.Settle();
    if (world.scheduler().stats().preemptions == 0) world.FinishPlan();
  }
  // Its plan is in flight: a token of it is still to come.
  const auto expect_all = [&] {
    const SchedulerStats stats = world.scheduler().stats();
    EXPECT_EQ(stats.num_waiting, 1);
    EXPECT_EQ(stats.num_waiting_tokens, 9 + static_cast<int64_t>(world.tokens(latest).size()));
  };
  expect_all();
  const size_t num_tokens = world.tokens(latest).size();
  world.FinishPlan();
  EXPECT_EQ(world.tokens(latest).size(), num_tokens + 1);
  expect_all();
  world.Cancel(latest);
  EXPECT_EQ(world.scheduler().stats().num_waiting, 0);
  EXPECT_EQ(world.scheduler().stats().num_waiting_tokens, 0);
  world.RunToEnd();
  world.ExpectAllBlocksBack();
}

// The scheduler runs beside 300 us of messages a step; it is to stay far below that.
TEST(Scheduler, AStepOf256DecodesCostsLittle) {
  SchedulerConfig config{.max_num_seqs = 256,
                         .max_num_batched_tokens = 8192,
                         .num_blocks = 8192,
                         .vocab_size = 1000,
                         .prefix_caching = false};
  Scheduler scheduler(config);
  scheduler.OnAvailable(8192);
  for (uint64_t id = 1; id <= 256; ++id) {
    ASSERT_TRUE(scheduler.Submit({.id = id, .prompt_ids = Prompt(30), .max_tokens = 1500}, 0).ok());
  }
  int next_block = 0;
  std::vector<StepPlan> plans;
  std::vector<double> microseconds;
  for (int step = 0; step < 1000; ++step) {
    std::vector<SampledToken> sampled;
    if (!plans.empty()) {
      for (const PlanRow& row : plans.front().rows) sampled.push_back({row.slot, 50});
    }
    const auto start = std::chrono::steady_clock::now();
    if (!plans.empty()) {
      ASSERT_TRUE(scheduler.OnStepDone(plans.front().step, sampled, 1000, step).ok());
      plans.erase(plans.begin());
    }
    for (bool again = true; again;) {
      SchedulerOutput output = scheduler.Schedule(step);
      again = output.plan.has_value();
      if (again) plans.push_back(*std::move(output.plan));
      for (const CacheCommand& command : output.cache) {
        if (const auto* lease = std::get_if<LeaseCommand>(&command)) {
          std::vector<PoolBlock> blocks(lease->count);
          for (PoolBlock& block : blocks) block.id = next_block++;
          scheduler.OnLeased(lease->tag, std::move(blocks));
          again = true;
        }
      }
    }
    const std::chrono::duration<double, std::micro> took = std::chrono::steady_clock::now() - start;
    if (step > 20) microseconds.push_back(took.count());
  }
  ASSERT_THAT(plans.back().rows, SizeIs(256));
  std::nth_element(microseconds.begin(), microseconds.begin() + microseconds.size() / 2,
                   microseconds.end());
  const double median = microseconds[microseconds.size() / 2];
  RecordProperty("median_us", std::to_string(median));
  std::printf("median of OnStepDone and Schedule at 256 sequences: %.1f us\n", median);
  EXPECT_LT(median, 2000);  // generous: sanitizers and busy machines
}

}  // namespace
}  // namespace wintserve
