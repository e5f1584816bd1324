// What happens when there are no blocks.
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "api_server/scheduler/scheduler_test_util.h"

namespace wintserve {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;
using testing::SizeIs;

TEST(Memory, PinsOfTheWaitingGoBeforeAnythingRunningIsPreempted) {
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

// K and V of the last token are never needed.
TEST(Memory, ASequenceHoldsTheBlocksOfAllItsTokensButTheLast) {
  struct Case {
    int prompt_len;
    int max_tokens;
    int num_blocks;
  };
  for (const Case& c :
       {Case{1, 64, 1}, Case{1, 65, 2}, Case{63, 1, 1}, Case{63, 2, 1}, Case{63, 3, 2},
        Case{64, 1, 1}, Case{64, 2, 2}, Case{64, 64, 2}, Case{64, 65, 2}, Case{64, 66, 3},
        Case{65, 1, 2}, Case{65, 64, 2}, Case{65, 65, 3}, Case{128, 1, 2}, Case{129, 1, 3}}) {
    for (const bool prefix_caching : {false, true}) {
      for (const int async_depth : {0, 1}) {
        SCOPED_TRACE(fmt::format("{} + {} tokens, caching {}, depth {}", c.prompt_len, c.max_tokens,
                                 prefix_caching, async_depth));
        SchedulerConfig config{.max_num_seqs = 1,
                               .block_size_tokens = 64,
                               .num_blocks = c.num_blocks,
                               .async_depth = async_depth,
                               .prefix_caching = prefix_caching};
        FakeWorld world(config);
        world.Submit(c.prompt_len, c.max_tokens);
        int most = 0;
        for (world.Settle(); !world.plans().empty(); world.Settle()) {
          const SchedulerStats stats = world.scheduler().stats();
          most = std::max(most, stats.num_blocks_held - stats.num_blocks_leased_ahead);
          world.FinishPlan();
        }
        EXPECT_EQ(most, c.num_blocks);
        world.ExpectAllTokens();
        world.ExpectAllBlocksBack();
        if (--config.num_blocks == 0) continue;
        FakeWorld too_small(config);
        EXPECT_EQ(
            too_small
                .Submit({.id = 1, .prompt_ids = Prompt(c.prompt_len), .max_tokens = c.max_tokens})
                .code(),
            absl::StatusCode::kInvalidArgument);
      }
    }
  }
}

TEST(Memory, ABlockIsAppendedByThePlanOfItsFirstTokenAndByNoOther) {
  for (const int prompt_len : {63, 64, 65}) {
    SCOPED_TRACE(prompt_len);
    FakeWorld world({.block_size_tokens = 64, .async_depth = 0});
    world.Submit(prompt_len, 70);
    const StepPlan first = NextPlan(&world);
    EXPECT_THAT(first.slot_init.at(0).block_table, SizeIs(prompt_len <= 64 ? 1 : 2));
    EXPECT_THAT(first.block_append, IsEmpty());
    world.FinishPlan();
    std::vector<uint32_t> positions;
    for (world.Settle(); !world.plans().empty(); world.Settle()) {
      const StepPlan& plan = world.plans().front();
      if (!plan.block_append.empty()) {
        EXPECT_THAT(plan.block_append, SizeIs(1));
        EXPECT_THAT(plan.block_append[0].blocks, SizeIs(1));
        positions.push_back(plan.rows.at(0).position);
      }
      world.FinishPlan();
    }
    if (prompt_len == 65) {
      EXPECT_THAT(positions, ElementsAre(128u));
    } else {
      EXPECT_THAT(positions, ElementsAre(64u, 128u));
    }
    world.ExpectAllTokens();
  }
}

// Silence of the cache manager is no reason to fail anybody.
TEST(Memory, NothingFailsWhileAnAnswerIsOutstanding) {
  FakeWorld world({.num_blocks = 4});
  world.Submit(64, 10);
  for (int i = 0; i < 5; ++i) world.Schedule();
  EXPECT_THAT(world.failed(), IsEmpty());
  EXPECT_THAT(world.plans(), IsEmpty());
  world.RunToEnd();
  world.ExpectAllTokens();
}

// Called again and again it neither fails nor preempts anybody, and has nothing more to say.
void ExpectPatience(FakeWorld* world) {
  const size_t num_plans = world->plans().size();
  world->Schedule();
  for (int i = 0; i < 5; ++i) EXPECT_FALSE(world->Schedule());
  EXPECT_THAT(world->plans(), SizeIs(num_plans));
  EXPECT_THAT(world->failed(), IsEmpty());
  EXPECT_EQ(world->scheduler().stats().preemptions, 0u);
}

// The fake refuses it as the cache manager does.
TEST(Memory, NoMoreBlocksAreAskedForThanThePoolHas) {
  FakeWorld world({.max_num_seqs = 16, .block_size_tokens = 4, .num_blocks = 8, .async_depth = 1});
  for (int i = 0; i < 16; ++i) world.SubmitPrompt(Prompt(9, 100 * i), 12);
  world.RunToEnd();
  world.ExpectAllTokens();
  world.ExpectAllBlocksBack();
}

TEST(Memory, RowsSitOutWhileALeaseIsOutstanding) {
  FakeWorld world({.max_num_seqs = 2, .block_size_tokens = 4, .num_blocks = 16, .async_depth = 0});
  world.SubmitPrompt(Prompt(3), 20);
  world.SubmitPrompt(Prompt(3, 500), 20);
  world.Settle();
  while (!world.plans().empty()) {
    world.FinishPlan();
    world.Schedule();  // unanswered
  }
  EXPECT_EQ(world.scheduler().stats().num_running, 2);
  EXPECT_EQ(Count<LeaseCommand>(world), 1);
  ExpectPatience(&world);
  world.RunToEnd();
  EXPECT_EQ(world.scheduler().stats().preemptions, 0u);
  world.ExpectAllTokens();
  world.ExpectAllBlocksBack();
}

TEST(Memory, ASequenceWaitsWhileItsMatchIsOutstandingThoughNothingElseIsLeft) {
  FakeWorld world({.max_num_seqs = 2, .block_size_tokens = 4, .async_depth = 0});
  const uint64_t running = world.SubmitPrompt(Prompt(1), 3);
  world.Settle();
  world.SubmitPrompt(Prompt(9, 500), 3);
  while (!world.plans().empty()) {
    world.FinishPlan();
    world.Schedule();  // unanswered
  }
  EXPECT_TRUE(world.ended({running, 0}));
  EXPECT_EQ(Count<MatchCommand>(world), 1);
  ExpectPatience(&world);
  EXPECT_THAT(world.plans(), IsEmpty());
  world.RunToEnd();
  world.ExpectAllTokens();
  world.ExpectAllBlocksBack();
}

TEST(Memory, ASequenceWaitsWhileACommitThatHoldsThePoolIsOutstanding) {
  FakeWorld world({.block_size_tokens = 4, .num_blocks = 2, .async_depth = 0});
  const uint64_t first = world.SubmitPrompt(Prompt(8), 1);
  NextPlan(&world);
  world.FinishPlan();
  world.Schedule();
  EXPECT_TRUE(world.ended({first, 0}));
  EXPECT_EQ(Count<CommitCommand>(world), 1);
  world.SubmitPrompt(Prompt(8, 500), 1);
  ExpectPatience(&world);
  EXPECT_THAT(world.plans(), IsEmpty());
  world.RunToEnd();
  world.ExpectAllTokens();
  world.ExpectAllBlocksBack();
}

TEST(Memory, NobodyIsPreemptedWhileBlocksOfACancelledSequenceAreOnTheirWayBack) {
  FakeWorld world({.max_num_seqs = 3,
                   .block_size_tokens = 4,
                   .num_blocks = 10,
                   .async_depth = 1,
                   .prefix_caching = false});
  world.SubmitPrompt(Prompt(5), 12);
  const uint64_t cancelled = world.SubmitPrompt(Prompt(2, 500), 30);
  world.SubmitPrompt(Prompt(5, 900), 12);
  for (world.Settle(); world.plans().back().step < 8; world.Settle()) world.FinishPlan();
  world.Cancel(cancelled);  // it has 3 blocks, the others 3 each
  world.FinishPlan();
  world.Settle();
  // Both of the others need a block, and one is left.
  ASSERT_THAT(world.plans(), SizeIs(2));
  EXPECT_THAT(RowLengths(world.plans()[0]), ElementsAre(1, 1, 1));
  EXPECT_THAT(RowLengths(world.plans()[1]), ElementsAre(1));
  EXPECT_EQ(world.scheduler().stats().preemptions, 0u);
  world.RunToEnd();
  EXPECT_EQ(world.scheduler().stats().preemptions, 0u);
  world.ExpectAllTokens();
  world.ExpectAllBlocksBack();
}

TEST(Memory, NothingFailsWhileARestoreIsOutstanding) {
  FakeWorld world({.block_size_tokens = 4, .num_blocks = 8, .async_depth = 0}, /*host slots*/ 4);
  FillHostTier(&world);
  const uint64_t restored = world.SubmitPrompt(Prompt(13), 1);
  world.SubmitPrompt(Prompt(25, 900), 4);  // no room for it beside the restored blocks
  world.Settle();
  ASSERT_THAT(world.plans(), SizeIs(1));
  EXPECT_THAT(world.plans()[0].copies, SizeIs(3));
  EXPECT_THAT(world.plans()[0].rows, IsEmpty());
  ExpectPatience(&world);
  EXPECT_THAT(world.started(),
              testing::Not(testing::Contains(testing::Key(SequenceKey{restored, 0}))));
  world.RunToEnd();
  EXPECT_EQ(world.started().at({restored, 0}), 12);
  EXPECT_EQ(world.scheduler().stats().preemptions, 0u);
  world.ExpectAllTokens();
  world.ExpectAllBlocksBack();
}

TEST(Memory, WhatCannotRunAloneOnTheNewPoolFailsWithAClearError) {
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

// Two that preempt each other would never end; and a slot must not be left while a plan writes.
TEST(Memory, TheOldestIsImmuneAndThePreemptedQueuesAfterItsLastPlanWithItsTokens) {
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

TEST(Memory, ThePreemptedComesBackOnlyWhenItsWholeLengthFits) {
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
