// The scheduler and the prefix cache: matches, restores, commits, shared prompts of choices, and
// the loss of the session or the pool.
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <utility>

#include "api_server/scheduler/scheduler_test_util.h"

namespace wintserve {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;
using testing::SizeIs;

// The queue may hold a thousand prompts; their pins would keep the pool from those that run.
TEST(Caching, OnlyThoseNextInLineAreMatchedTheOthersArePeekedAt) {
  FakeWorld world({.max_num_seqs = 1, .async_depth = 0});
  for (int i = 0; i < 3; ++i) world.Submit(200, 5);
  world.Schedule();
  EXPECT_EQ(Count<PeekCommand>(world), 3);
  EXPECT_EQ(Count<MatchCommand>(world), 1);
  world.RunToEnd();
  // The second and third were queued while the first computed, yet they found its blocks.
  EXPECT_EQ(world.started().at({2, 0}), 192);
  EXPECT_EQ(world.started().at({3, 0}), 192);
  world.ExpectAllTokens();
}

TEST(Caching, APromptThatWaitedWhileItsPrefixWasCommittedIsMatchedAgain) {
  FakeWorld world({.max_num_seqs = 2,
                   .max_num_batched_tokens = 64,
                   .block_size_tokens = 4,
                   .async_depth = 0,
                   .max_partial_prefills = 1});
  world.Submit(100, 5);
  world.Submit(100, 5);
  world.Settle();  // the first chunk of the first is in flight; the second has missed
  EXPECT_EQ(world.scheduler().stats().num_waiting, 1);
  world.RunToEnd();
  EXPECT_GE(world.started().at({2, 0}), 64);
  world.ExpectAllTokens();
  world.ExpectAllBlocksBack();
}

// A block is offered once every rank has acknowledged the step that filled it, below its parent
// by handle, one request at a time.
TEST(Caching, CommitsAcknowledgedBlocksBelowTheHandleOfTheirParent) {
  FakeWorld world(
      {.max_num_seqs = 4, .max_num_batched_tokens = 8, .block_size_tokens = 4, .async_depth = 1});
  world.Submit(16, 3);
  world.Settle();
  ASSERT_THAT(world.plans(), SizeIs(2));
  EXPECT_EQ(Count<CommitCommand>(world), 0);
  world.FinishPlan();
  world.Schedule();
  world.FinishPlan();
  world.Schedule();
  ASSERT_EQ(Count<CommitCommand>(world), 1);  // the second waits for the handles of the first
  const auto& first = std::get<CommitCommand>(world.commands().front());
  EXPECT_EQ(first.request.parent, 0u);
  ASSERT_THAT(first.request.blocks, SizeIs(2));
  EXPECT_THAT(first.request.blocks[1].tokens, ElementsAre(104, 105, 106, 107));
  while (world.AnswerOne()) {
  }
  world.Schedule();
  ASSERT_EQ(Count<CommitCommand>(world), 1);
  for (const CacheCommand& command : world.commands()) {
    if (const auto* commit = std::get_if<CommitCommand>(&command)) {
      EXPECT_EQ(commit->request.parent, 2u);
    }
  }
  world.RunToEnd();
  world.ExpectAllBlocksBack();
}

TEST(Caching, ADuplicateKeepsThePrivateCopyAndBothGoBackAtTheEnd) {
  FakeWorld world({.max_num_batched_tokens = 64, .block_size_tokens = 4, .async_depth = 0});
  world.Submit(9, 3);
  world.Submit(9, 3);  // both miss, both compute
  EXPECT_THAT(RowLengths(NextPlan(&world)), ElementsAre(9, 9));
  world.FinishPlan();
  world.Settle();
  EXPECT_EQ(world.cache().num_pins(), 4);  // two entries, pinned by both
  world.RunToEnd();
  world.ExpectAllTokens();
  world.ExpectAllBlocksBack();
}

TEST(Caching, AfterAFlushOfItsParentASequenceCommitsNoMore) {
  FakeWorld world(
      {.max_num_seqs = 4, .max_num_batched_tokens = 4, .block_size_tokens = 4, .async_depth = 0});
  world.Submit(17, 8);
  NextPlan(&world);
  world.FinishPlan();
  world.Settle();
  world.cache().Flush();
  world.RunToEnd();
  EXPECT_EQ(world.cache().Peek("", Prompt(17)).device_blocks, 0u);
  world.ExpectAllTokens();
  world.ExpectAllBlocksBack();
}

TEST(Caching, OfACachedPromptAllFullBlocksAreTakenButNeverItsLastToken) {
  for (const auto& [prompt_len, num_cached] :
       {std::pair{63, 0}, {64, 0}, {65, 64}, {127, 64}, {128, 64}, {129, 128}}) {
    SCOPED_TRACE(prompt_len);
    FakeWorld world({.block_size_tokens = 64, .async_depth = 0});
    world.Submit(prompt_len, 1);
    world.RunToEnd();
    const uint64_t again = world.Submit(prompt_len, 1);
    world.RunToEnd();
    EXPECT_EQ(world.started().at({again, 0}), num_cached);
    world.ExpectAllTokens();
    world.ExpectAllBlocksBack();
  }
}

// The last token is sampled and never computed.
TEST(Caching, FullBlocksAreCommittedUpToTheLastTokenButOne) {
  struct Case {
    int prompt_len;
    int max_tokens;
    uint32_t num_blocks;
  };
  for (const Case& c : {Case{63, 1, 0}, Case{63, 2, 1}, Case{64, 1, 1}, Case{64, 64, 1},
                        Case{64, 65, 2}, Case{65, 63, 1}, Case{65, 64, 2}}) {
    for (const int async_depth : {0, 1}) {
      SCOPED_TRACE(
          fmt::format("{} + {} tokens at depth {}", c.prompt_len, c.max_tokens, async_depth));
      FakeWorld world({.block_size_tokens = 64, .async_depth = async_depth});
      const uint64_t id = world.Submit(c.prompt_len, c.max_tokens);
      world.RunToEnd();
      std::vector<int32_t> next_turn = Prompt(c.prompt_len);
      for (const int32_t token : world.tokens(id)) next_turn.push_back(token);
      next_turn.insert(next_turn.end(), 65, 5);
      EXPECT_EQ(world.cache().Peek("", next_turn).device_blocks, c.num_blocks);
      world.ExpectAllBlocksBack();
    }
  }
}

TEST(Caching, GeneratedTokensAreFoundByTheNextTurn) {
  FakeWorld world({.block_size_tokens = 4, .async_depth = 1});
  const uint64_t id = world.Submit(6, 7);
  world.RunToEnd();
  std::vector<int32_t> next = Prompt(6);
  for (const int32_t token : world.tokens(id)) next.push_back(token);
  next.push_back(77);
  const uint64_t second = world.SubmitPrompt(next, 2);
  world.RunToEnd();
  EXPECT_EQ(world.started().at({second, 0}), 12);
  world.ExpectAllTokens();
}

// With nothing to compute, the copies of a restore need a plan all the same.
TEST(Caching, ARestoreGetsAPlanWithoutRowsAndItsSequenceRunsInAPlanAfterIt) {
  FakeWorld world({.block_size_tokens = 4, .num_blocks = 8, .async_depth = 1}, /*host slots*/ 4);
  FillHostTier(&world);
  const uint64_t id = world.SubmitPrompt(Prompt(13), 1);
  world.Settle();
  ASSERT_THAT(world.plans(), SizeIs(2));
  EXPECT_THAT(world.plans()[0].copies, SizeIs(3));
  EXPECT_THAT(world.plans()[0].rows, IsEmpty());
  EXPECT_THAT(RowLengths(world.plans()[1]), ElementsAre(1));
  EXPECT_EQ(world.started().at({id, 0}), 12);
  world.RunToEnd();
  EXPECT_EQ(world.scheduler().stats().host_hit_tokens, 12u);
  world.ExpectAllTokens();
  world.ExpectAllBlocksBack();
}

// The slots are empty, so the whole block table and explicit tokens are sent.
TEST(Recovery, AfterAPoolReplacementSequencesComeBackWithWholeTablesAndExplicitTokens) {
  FakeWorld world({.block_size_tokens = 4, .async_depth = 1});
  const uint64_t id = world.Submit(6, 30);
  for (int i = 0; i < 5; ++i) {
    world.Settle();
    world.FinishPlan();
  }
  world.scheduler().SetPaused(true);
  world.LoseCache();
  while (!world.plans().empty()) world.FinishPlan();
  const int length = 6 + static_cast<int>(world.tokens(id).size());
  world.ReplacePool(50);
  world.Settle();
  EXPECT_THAT(world.plans(), IsEmpty());  // paused
  world.scheduler().SetPaused(false);
  world.Settle();
  const StepPlan& plan = world.plans().front();
  ASSERT_THAT(plan.slot_init, SizeIs(1));
  EXPECT_THAT(plan.slot_init[0].block_table, SizeIs((length + 3) / 4));
  ASSERT_THAT(plan.rows, SizeIs(1));
  EXPECT_EQ(plan.rows[0].position, 0u);
  ASSERT_THAT(plan.rows[0].tokens, SizeIs(length));
  EXPECT_EQ(plan.rows[0].tokens.back(), world.tokens(id).back());
  world.RunToEnd();
  EXPECT_EQ(world.started().at({id, 0}), 0);  // and it has started only once
  world.ExpectAllTokens();
}

TEST(Recovery, PlansStayBelowFourMegabytes) {
  // With a repetition penalty the prompt goes out twice: as the row, and to be counted.
  for (const float repetition_penalty : {1.0f, 1.5f}) {
    FakeWorld world({.max_num_batched_tokens = 4'000'000,
                     .num_blocks = 40'000,
                     .async_depth = 0,
                     .prefix_caching = false});
    for (uint64_t id = 1; id <= 4; ++id) {
      ASSERT_TRUE(world
                      .Submit({.id = id,
                               .prompt_ids = std::vector<int32_t>(300'000, 5),
                               .sampling = {.seed = static_cast<int64_t>(id),
                                            .repetition_penalty = repetition_penalty},
                               .max_tokens = 2})
                      .ok());
    }
    const size_t num_rows = repetition_penalty == 1 ? 2 : 1;
    EXPECT_EQ(RowLengths(NextPlan(&world)), std::vector<int>(num_rows, 300'000));
  }
}

TEST(Recovery, DecodesGoOnWhileTheCacheIsLostAndTheQueueLivesFromTheLease) {
  FakeWorld world({.block_size_tokens = 4, .async_depth = 1});
  world.Submit(6, 4);
  world.Settle();
  world.LoseCache();
  world.Submit(3, 3);
  world.RunToEnd();  // the margin of the lease is enough for both
  world.ExpectAllTokens();
  world.ResumeCache();
  world.RunToEnd();
  world.ExpectAllBlocksBack();
}

TEST(Caching, StatsCountAMatchUntilItsAnswerAndARestoreUntilItsCopiesAreDone) {
  FakeWorld world({.block_size_tokens = 4, .num_blocks = 8, .async_depth = 0}, /*host slots*/ 4);
  FillHostTier(&world);
  const uint64_t cancelled = world.SubmitPrompt(Prompt(13), 1);
  world.Schedule();
  EXPECT_EQ(world.scheduler().stats().num_matching, 1);
  world.Cancel(cancelled);
  EXPECT_EQ(world.scheduler().stats().num_matching, 1);  // its answer is still to come
  world.Settle();
  EXPECT_EQ(world.scheduler().stats().num_matching, 0);
  EXPECT_EQ(world.scheduler().stats().num_restoring, 1);  // the copies are made all the same
  world.FinishPlan();
  EXPECT_EQ(world.scheduler().stats().num_restoring, 0);
  world.RunToEnd();
  world.ExpectAllBlocksBack();
}

TEST(Recovery, WhatAPeekHasFoundAndWhatChoicesShareCountsInFullWhileTheCacheIsLost) {
  FakeWorld world({.max_num_seqs = 1, .block_size_tokens = 4, .async_depth = 0});
  world.SubmitPrompt(Prompt(41), 1);
  world.RunToEnd();
  world.SubmitPrompt(Prompt(5, 900), 50);
  world.Settle();
  const auto num_waiting_tokens = [&] { return world.scheduler().stats().num_waiting_tokens; };
  world.SubmitPrompt(Prompt(41), 1);
  world.Settle();
  EXPECT_EQ(num_waiting_tokens(), 1);
  ASSERT_TRUE(world
                  .Submit({.id = 9,
                           .prompt_ids = Prompt(41, 500),
                           .num_choices = 3,
                           .max_tokens = 2,
                           .ignore_eos = true})
                  .ok());
  EXPECT_EQ(num_waiting_tokens(), 1 + (41 + 1 + 1));
  world.scheduler().SetPaused(true);
  world.LoseCache();
  EXPECT_EQ(num_waiting_tokens(), 41 + 3 * 41);
  world.FinishPlan();
  world.ResumeCache();
  EXPECT_EQ(num_waiting_tokens(), 41 + (41 + 1 + 1));
  world.LoseCache();
  world.ReplacePool(100);
  // The running one waits as well, with the token that it has got.
  EXPECT_EQ(num_waiting_tokens(), 41 + (41 + 1 + 1) + 6);
  world.scheduler().SetPaused(false);
  world.RunToEnd();
  world.ExpectAllTokens();
  world.ExpectAllBlocksBack();
}

TEST(Recovery, OfAMatchOnlyWhatWasToBeCopiedCountsAgainWhenTheCacheIsLost) {
  for (const bool on_host : {false, true}) {
    SCOPED_TRACE(on_host ? "on the host" : "on the device");
    FakeWorld world({.block_size_tokens = 4, .num_blocks = 8, .async_depth = 0}, /*host slots*/ 4);
    if (on_host) {
      FillHostTier(&world);
    } else {
      world.SubmitPrompt(Prompt(13), 1);
      world.RunToEnd();
    }
    world.SubmitPrompt(Prompt(13), 1);
    world.Schedule();
    while (world.AnswerOne()) {
    }
    EXPECT_EQ(world.scheduler().stats().num_waiting_tokens, 1);
    world.LoseCache();
    EXPECT_EQ(world.scheduler().stats().num_waiting_tokens, on_host ? 13 : 1);
    world.ResumeCache();
    world.RunToEnd();
    world.ExpectAllTokens();
    world.ExpectAllBlocksBack();
  }
}

// What comes for a sequence that has gone is given back.
TEST(Caching, ALateMatchOfACancelledSequenceGivesItsPinsBack) {
  FakeWorld world({.block_size_tokens = 4});
  world.Submit(13, 1);
  world.RunToEnd();
  const uint64_t id = world.Submit(13, 1);
  world.Schedule();
  ASSERT_EQ(Count<MatchCommand>(world), 1);
  world.Cancel(id);
  world.RunToEnd();
  world.ExpectAllBlocksBack();
}

TEST(Caching, ALateRestoreIsCopiedThenReportedThenReleased) {
  FakeWorld world({.block_size_tokens = 4, .num_blocks = 8, .async_depth = 0}, /*host slots*/ 4);
  FillHostTier(&world);
  const uint64_t id = world.SubmitPrompt(Prompt(13), 1);
  world.Schedule();
  world.Cancel(id);
  const StepPlan plan = NextPlan(&world);
  EXPECT_THAT(plan.copies, SizeIs(3));
  world.FinishPlan();
  world.Schedule();
  ASSERT_THAT(world.commands(), SizeIs(testing::Ge(2u)));
  EXPECT_TRUE(std::holds_alternative<CopyDoneCommand>(world.commands()[0]));
  EXPECT_TRUE(std::holds_alternative<ReleaseCommand>(world.commands()[1]));
  world.RunToEnd();
  world.ExpectAllBlocksBack();
}

TEST(Caching, ALateLeaseAndALateCommitOfACancelledSequenceGoBack) {
  FakeWorld world({.block_size_tokens = 4, .async_depth = 0});
  const uint64_t leasing = world.Submit(3, 5);
  world.Schedule();
  ASSERT_EQ(Count<LeaseCommand>(world), 1);
  world.Cancel(leasing);
  world.RunToEnd();
  world.ExpectAllBlocksBack();
  const uint64_t committing = world.Submit(9, 5);
  NextPlan(&world);
  world.FinishPlan();
  world.Schedule();
  ASSERT_EQ(Count<CommitCommand>(world), 1);
  world.Cancel(committing);
  world.RunToEnd();
  world.ExpectAllBlocksBack();
}

// N prefills of one prompt would cost n times as much.
TEST(Choices, TheOthersWaitForTheFirstAndShareItsFullBlocks) {
  FakeWorld world({.max_num_batched_tokens = 256, .async_depth = 0});
  world.Submit(130, 3, /*num_choices=*/3);
  EXPECT_THAT(RowLengths(NextPlan(&world)), ElementsAre(130));
  world.FinishPlan();
  world.RunToEnd();
  EXPECT_EQ(world.started().at({1, 1}), 128);
  EXPECT_EQ(world.started().at({1, 2}), 128);
  world.ExpectAllTokens();
  world.ExpectAllBlocksBack();
}

TEST(Choices, APromptWithoutAFullBlockBeforeItsLastTokenIsNotWaitedFor) {
  FakeWorld shares({.block_size_tokens = 64, .async_depth = 0});
  shares.Submit(65, 3, /*num_choices=*/2);
  EXPECT_THAT(RowLengths(NextPlan(&shares)), ElementsAre(65));
  shares.RunToEnd();
  EXPECT_EQ(shares.started().at({1, 1}), 64);

  FakeWorld world({.block_size_tokens = 64, .async_depth = 0});
  world.Submit(64, 3, 2);
  EXPECT_THAT(RowLengths(NextPlan(&world)), ElementsAre(64, 64));
  world.RunToEnd();
  EXPECT_EQ(world.started().at({1, 1}), 0);
  world.ExpectAllTokens();
}

TEST(Choices, TheyStartAtOnceWithoutCachingAndWhenTheFirstHasGone) {
  FakeWorld without({.async_depth = 0, .prefix_caching = false});
  without.Submit(65, 3, 2);
  EXPECT_THAT(NextPlan(&without).rows, SizeIs(2));

  FakeWorld world({.async_depth = 0});
  world.Submit(65, 3, 2);
  NextPlan(&world);
  world.scheduler().Cancel(SequenceKey{1, 0});
  world.FinishPlan();
  EXPECT_THAT(NextPlan(&world).slot_release, SizeIs(1));
  world.FinishPlan();
  world.Settle();
  EXPECT_TRUE(world.started().contains({1, 1}));
}

}  // namespace
}  // namespace wintserve
