// The loss of the rank group.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <utility>
#include <variant>
#include <vector>

#include "api_server/scheduler/scheduler_test_util.h"

namespace wintserve {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;
using testing::SizeIs;

std::vector<BlockId> TableOf(const StepPlan& plan, uint32_t slot) {
  for (const SlotInit& init : plan.slot_init) {
    if (init.slot == slot) return init.block_table;
  }
  return {};
}

template <typename Command>
const Command* Find(const FakeWorld& world) {
  for (const CacheCommand& command : world.commands()) {
    if (const auto* found = std::get_if<Command>(&command)) return found;
  }
  return nullptr;
}

// Settles, with a plan in flight or more.
const StepPlan& FirstPlanAfterLoss(FakeWorld* world) {
  world->Settle();
  EXPECT_FALSE(world->plans().empty());
  return world->plans().front();
}

TEST(GroupLoss, ASequenceGoesOnFromItsLastTokenWithItsWholeTable) {
  FakeWorld world({.block_size_tokens = 4, .first_step = 500, .async_depth = 1});
  world.SubmitPrompt(Prompt(9), 30);
  world.Settle();
  EXPECT_EQ(world.plans().front().step, 500u);
  for (int i = 0; i < 4; ++i) {
    world.FinishPlan();
    world.Settle();
  }
  ASSERT_THAT(world.plans(), SizeIs(2));
  const uint64_t last_step = world.plans().back().step;
  const std::vector<int32_t> tokens = world.tokens(1);
  EXPECT_THAT(tokens, SizeIs(4));
  world.LoseGroup();
  EXPECT_EQ(world.scheduler().num_plans_in_flight(), 0);
  EXPECT_EQ(world.scheduler().stats().num_running, 1);
  EXPECT_EQ(world.scheduler().stats().resumed_sequences, 1u);
  const StepPlan& plan = FirstPlanAfterLoss(&world);
  EXPECT_EQ(plan.step, last_step + 1);
  ASSERT_THAT(plan.slot_init, SizeIs(1));
  // The prompt and 5 more tokens, those of the lost plans included, have taken 4 blocks.
  EXPECT_THAT(plan.slot_init[0].block_table, SizeIs(4));
  EXPECT_EQ(plan.slot_init[0].prompt_tokens, Prompt(9));
  EXPECT_EQ(plan.slot_init[0].generated_tokens, tokens);
  EXPECT_THAT(plan.block_append, IsEmpty());
  ASSERT_THAT(plan.rows, SizeIs(1));
  EXPECT_EQ(plan.rows[0].position, 12u);  // 9 + 4 - 1
  EXPECT_THAT(plan.rows[0].tokens, ElementsAre(tokens.back()));
  EXPECT_TRUE(plan.rows[0].sample);
  ASSERT_THAT(world.plans(), SizeIs(2));
  EXPECT_THAT(world.plans().back().rows.at(0).tokens, IsEmpty());  // it is in the slot again
  world.RunToEnd();
  EXPECT_EQ(world.scheduler().stats().recomputed_sequences, 0u);
  world.ExpectAllTokens();
  world.ExpectAllBlocksBack();
}

TEST(GroupLoss, APromptGoesOnFromItsLastChunkThatIsDone) {
  FakeWorld world(
      {.max_num_seqs = 2, .max_num_batched_tokens = 8, .block_size_tokens = 4, .async_depth = 1});
  world.SubmitPrompt(Prompt(30), 3);
  world.Settle();
  world.FinishPlan();
  world.Settle();  // tokens 8 to 24 are in flight
  world.LoseGroup();
  const StepPlan& plan = FirstPlanAfterLoss(&world);
  EXPECT_EQ(plan.rows.at(0).position, 8u);
  EXPECT_THAT(TableOf(plan, plan.rows.at(0).slot), SizeIs(6));
  world.RunToEnd();
  world.ExpectAllTokens();
  world.ExpectAllBlocksBack();
}

TEST(GroupLoss, NothingChangesForThoseThatWaitWhenNothingIsInFlight) {
  FakeWorld world({.max_num_seqs = 2});
  world.scheduler().SetPaused(true);
  world.Submit(70, 3);
  world.Settle();
  world.LoseGroup();
  world.LoseGroup(/*first_bad_step=*/1);
  EXPECT_EQ(world.scheduler().stats().num_waiting, 1);
  EXPECT_FALSE(world.Schedule() && !world.plans().empty());
  world.scheduler().SetPaused(false);
  world.RunToEnd();
  world.ExpectAllTokens();
  world.ExpectAllBlocksBack();
}

TEST(GroupLoss, HistoriesAreSpreadOverPlansOfFourMebibytes) {
  constexpr int kPromptLen = 300'000;
  FakeWorld world({.max_num_seqs = 5,
                   .max_num_batched_tokens = 2'000'000,
                   .block_size_tokens = 4096,
                   .num_blocks = 500,
                   .async_depth = 0,
                   .prefix_caching = false,
                   .max_partial_prefills = 5,
                   .max_step_slowdown = 0});
  for (int i = 0; i < 5; ++i) world.SubmitPrompt(Prompt(kPromptLen, 10 * i), 8);
  while (world.scheduler().stats().num_waiting > 0) {
    world.Settle();
    world.FinishPlan();
  }
  world.Settle();
  world.LoseGroup();
  std::vector<int> num_resumed;
  std::vector<size_t> num_rows;
  for (int i = 0; i < 3; ++i) {
    const StepPlan plan = NextPlan(&world);
    size_t num_numbers = 0;
    for (const SlotInit& init : plan.slot_init) {
      num_numbers += init.prompt_tokens.size() + init.generated_tokens.size();
    }
    EXPECT_LE(num_numbers * 5, 4u << 20);
    num_resumed.push_back(static_cast<int>(plan.slot_init.size()));
    num_rows.push_back(plan.rows.size());
    world.FinishPlan();
  }
  EXPECT_THAT(num_resumed, ElementsAre(2, 2, 1));
  EXPECT_THAT(num_rows, ElementsAre(2u, 4u, 5u));  // those that are back decode on
  world.RunToEnd();
  world.ExpectAllTokens();
  world.ExpectAllBlocksBack();
}

TEST(GroupLoss, DecodesGoOnBesideAPromptThatCouldTakeAllOfThePlan) {
  FakeWorld world(
      {.max_num_seqs = 3, .max_num_batched_tokens = 16, .block_size_tokens = 4, .async_depth = 0});
  world.Submit(5, 40);
  world.Settle();
  world.FinishPlan();
  world.SubmitPrompt(Prompt(200, 500), 3);
  const absl::Status status = world.Submit({.id = 3,
                                            .prompt_ids = Prompt(200, 700),
                                            .sampling = {.seed = 3},
                                            .max_tokens = 2,
                                            .ignore_eos = true,
                                            .priority = -1});
  ASSERT_TRUE(status.ok()) << status;
  for (int i = 0; i < 2; ++i) {
    world.Settle();
    world.FinishPlan();
  }
  world.Settle();
  world.LoseGroup();
  // The prompt of 3 comes first by rank, and yet 1 decodes in the very first plan.
  const StepPlan& plan = FirstPlanAfterLoss(&world);
  std::vector<uint64_t> owners;
  for (const PlanRow& row : plan.rows) owners.push_back(world.OwnerOf(row.slot).request);
  EXPECT_THAT(owners, testing::Contains(1u));
  EXPECT_GT(RowLengths(plan).size(), 1u);
  world.RunToEnd();
  world.ExpectAllTokens();
}

TEST(GroupLoss, ALastRowThatWasInFlightRunsAgainAndEndsItsSequenceOnce) {
  FakeWorld world({.max_num_seqs = 2, .async_depth = 1});
  world.Submit(10, 2);
  world.Settle();
  ASSERT_THAT(world.plans(), SizeIs(2));
  EXPECT_THAT(world.plans().back().slot_release, SizeIs(1));
  EXPECT_EQ(world.scheduler().stats().num_running, 0);
  world.LoseGroup();
  EXPECT_EQ(world.scheduler().stats().num_running, 1);
  world.RunToEnd();
  world.ExpectAllTokens();
  world.ExpectAllBlocksBack();
}

// 2 has got the slot that 1 gave up with its last row. When 1 has to run again, 2 comes after it.
TEST(GroupLoss, WhoeverHasTheSlotOfALastRowThatIsLostQueuesAgain) {
  FakeWorld world({.max_num_seqs = 1, .async_depth = 2});
  world.Submit(10, 2);
  world.Submit(20, 3);
  world.Settle();
  ASSERT_THAT(world.plans(), SizeIs(3));
  EXPECT_EQ(world.plans().back().slot_init.at(0).sampling.seed, 2);
  world.LoseGroup();
  SchedulerStats stats = world.scheduler().stats();
  EXPECT_EQ(stats.num_running, 1);
  EXPECT_EQ(stats.num_waiting, 1);
  EXPECT_EQ(stats.resumed_sequences, 1u);
  EXPECT_EQ(stats.recomputed_sequences, 1u);
  EXPECT_EQ(FirstPlanAfterLoss(&world).slot_init.at(0).sampling.seed, 1);
  world.RunToEnd();
  world.ExpectAllTokens();
  world.ExpectAllBlocksBack();
}

TEST(GroupLoss, ATenantRunsNoMoreThanItsCapWhenALastRowIsLost) {
  FakeWorld world({.max_num_seqs = 4, .async_depth = 2, .max_seqs_per_tenant = 1});
  for (uint64_t id = 1; id <= 2; ++id) {
    const absl::Status status = world.Submit({.id = id,
                                              .prompt_ids = Prompt(10),
                                              .sampling = {.seed = static_cast<int64_t>(id)},
                                              .max_tokens = 2,
                                              .ignore_eos = true,
                                              .tenant = "a"});
    ASSERT_TRUE(status.ok()) << status;
  }
  world.Settle();
  ASSERT_THAT(world.plans(), SizeIs(3));
  // It starts beside the last row of 1, in a slot of its own.
  EXPECT_EQ(world.plans()[1].slot_init.at(0).sampling.seed, 2);
  world.LoseGroup();  // checks the counts of tenants
  EXPECT_EQ(world.scheduler().stats().num_running, 1);
  world.RunToEnd();
  world.ExpectAllTokens();
  world.ExpectAllBlocksBack();
}

TEST(GroupLoss, BlocksThatWaitedForPlansInFlightGoBack) {
  FakeWorld world({.block_size_tokens = 4, .async_depth = 1, .prefix_caching = false});
  world.Submit(20, 10);
  world.Settle();
  world.Cancel(1);
  world.Settle();
  EXPECT_GT(world.scheduler().stats().num_blocks_held, 0);
  world.scheduler().SetPaused(true);
  world.LoseGroup();
  world.Settle();
  world.ExpectAllBlocksBack();
  EXPECT_THAT(world.plans(), IsEmpty());  // not even for its slot: that is empty
}

TEST(GroupLoss, APreemptedSequenceQueuesAgainWithoutItsPlans) {
  FakeWorld world({.max_num_seqs = 2,
                   .max_num_batched_tokens = 16,
                   .block_size_tokens = 4,
                   .num_blocks = 6,
                   .async_depth = 1,
                   .prefix_caching = false});
  world.SubmitPrompt(Prompt(4), 20);
  world.SubmitPrompt(Prompt(4, 500), 20);
  while (world.scheduler().stats().preemptions == 0) {
    ASSERT_FALSE(testing::Test::HasFailure());
    world.Settle();
    if (world.scheduler().stats().preemptions == 0) world.FinishPlan();
  }
  world.LoseGroup();
  EXPECT_EQ(world.scheduler().stats().num_running, 1);
  EXPECT_EQ(world.scheduler().stats().num_waiting, 1);
  world.RunToEnd();
  world.ExpectAllTokens();
  world.ExpectAllBlocksBack();
}

// Chunking off: the prompt does not fit beside the other one, which decodes all the time.
TEST(GroupLoss, AWholePromptWhoseRowIsLostGetsItsTurnAmongDecodes) {
  FakeWorld world({.max_num_seqs = 2,
                   .max_num_batched_tokens = 20,
                   .block_size_tokens = 4,
                   .async_depth = 1,
                   .chunked_prefill = false});
  world.Submit(3, 60);
  world.Settle();
  world.FinishPlan();
  world.SubmitPrompt(Prompt(20, 500), 5);
  while (world.started().size() < 2) {
    world.Settle();
    if (world.started().size() < 2) world.FinishPlan();
  }
  EXPECT_THAT(world.tokens(2), IsEmpty());
  world.LoseGroup();
  for (int i = 0; i < 6; ++i) {
    world.Settle();
    world.FinishPlan();
  }
  EXPECT_GE(world.tokens(2).size(), 1u);
  EXPECT_FALSE(world.ended({1, 0}));
  world.RunToEnd();
  world.ExpectAllTokens();
}

FakeWorld WorldWithHostTier(int async_depth) {
  return FakeWorld({.max_num_seqs = 2,
                    .max_num_batched_tokens = 64,
                    .block_size_tokens = 4,
                    .num_blocks = 12,
                    .async_depth = async_depth},
                   /*num_host_slots=*/20);
}

TEST(GroupLoss, RestoresOfLostPlansAreOrderedAgainBeforeAnyRowThatReadsThem) {
  FakeWorld world = WorldWithHostTier(/*async_depth=*/1);
  FillHostTier(&world);
  world.SubmitPrompt(Prompt(13), 4);
  world.Settle();
  ASSERT_THAT(world.plans(), SizeIs(2));  // the copies; and the first row, which reads them
  const std::vector<BlockCopy> copies = world.plans().front().copies;
  ASSERT_THAT(copies, SizeIs(3));
  ASSERT_THAT(world.plans().back().rows, SizeIs(1));
  const std::vector<BlockId> table = world.plans().back().slot_init.at(0).block_table;
  world.LoseGroup();
  const StepPlan& again = FirstPlanAfterLoss(&world);
  ASSERT_THAT(again.copies, SizeIs(3));
  for (size_t i = 0; i < copies.size(); ++i) {
    EXPECT_TRUE(again.copies[i].to_device);
    EXPECT_EQ(again.copies[i].block, copies[i].block);
    EXPECT_EQ(again.copies[i].host_slot, copies[i].host_slot);
  }
  EXPECT_THAT(again.rows, IsEmpty());
  ASSERT_THAT(world.plans(), SizeIs(2));
  EXPECT_EQ(world.plans().back().slot_init.at(0).block_table, table);
  EXPECT_EQ(world.plans().back().rows.at(0).position, 12u);
  world.RunToEnd();
  world.ExpectAllTokens();
  world.ExpectAllBlocksBack();
}

TEST(GroupLoss, WriteBacksOfLostPlansAreOrderedAgain) {
  FakeWorld world = WorldWithHostTier(/*async_depth=*/0);
  world.default_step_us = 0;
  world.SubmitPrompt(Prompt(13), 1);
  world.RunToEnd();
  world.SubmitPrompt(Prompt(13), 1);  // a hit makes them worth a copy, once it lets go of them
  std::vector<BlockCopy> copies;
  while (copies.empty()) {
    ASSERT_FALSE(testing::Test::HasFailure());
    const StepPlan plan = NextPlan(&world);
    copies = plan.copies;
    if (copies.empty()) world.FinishPlan();
  }
  EXPECT_FALSE(copies[0].to_device);
  world.LoseGroup();
  const StepPlan again = NextPlan(&world);
  ASSERT_THAT(again.copies, SizeIs(copies.size()));
  EXPECT_EQ(again.copies[0].block, copies[0].block);
  EXPECT_EQ(again.copies[0].host_slot, copies[0].host_slot);
  world.RunToEnd();
  world.ExpectAllBlocksBack();
}

// The orders went with the session, so nobody fills these blocks any more.
TEST(GroupLoss, WithoutASessionARestoreThatWasInFlightIsAMiss) {
  FakeWorld world = WorldWithHostTier(/*async_depth=*/1);
  FillHostTier(&world);
  world.SubmitPrompt(Prompt(13), 4);
  world.Settle();
  ASSERT_THAT(world.plans().front().copies, SizeIs(3));
  world.LoseCache();
  world.LoseGroup();
  const StepPlan& plan = FirstPlanAfterLoss(&world);
  EXPECT_THAT(plan.copies, IsEmpty());
  EXPECT_EQ(plan.rows.at(0).position, 0u);
  while (!world.plans().empty()) world.FinishPlan();
  world.ResumeCache();
  world.RunToEnd();
  world.ExpectAllTokens();
  world.ExpectAllBlocksBack();
}

// With plans in flight that never end the session could not be resumed.
TEST(GroupLoss, ASessionThatWasLostIsResumedAfterIt) {
  FakeWorld world({.max_num_seqs = 3, .block_size_tokens = 4, .async_depth = 1});
  world.SubmitPrompt(Prompt(20), 10);
  world.SubmitPrompt(Prompt(22, 300), 10);
  world.Settle();
  world.FinishPlan();
  world.Schedule();
  world.LoseCache(/*num_unanswered=*/1);
  world.LoseGroup();
  world.ResumeCache();
  world.RunToEnd();
  world.ExpectAllTokens();
  world.ExpectAllBlocksBack();
}

TEST(GroupLoss, WithoutTrustEverySequenceIsComputedAgainFromItsTokens) {
  FakeWorld world({.max_num_seqs = 2, .block_size_tokens = 4, .async_depth = 1});
  world.SubmitPrompt(Prompt(13), 20);
  world.Settle();
  for (int i = 0; i < 5; ++i) {
    world.FinishPlan();
    world.Settle();
  }
  const std::vector<int32_t> tokens = world.tokens(1);
  ASSERT_THAT(tokens, SizeIs(5));
  world.scheduler().SetPaused(true);
  world.LoseGroup(/*first_bad_step=*/1);
  world.Settle();
  SchedulerStats stats = world.scheduler().stats();
  EXPECT_EQ(stats.recomputed_sequences, 1u);
  EXPECT_EQ(stats.num_waiting, 1);
  EXPECT_EQ(stats.num_blocks_held, stats.num_blocks_leased_ahead);
  EXPECT_EQ(world.cache().num_pins(), 0);
  world.scheduler().SetPaused(false);
  const StepPlan& plan = FirstPlanAfterLoss(&world);
  EXPECT_EQ(plan.rows.at(0).position, 0u);
  EXPECT_EQ(plan.rows.at(0).length, 18u);
  EXPECT_EQ(plan.slot_init.at(0).generated_tokens, tokens);
  world.RunToEnd();
  world.ExpectAllTokens();
  world.ExpectAllBlocksBack();
}

TEST(GroupLoss, WithoutTrustWhatOlderStepsCommittedIsFoundAgain) {
  FakeWorld world({.max_num_seqs = 2, .block_size_tokens = 4, .async_depth = 0});
  world.SubmitPrompt(Prompt(13), 20);
  world.Settle();
  world.FinishPlan();  // step 1: the prompt's 3 full blocks
  for (int i = 0; i < 6; ++i) {
    world.Settle();
    world.FinishPlan();
  }
  world.Settle();
  world.LoseGroup(/*first_bad_step=*/2);
  EXPECT_EQ(FirstPlanAfterLoss(&world).rows.at(0).position, 12u);
  world.RunToEnd();
  world.ExpectAllTokens();
  world.ExpectAllBlocksBack();
}

TEST(GroupLoss, WithoutTrustACommitUnderWayIsAwaitedAndNoneFollows) {
  FakeWorld world({.max_num_seqs = 2, .block_size_tokens = 4, .async_depth = 0});
  world.SubmitPrompt(Prompt(13), 20);
  world.Settle();
  world.FinishPlan();
  world.Schedule();
  const auto* commit = Find<CommitCommand>(world);
  ASSERT_NE(commit, nullptr);
  const std::vector<CommitBlock> committing = commit->request.blocks;
  ASSERT_THAT(committing, SizeIs(3));
  world.scheduler().SetPaused(true);
  world.LoseGroup(/*first_bad_step=*/1);
  world.Schedule();
  // Whether these blocks are leased or pinned is not known yet. (The lease goes back: nobody runs.)
  EXPECT_EQ(Count<ReleaseCommand>(world), 0);
  const auto* returned = Find<ReturnCommand>(world);
  ASSERT_NE(returned, nullptr);
  for (const CommitBlock& block : committing) {
    EXPECT_THAT(returned->blocks, testing::Not(testing::Contains(block.block)));
  }
  world.Settle();
  EXPECT_EQ(world.cache().num_pins(), 0);
  EXPECT_EQ(world.cache().Peek("", Prompt(13)).device_blocks, 0u);
  world.scheduler().SetPaused(false);
  world.RunToEnd();
  world.ExpectAllTokens();
  world.ExpectAllBlocksBack();
}

TEST(GroupLoss, WithoutTrustBlocksThatWereNotOfferedYetAreNotOffered) {
  FakeWorld world({.max_num_seqs = 2, .block_size_tokens = 4, .async_depth = 0});
  world.SubmitPrompt(Prompt(13), 20);
  world.Settle();
  world.FinishPlan();
  world.LoseGroup(/*first_bad_step=*/1);
  world.scheduler().SetPaused(true);
  world.Schedule();
  EXPECT_EQ(Count<CommitCommand>(world), 0);
  world.scheduler().SetPaused(false);
  world.RunToEnd();
  world.ExpectAllTokens();
}

TEST(GroupLoss, WithoutTrustMatchesOfWaitingSequencesAreMadeAgain) {
  for (const bool answered : {false, true}) {
    SCOPED_TRACE(answered);
    FakeWorld world({.max_num_seqs = 1, .block_size_tokens = 4, .async_depth = 0});
    world.SubmitPrompt(Prompt(13), 3);
    world.RunToEnd();
    world.scheduler().SetPaused(true);
    world.SubmitPrompt(Prompt(13), 3);
    world.Schedule();
    ASSERT_EQ(Count<MatchCommand>(world), 1);
    if (answered) {
      world.Settle();
      EXPECT_EQ(world.cache().num_pins(), 3);
    }
    world.LoseGroup(/*first_bad_step=*/1);
    world.Settle();
    EXPECT_EQ(world.cache().num_pins(), 0);
    world.scheduler().SetPaused(false);
    world.RunToEnd();
    EXPECT_EQ(world.started().at({2, 0}), 0);
    world.ExpectAllTokens();
    world.ExpectAllBlocksBack();
  }
}

TEST(GroupLoss, ACommitNamesTheNewestStepThatWroteToItsBlocks) {
  FakeWorld world({.max_num_seqs = 2,
                   .max_num_batched_tokens = 4,
                   .block_size_tokens = 8,
                   .first_step = 100,
                   .async_depth = 0});
  world.SubmitPrompt(Prompt(7), 5);
  for (int i = 0; i < 3; ++i) {
    world.Settle();
    world.FinishPlan();  // tokens 0 to 3, 4 to 6, then the first one of the answer
  }
  world.Schedule();
  const auto* commit = Find<CommitCommand>(world);
  ASSERT_NE(commit, nullptr);
  EXPECT_EQ(commit->request.step, 102u);
  world.RunToEnd();
}

TEST(GroupLoss, RequestsInFlightAreThoseThatPlansInFlightName) {
  FakeWorld world({.max_num_seqs = 2, .async_depth = 1});
  EXPECT_THAT(world.scheduler().RequestsInFlight(), IsEmpty());
  for (int i = 0; i < 3; ++i) world.Submit(10, 8, /*num_choices=*/1);
  world.Settle();
  EXPECT_THAT(world.scheduler().RequestsInFlight(), ElementsAre(1u, 2u));
  world.Cancel(1);
  EXPECT_THAT(world.scheduler().RequestsInFlight(), ElementsAre(1u, 2u));
  world.LoseGroup();
  EXPECT_THAT(world.scheduler().RequestsInFlight(), IsEmpty());
  world.RunToEnd();
  world.ExpectAllTokens();
}

}  // namespace
}  // namespace wintserve
