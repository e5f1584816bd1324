// The simulator's own checks: each of them accepts what is right and can fail.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <vector>

#include "tests/simulation/clients.h"
#include "tests/simulation/config.h"
#include "tests/simulation/event_queue.h"
#include "tests/simulation/ledger.h"
#include "tests/simulation/rank.h"
#include "tests/simulation/reference.h"
#include "tests/simulation/report.h"

namespace wintserve::simulation {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;

SimulationConfig SmallConfig() {
  SimulationConfig config;
  config.scheduler.block_size_tokens = 2;
  config.scheduler.num_blocks = 8;
  config.scheduler.max_num_seqs = 2;
  config.scheduler.max_num_batched_tokens = 8;
  config.scheduler.vocab_size = 100;
  config.scheduler.eos_ids = {1};
  config.max_sequence_tokens = 10;
  config.num_host_slots = 2;
  return config;
}

// Two requests of one prompt of 5 tokens: 2 full blocks and one token.
class Checks : public testing::Test {
 protected:
  Checks() {
    for (uint64_t id = 1; id <= 2; ++id) {
      ScheduledRequest request;
      request.id = id;
      request.prompt_ids = kPrompt;
      request.sampling.seed = static_cast<int64_t>(id);
      request.max_tokens = 3;
      request.sampling.num_prompt_top_logprobs = id == 2 ? 0 : -1;
      references.Add(request);
    }
    rank.AttachPool(/*pool_epoch=*/1, &memory);
  }

  void Lease(std::vector<PoolBlock> blocks) {
    ledger.OnReply(Leased{.tag = 1, .blocks = std::move(blocks)});
  }

  // The whole prompt of a request into these blocks, from `position` on.
  StepPlan PromptPlan(uint64_t step, uint64_t request, std::vector<BlockId> blocks, uint32_t slot,
                      uint32_t position = 0) {
    const SamplingParams& sampling = references.Find(SequenceKey{request, 0})->sampling;
    StepPlan plan;
    plan.step = step;
    plan.pool_epoch = 1;
    plan.slot_init = {{.slot = slot, .sampling = sampling, .block_table = std::move(blocks)}};
    plan.rows = {{.slot = slot,
                  .position = position,
                  .length = 5 - position,
                  .sample = true,
                  .tokens = {kPrompt.begin() + position, kPrompt.end()}}};
    return plan;
  }

  CommitCommand CommitOfFirstBlock() {
    return {.tag = 1, .request = {.parent = 0, .salt = "", .blocks = {{{0, 1}, {10, 11}}}}};
  }

  const std::vector<int32_t> kPrompt = {10, 11, 12, 13, 14};
  const std::vector<BlockId> kBlocks = {BlockId{0}, BlockId{1}, BlockId{2}};
  const std::vector<PoolBlock> kLeased = {{0, 1}, {1, 1}, {2, 1}};

  const SimulationConfig config = SmallConfig();
  EventQueue clock;
  Report report{&clock, Report::Tracing::kOff};
  References references{config};
  Ledger ledger{config, &references, &report};
  RankMemory memory{config, /*pool_epoch=*/1, config.scheduler.num_blocks};
  SimulatedRank rank{config, 0, &references, &report};
};

TEST_F(Checks, AcceptALeaseAPlanACommitAndAReturn) {
  Lease(kLeased);
  StepPlan plan = PromptPlan(1, 1, kBlocks, 0);
  plan.slot_release = {0};
  ledger.OnPlan(plan);
  rank.Execute(plan);
  ledger.OnPlanDone(1);
  ledger.OnCommand(CommitOfFirstBlock(), true);
  ledger.OnReply(Committed{.tag = 1, .blocks = {{.entry = 7, .duplicate = false}}});
  ledger.OnCommand(ReleaseCommand{{7}}, true);
  ledger.OnCommand(ReturnCommand{{{1, 1}, {2, 1}}}, true);
  ledger.CheckQuiescent(/*num_leased_ahead=*/0);
  EXPECT_EQ(report.violation(), "");
}

TEST_F(Checks, RefuseAPlanThatNamesABlockWhichIsNotHeld) {
  Lease({{0, 1}, {1, 1}});
  ledger.OnPlan(PromptPlan(1, 1, kBlocks, 0));
  EXPECT_THAT(report.violation(), StartsWith("I3"));
}

TEST_F(Checks, RefuseAPlanThatNamesTheBlockOfAnotherSequence) {
  Lease(kLeased);
  ledger.OnPlan(PromptPlan(1, 1, kBlocks, 0));
  ledger.OnPlan(PromptPlan(2, 2, kBlocks, 1));
  EXPECT_THAT(report.violation(), HasSubstr("sequence 2.0 gets block 0, which sequence 1.0 still"));
}

TEST_F(Checks, RefuseAReturnBeforeTheAcknowledgement) {
  Lease(kLeased);
  ledger.OnPlan(PromptPlan(1, 1, kBlocks, 0));
  ledger.OnCommand(ReturnCommand{kLeased}, true);
  EXPECT_THAT(report.violation(), StartsWith("I5: a Return of block 0"));
}

TEST_F(Checks, RefuseAReleaseBeforeTheAcknowledgement) {
  Lease(kLeased);
  ledger.OnPlan(PromptPlan(1, 1, kBlocks, 0));
  ledger.OnPlanDone(1);
  ledger.OnCommand(CommitOfFirstBlock(), true);
  ledger.OnReply(Committed{.tag = 1, .blocks = {{.entry = 7, .duplicate = false}}});
  StepPlan decode;
  decode.step = 2;
  decode.rows = {{.slot = 0, .position = 5, .length = 1, .sample = true}};
  ledger.OnPlan(decode);
  EXPECT_EQ(report.violation(), "");
  ledger.OnCommand(ReleaseCommand{{7}}, true);
  EXPECT_THAT(report.violation(), StartsWith("I5: a Release of entry 7"));
}

TEST_F(Checks, RefuseALeaseOfABlockThatAPlanInFlightNames) {
  Lease(kLeased);
  ledger.OnPlan(PromptPlan(1, 1, kBlocks, 0));
  Lease({{0, 2}});
  EXPECT_THAT(report.violation(), StartsWith("I5: block 0@2 is leased"));
}

TEST_F(Checks, RefuseACommitBeforeTheAcknowledgement) {
  Lease(kLeased);
  ledger.OnPlan(PromptPlan(1, 1, kBlocks, 0));
  ledger.OnCommand(CommitOfFirstBlock(), true);
  EXPECT_THAT(report.violation(), StartsWith("I4: a Commit of block 0"));
  EXPECT_THAT(report.violation(), HasSubstr("acknowledged 0 of 2 tokens"));
}

TEST_F(Checks, RefuseACommitOfOtherTokens) {
  Lease(kLeased);
  ledger.OnPlan(PromptPlan(1, 1, kBlocks, 0));
  ledger.OnPlanDone(1);
  CommitCommand commit = CommitOfFirstBlock();
  commit.request.blocks[0].tokens = {10, 12};
  ledger.OnCommand(commit, true);
  EXPECT_THAT(report.violation(), HasSubstr("with other tokens, history or salt"));
}

// What was in flight is not done, though it may have been written.
TEST_F(Checks, RefuseACommitOfTokensThatWereInFlightWhenTheGroupWasLost) {
  Lease(kLeased);
  ledger.OnPlan(PromptPlan(1, 1, kBlocks, 0));
  ledger.OnGroupLost(/*kv_trusted=*/true);
  ledger.OnCommand(CommitOfFirstBlock(), true);
  EXPECT_THAT(report.violation(), HasSubstr("acknowledged 0 of 2 tokens"));
}

TEST_F(Checks, RefuseACommitOfWhatAGroupWroteThatIsNotTrusted) {
  for (const bool kv_trusted : {true, false}) {
    ledger.OnPoolReplaced(config.scheduler.num_blocks);
    Lease(kLeased);
    ledger.OnPlan(PromptPlan(1, 1, kBlocks, 0));
    ledger.OnPlanDone(1);
    ledger.OnGroupLost(kv_trusted);
    ledger.OnCommand(CommitOfFirstBlock(), true);
    EXPECT_EQ(report.ok(), kv_trusted);
  }
  EXPECT_THAT(report.violation(), HasSubstr("acknowledged 0 of 2 tokens"));
}

TEST_F(Checks, RefuseARowOfASlotThatWasLostWithTheGroup) {
  Lease(kLeased);
  ledger.OnPlan(PromptPlan(1, 1, kBlocks, 0));
  ledger.OnPlanDone(1);
  ledger.OnGroupLost(/*kv_trusted=*/true);
  StepPlan decode;
  decode.step = 2;
  decode.rows = {{.slot = 0, .position = 5, .length = 1, .sample = true, .tokens = {20}}};
  ledger.OnPlan(decode);
  EXPECT_THAT(report.violation(), HasSubstr("a row of slot 0, which is not in use"));
}

// It is planned again, or what it was to fill is not read.
TEST_F(Checks, RefuseARowThatReadsARestoreWhichWasLostWithTheGroup) {
  for (const bool ordered_again : {true, false}) {
    ledger.OnPoolReplaced(config.scheduler.num_blocks);
    Lease({{1, 1}, {2, 1}});
    ledger.OnCommand(MatchCommand{.tag = 2, .salt = "", .tokens = kPrompt}, true);
    ledger.OnReply(
        Matched{.tag = 2,
                .result = {.device = {},
                           .restoring = {{7, {0, 1}}},
                           .copies = {{5, CopyDirection::kToDevice, {0, 1}, /*host_slot=*/1}}}});
    StepPlan copies;
    copies.step = 1;
    copies.copies = {{.to_device = true, .block = BlockId{0}, .host_slot = 1}};
    ledger.OnPlan(copies);
    ledger.OnGroupLost(/*kv_trusted=*/true);
    copies.step = 2;
    if (ordered_again) ledger.OnPlan(copies);
    ledger.OnPlan(PromptPlan(3, 1, kBlocks, 0, /*position=*/2));
    EXPECT_EQ(report.ok(), ordered_again) << report.violation();
    ledger.OnGroupLost(/*kv_trusted=*/true);
  }
  EXPECT_THAT(report.violation(), HasSubstr("has not been restored"));
}

TEST_F(Checks, RankRefusesAPrefixThatWasWrittenInABadStep) {
  rank.Execute(PromptPlan(1, 1, kBlocks, 0));
  memory.SpoilSince(2);
  rank.Execute(PromptPlan(2, 2, {BlockId{0}, BlockId{1}, BlockId{3}}, 1, /*position=*/4));
  EXPECT_EQ(report.violation(), "");
  memory.SpoilSince(1);
  rank.JoinGroup();
  rank.Execute(PromptPlan(3, 2, {BlockId{0}, BlockId{1}, BlockId{4}}, 1, /*position=*/4));
  EXPECT_THAT(report.violation(), StartsWith("I4: rank 0, sequence 2.0 at position 4: block 0"));
}

TEST_F(Checks, RankFindsThatItsSlotsWentWithTheGroup) {
  rank.Execute(PromptPlan(1, 1, kBlocks, 0));
  rank.JoinGroup();
  StepPlan decode;
  decode.step = 9;
  decode.pool_epoch = 1;
  decode.rows = {{.slot = 0, .position = 5, .length = 1, .sample = true}};
  rank.Execute(decode);
  EXPECT_THAT(report.violation(), HasSubstr("slot 0 is not in use"));
}

// The same memory under a process that has come in the place of another one.
TEST_F(Checks, RankGoesOnFromTheMemoryOfTheOneBefore) {
  rank.Execute(PromptPlan(1, 1, kBlocks, 0));
  SimulatedRank next(config, 0, &references, &report);
  next.AttachPool(/*pool_epoch=*/1, &memory);
  const int32_t token = references.Find(SequenceKey{1, 0})->tokens[5];
  StepPlan plan = PromptPlan(2, 1, kBlocks, 0);
  plan.rows = {{.slot = 0, .position = 5, .length = 1, .sample = true, .tokens = {token}}};
  next.Execute(plan);
  EXPECT_EQ(report.violation(), "");
  SimulatedRank implicit(config, 0, &references, &report);
  implicit.AttachPool(/*pool_epoch=*/1, &memory);
  plan.rows[0].tokens.clear();
  implicit.Execute(plan);
  EXPECT_THAT(report.violation(), HasSubstr("no token was sampled there"));
}

TEST_F(Checks, AClientRefusesATokenThatItHasAlready) {
  SimulationConfig one = config;
  one.num_requests = 1;
  one.num_documents = 1;
  one.max_prompt_tokens = 5;
  one.max_answer_tokens = 4;
  References texts{one};
  ScheduledRequest submitted;
  Clients clients(one, &texts, &clock, &report,
                  {.is_server_there = [] { return true; },
                   .submit =
                       [&submitted](const ScheduledRequest& request) {
                         submitted = request;
                         return absl::OkStatus();
                       },
                   .cancel_request = [](uint64_t) {},
                   .cancel_choice = [](const SequenceKey&) {},
                   .done = [] {}});
  clients.Start();
  while (clock.RunNext()) {
  }
  const SequenceKey key{submitted.id, 0};
  const ReferenceSequence* text = texts.Find(key);
  ASSERT_NE(text, nullptr);
  ASSERT_GT(text->answer_len, 1u);
  clients.OnStarted({.sequence = key, .num_cached_tokens = 0});
  const int32_t first = text->tokens[text->prompt_len];
  clients.OnToken({.sequence = key, .token = first, .end = std::nullopt});
  EXPECT_EQ(report.violation(), "");
  clients.OnToken({.sequence = key, .token = first, .end = std::nullopt});
  EXPECT_THAT(report.violation(), StartsWith("I1: sequence"));
}

TEST_F(Checks, RankRefusesToReadAPromptThatNobodyAskedForOrThatGoesOnOtherwise) {
  StepPlan plan = PromptPlan(1, 2, kBlocks, 0);
  plan.rows[0].prompt_logprobs = true;
  EXPECT_EQ(rank.Execute(plan).prompt_logprobs[0].tokens,
            references.Find(SequenceKey{2, 0})->PromptLogprobs());
  EXPECT_EQ(report.violation(), "");
  StepPlan piece = PromptPlan(2, 2, kBlocks, 1);
  piece.rows[0] = {
      .slot = 1, .length = 2, .tokens = {10, 11}, .prompt_logprobs = true, .next_token = 13};
  rank.Execute(piece);
  EXPECT_THAT(report.violation(), StartsWith("I7: rank 0, sequence 2.0: a row of 2 at position 0"));
}

TEST_F(Checks, RankRefusesToReadAPromptOfASequenceThatDoesNotAsk) {
  StepPlan plan = PromptPlan(1, 1, kBlocks, 0);
  plan.rows[0].prompt_logprobs = true;
  rank.Execute(plan);
  EXPECT_THAT(report.violation(), StartsWith("I7: rank 0, sequence 1.0: a row of 5 at position 0"));
}

// Of the request with the number 5, which asks: nothing, something else, and what is right.
TEST_F(Checks, AClientRefusesOtherLogprobsOfItsPrompt) {
  SimulationConfig five = config;
  five.num_requests = 5;
  five.num_documents = 1;
  five.max_prompt_tokens = 5;
  five.max_answer_tokens = 4;
  for (const int spoil : {0, 1, 2}) {
    Report found{&clock, Report::Tracing::kOff};
    References texts{five};
    Clients clients(five, &texts, &clock, &found,
                    {.is_server_there = [] { return true; },
                     .submit = [](const ScheduledRequest&) { return absl::OkStatus(); },
                     .cancel_request = [](uint64_t) {},
                     .cancel_choice = [](const SequenceKey&) {},
                     .done = [] {}});
    clients.Start();
    while (clock.RunNext()) {
    }
    const SequenceKey key{5, 0};
    const ReferenceSequence& text = *texts.Find(key);
    std::vector<PositionLogprobs> logprobs = text.PromptLogprobs();
    ASSERT_FALSE(logprobs.empty());
    if (spoil == 1) logprobs.back().rank += 1;
    if (spoil == 2) logprobs.pop_back();
    clients.OnStarted({.sequence = key, .num_cached_tokens = 0});
    clients.OnToken({.sequence = key,
                     .token = text.tokens[text.prompt_len],
                     .end = text.answer_len == 1 ? std::optional(text.end) : std::nullopt,
                     .prompt_logprobs = logprobs});
    EXPECT_EQ(found.ok(), spoil == 0) << found.violation();
  }
}

TEST_F(Checks, RefuseAMatchOfAnotherSaltsEntry) {
  Lease(kLeased);
  ledger.OnPlan(PromptPlan(1, 1, kBlocks, 0));
  ledger.OnPlanDone(1);
  ledger.OnCommand(CommitOfFirstBlock(), true);
  ledger.OnReply(Committed{.tag = 1, .blocks = {{.entry = 7, .duplicate = false}}});
  ledger.OnCommand(MatchCommand{.tag = 2, .salt = "other", .tokens = kPrompt}, true);
  ledger.OnReply(
      Matched{.tag = 2, .result = {.device = {{7, {0, 1}}}, .restoring = {}, .copies = {}}});
  EXPECT_THAT(report.violation(), StartsWith("I4: entry 7 of salt ''"));
}

TEST_F(Checks, RefuseASlotThatIsUsedAgainBeforeItsRelease) {
  Lease({{0, 1}, {1, 1}, {2, 1}, {3, 1}, {4, 1}, {5, 1}});
  ledger.OnPlan(PromptPlan(1, 1, kBlocks, 0));
  ledger.OnPlan(PromptPlan(2, 2, {BlockId{3}, BlockId{4}, BlockId{5}}, 0));
  EXPECT_THAT(report.violation(), HasSubstr("slot 0 is used again before its release"));
}

TEST_F(Checks, RankRefusesASlotThatIsUsedAgainBeforeItsRelease) {
  rank.Execute(PromptPlan(1, 1, kBlocks, 0));
  rank.Execute(PromptPlan(2, 2, kBlocks, 0));
  EXPECT_THAT(report.violation(), HasSubstr("slot 0 was not released"));
}

TEST_F(Checks, RankReadsAPrefixThatAnotherSequenceWrote) {
  rank.Execute(PromptPlan(1, 1, kBlocks, 0));
  rank.Execute(PromptPlan(2, 2, {BlockId{0}, BlockId{1}, BlockId{3}}, 1, /*position=*/4));
  EXPECT_EQ(report.violation(), "");
}

TEST_F(Checks, RankRefusesAPrefixThatIsNotInMemory) {
  rank.Execute(PromptPlan(1, 1, kBlocks, 0));
  rank.Execute(PromptPlan(2, 2, {BlockId{0}, BlockId{4}, BlockId{3}}, 1, /*position=*/4));
  EXPECT_THAT(report.violation(), StartsWith("I4: rank 0, sequence 2.0 at position 4: block 4"));
}

TEST_F(Checks, RankMovesContentBetweenBlocksAndHostSlots) {
  rank.Execute(PromptPlan(1, 1, kBlocks, 0));
  StepPlan copies;
  copies.step = 2;
  copies.pool_epoch = 1;
  copies.copies = {{.to_device = false, .block = BlockId{1}, .host_slot = 1},
                   {.to_device = true, .block = BlockId{4}, .host_slot = 1}};
  rank.Execute(copies);
  rank.Execute(PromptPlan(3, 2, {BlockId{0}, BlockId{4}, BlockId{3}}, 1, /*position=*/4));
  EXPECT_EQ(report.violation(), "");
}

TEST_F(Checks, RankRefusesARowThatLeavesAGap) {
  rank.Execute(PromptPlan(1, 1, kBlocks, 0));
  StepPlan decode;
  decode.step = 2;
  decode.pool_epoch = 1;
  decode.rows = {{.slot = 0, .position = 6, .length = 1, .sample = true}};
  rank.Execute(decode);
  EXPECT_THAT(report.violation(), HasSubstr("row of 1 at position 6: the sequence is at 5"));
}

TEST_F(Checks, RankRefusesAWrongToken) {
  StepPlan plan = PromptPlan(1, 1, kBlocks, 0);
  plan.rows[0].tokens[3] = 99;
  rank.Execute(plan);
  EXPECT_THAT(report.violation(), StartsWith("I7: rank 0, sequence 1.0: token 99 at position 3"));
}

}  // namespace
}  // namespace wintserve::simulation
