// Log-probabilities of prompts: which rows ask for them, and when they are handed out.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "api_server/scheduler/scheduler_test_util.h"

namespace wintserve {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

constexpr SchedulerConfig kSmall = {
    .max_num_seqs = 4, .max_num_batched_tokens = 8, .block_size_tokens = 4};

ScheduledRequest Asking(uint64_t id, std::vector<int32_t> prompt, int max_tokens = 3) {
  ScheduledRequest request = {
      .id = id, .prompt_ids = std::move(prompt), .max_tokens = max_tokens, .ignore_eos = true};
  request.sampling.seed = static_cast<int64_t>(id);
  request.sampling.num_prompt_top_logprobs = 2;
  return request;
}

// Positions whose log-probabilities the plan's rows ask for, by row: first and number.
std::vector<std::pair<int, int>> AskedIn(const StepPlan& plan) {
  std::vector<std::pair<int, int>> asked;
  for (const PlanRow& row : plan.rows) {
    if (row.prompt_logprobs) asked.emplace_back(row.position + 1, row.num_prompt_logprobs());
  }
  return asked;
}

using Asked = std::vector<std::pair<int, int>>;

TEST(SchedulerPromptLogprobs, AreAskedForPieceByPieceAndComeWithTheFirstToken) {
  for (const int async_depth : {0, 2}) {
    SCOPED_TRACE(async_depth);
    SchedulerConfig config = kSmall;
    config.async_depth = async_depth;
    FakeWorld world(config);
    ASSERT_TRUE(world.Submit(Asking(1, Prompt(20))).ok());
    std::vector<Asked> asked;
    while (!world.ended({1, 0})) {
      world.Settle();
      asked.push_back(AskedIn(world.plans().front()));
      const StepPlan plan = world.plans().front();
      if (!plan.rows.front().sample) {
        EXPECT_EQ(plan.rows.front().next_token, 100 + plan.rows.front().position + 8);
      }
      world.FinishPlan();
    }
    // The last row has one token without a follower in the prompt.
    EXPECT_THAT(asked, ElementsAre(Asked{{1, 8}}, Asked{{9, 8}}, Asked{{17, 3}}, Asked{}, Asked{}));
    EXPECT_EQ(world.prompt_logprobs(1).size(), 19u);
    world.ExpectAllTokens();
  }
}

TEST(SchedulerPromptLogprobs, OfAPromptOfOneTokenAreNone) {
  FakeWorld world(kSmall);
  ASSERT_TRUE(world.Submit(Asking(1, Prompt(1))).ok());
  world.Settle();
  EXPECT_FALSE(world.plans().front().rows.front().prompt_logprobs);
  world.RunToEnd();
  world.ExpectAllTokens();
}

TEST(SchedulerPromptLogprobs, AreNotAskedForWhereTheLastTokenOfThePromptIsARowAlone) {
  FakeWorld world(kSmall);
  ASSERT_TRUE(world.Submit(Asking(1, Prompt(9))).ok());
  world.Settle();
  EXPECT_EQ(AskedIn(world.plans().front()), (Asked{{1, 8}}));
  world.FinishPlan();
  world.Settle();
  EXPECT_EQ(AskedIn(world.plans().front()), Asked{});
  world.RunToEnd();
  world.ExpectAllTokens();
}

TEST(SchedulerPromptLogprobs, NeedEveryTokenComputedAndTheBlocksServeOthersAfterwards) {
  FakeWorld world(kSmall);
  world.SubmitPrompt(Prompt(20), 2);
  world.RunToEnd();
  ASSERT_TRUE(world.Submit(Asking(8, Prompt(20))).ok());
  world.RunToEnd();
  EXPECT_EQ(world.started().at({8, 0}), 0);
  ScheduledRequest without = Asking(9, Prompt(20));
  without.sampling.num_prompt_top_logprobs = -1;
  ASSERT_TRUE(world.Submit(without).ok());
  world.RunToEnd();
  EXPECT_EQ(world.started().at({9, 0}), 16);
  world.ExpectAllTokens();
  world.ExpectAllBlocksBack();
}

TEST(SchedulerPromptLogprobs, AreComputedByTheFirstChoiceAndTheOthersWaitAndShare) {
  for (const bool caching : {true, false}) {
    SCOPED_TRACE(caching);
    SchedulerConfig config = kSmall;
    config.prefix_caching = caching;
    FakeWorld world(config);
    ScheduledRequest request = Asking(1, Prompt(20));
    request.num_choices = 3;
    ASSERT_TRUE(world.Submit(request).ok());
    int num_asked = 0;
    while (!world.ended({1, 2})) {
      world.Settle();
      for (const PlanRow& row : world.plans().front().rows) {
        if (row.prompt_logprobs) {
          EXPECT_EQ(world.OwnerOf(row.slot), (SequenceKey{1, 0}));
        }
        num_asked += static_cast<int>(row.num_prompt_logprobs());
      }
      for (const SequenceToken& news : world.FinishPlan()) {
        if (news.sequence.choice > 0) {
          EXPECT_FALSE(world.tokens(1, 0).empty());
        }
      }
    }
    EXPECT_EQ(num_asked, 19);
    EXPECT_EQ(world.started().at({1, 1}), caching ? 16 : 0);
    world.RunToEnd();
    world.ExpectAllTokens();
  }
}

TEST(SchedulerPromptLogprobs, GoOnWhereAGroupWasLostOrBeginAgainButAreTakenOnce) {
  for (const bool kv_trusted : {true, false}) {
    SCOPED_TRACE(kv_trusted);
    SchedulerConfig config = kSmall;
    config.async_depth = 1;
    FakeWorld world(config);
    ASSERT_TRUE(world.Submit(Asking(1, Prompt(30))).ok());
    world.Settle();
    world.FinishPlan();
    world.Settle();  // two plans in flight
    world.LoseGroup(kv_trusted ? std::nullopt : std::optional<uint64_t>(1));
    world.Settle();
    EXPECT_EQ(AskedIn(world.plans().front()), kv_trusted ? (Asked{{9, 8}}) : (Asked{{1, 8}}));
    world.RunToEnd();
    EXPECT_EQ(world.prompt_logprobs(1).size(), 29u);
    world.ExpectAllTokens();
    world.ExpectAllBlocksBack();
  }
}

TEST(SchedulerPromptLogprobs, AreNotAskedForAgainOnceTheyWereHandedOut) {
  FakeWorld world(kSmall);
  ASSERT_TRUE(world.Submit(Asking(1, Prompt(20), 10)).ok());
  while (world.tokens(1).size() < 2) {
    world.Settle();
    world.FinishPlan();
  }
  world.LoseGroup(1);
  while (!world.ended({1, 0})) {
    world.Settle();
    EXPECT_EQ(AskedIn(world.plans().front()), Asked{});
    world.FinishPlan();
  }
  world.ExpectAllTokens();
}

TEST(SchedulerPromptLogprobs, AResultThatDoesNotFitThePlanIsRefused) {
  struct Case {
    std::vector<PromptRowLogprobs> told;
    const char* error;
  };
  const std::vector<PositionLogprobs> two(2);
  const std::vector<PositionLogprobs> three(3);
  const Case cases[] = {
      {{}, "step 1 tells log-probabilities of 0 prompts, its plan asks for 1"},
      {{{0, 1, two}, {1, 1, two}},
       "step 1 tells log-probabilities of 2 prompts, its plan asks for 1"},
      {{{1, 1, two}},
       "of 2 prompt tokens from position 1 on in slot 1, expected 2 from 1 on in "
       "slot 0"},
      {{{0, 2, two}}, "of 2 prompt tokens from position 2 on in slot 0, expected 2 from 1"},
      {{{0, 1, three}}, "of 3 prompt tokens from position 1 on in slot 0, expected 2 from 1"},
  };
  for (const Case& bad : cases) {
    FakeWorld world(kSmall);
    ASSERT_TRUE(world.Submit(Asking(1, Prompt(3))).ok());
    world.Settle();
    const absl::Status status =
        world.scheduler().OnStepDone(1, {{0, 5}}, 1000, 0, bad.told).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
    EXPECT_THAT(std::string(status.message()), HasSubstr(bad.error));
    world.RunToEnd();
    world.ExpectAllTokens();
  }
}

}  // namespace
}  // namespace wintserve
