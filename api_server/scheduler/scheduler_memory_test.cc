// What happens when there are no blocks.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "api_server/scheduler/scheduler_test_util.h"

namespace wintserve {
namespace {

using testing::IsEmpty;

TEST(Memory, A2PinsOfTheWaitingGoBeforeAnythingRunningIsPreempted) {
  // 1 has left 4 blocks in the cache, 2 takes the other 4 and needs more; 3 waits with pins on
  // them.
  FakeWorld world({.max_num_seqs = 2,
                   .max_num_batched_tokens = 16,
                   .block_size_tokens = 4,
                   .num_blocks = 8,
                   .async_depth = 0,
                   .max_partial_prefills = 1});
  world.SubmitPrompt(Prompt(17), 1);
  world.RunToEnd();
  world.SubmitPrompt(Prompt(9, 500), 20);
  world.Settle();
  world.SubmitPrompt(Prompt(18), 3);
  for (int i = 0; i < 100 && world.scheduler().stats().num_running > 0; ++i) {
    world.Settle();
    if (!world.plans().empty()) world.FinishPlan();
  }
  world.RunToEnd();
  EXPECT_EQ(world.scheduler().stats().preemptions, 0u);
  world.ExpectAllTokens();
  world.ExpectAllBlocksBack();
}

// A5: silence of the cache manager is no reason to fail anybody.
TEST(Memory, A5NothingFailsWhileAnAnswerIsOutstanding) {
  FakeWorld world({.num_blocks = 4});
  world.Submit(64, 10);
  for (int i = 0; i < 5; ++i) world.Schedule();
  EXPECT_THAT(world.failed(), IsEmpty());
  EXPECT_THAT(world.plans(), IsEmpty());
  world.RunToEnd();
  world.ExpectAllTokens();
}

TEST(Memory, A5WhatCannotRunAloneOnTheNewPoolFailsWithAClearError) {
  FakeWorld world({.block_size_tokens = 4, .num_blocks = 8, .async_depth = 0});
  const uint64_t large = world.Submit(20, 10);
  const uint64_t small = world.Submit(3, 3);
  world.Settle();
  world.FinishPlan();
  world.Settle();
  world.scheduler().SetPaused(true);
  world.LoseCache();
  while (!world.plans().empty()) world.FinishPlan();
  world.ReplacePool(4);
  world.scheduler().SetPaused(false);
  world.RunToEnd();
  ASSERT_TRUE(world.failed().contains({large, 0}));
  EXPECT_EQ(world.failed().at({large, 0}),
            absl::ResourceExhaustedError(
                "the request needs 8 KV blocks, the pool that replaced the lost one has 4"));
  EXPECT_TRUE(world.ended({small, 0}));
}

// A6: two that preempt each other would never end; and a slot must not be left while a plan writes.
TEST(Memory, A6TheOldestIsImmuneAndThePreemptedQueuesAfterItsLastPlanWithItsTokens) {
  FakeWorld world({.max_num_seqs = 2,
                   .max_num_batched_tokens = 64,
                   .block_size_tokens = 4,
                   .num_blocks = 8,
                   .async_depth = 1});
  const uint64_t oldest = world.SubmitPrompt(Prompt(9), 20);
  const uint64_t latest = world.SubmitPrompt(Prompt(9, 500), 20);
  bool was_preempted = false;
  for (int i = 0; i < 200; ++i) {
    world.Settle();
    if (world.plans().empty()) break;
    const SchedulerStats stats = world.scheduler().stats();
    if (stats.preemptions > 0 && !was_preempted) {
      was_preempted = true;
      EXPECT_EQ(stats.num_running, 1);
    }
    for (const StepPlan& plan : world.plans()) {
      for (const SlotInit& init : plan.slot_init) {
        EXPECT_TRUE(init.sampling.seed != static_cast<int64_t>(oldest) || plan.step == 1)
            << "the oldest was preempted";
      }
    }
    world.FinishPlan();
  }
  EXPECT_TRUE(was_preempted);
  EXPECT_TRUE(world.ended({latest, 0}));
  world.ExpectAllTokens();
  world.ExpectAllBlocksBack();
}

TEST(Memory, A6ThePreemptedComesBackOnlyWhenItsWholeLengthFits) {
  FakeWorld world({.max_num_seqs = 2,
                   .max_num_batched_tokens = 4,
                   .block_size_tokens = 4,
                   .num_blocks = 8,
                   .async_depth = 0,
                   .prefix_caching = false});
  const uint64_t oldest = world.SubmitPrompt(Prompt(9), 20);
  world.SubmitPrompt(Prompt(9, 500), 20);
  for (int i = 0; i < 200 && world.scheduler().stats().preemptions == 0; ++i) {
    world.Settle();
    world.FinishPlan();
  }
  // Its first chunk would fit beside the oldest, but it would only be preempted again.
  world.RunToEnd();
  EXPECT_TRUE(world.ended({oldest, 0}));
  EXPECT_EQ(world.scheduler().stats().preemptions, 1u);
  world.ExpectAllTokens();
}

}  // namespace
}  // namespace wintserve
