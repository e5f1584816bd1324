// What StepRunner refuses: plans that break a rule, and configurations beyond the model.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <vector>

#include "engine_worker/collectives/single_rank_collective.h"
#include "engine_worker/runner/step_runner.h"
#include "engine_worker/runner/step_runner_test_util.h"
#include "tests/fakes/fake_model.h"

namespace wintserve {
namespace {

using testing_fakes::FakeModel;

// A plan that breaks one rule, after this sequence of good ones: slot 0 has 3 tokens computed and
// one sampled, slot 1 has 2 tokens computed and none sampled; both own one block.
struct BadPlan {
  const char* name;
  StepPlan plan;
  const char* message;
};

class BadPlanTest : public testing::TestWithParam<BadPlan> {};

TEST_P(BadPlanTest, IsRefusedBeforeTheModelRuns) {
  Rank rank;
  rank.MustApply({.slot_init = {{0, {}, Blocks({4})}, {1, {}, Blocks({5})}},
                  .rows = {PrefillRow(0, 0, {1, 2, 3}, true), PrefillRow(1, 0, {1, 2}, false)}});
  const absl::Status status = rank.Apply(GetParam().plan).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message(), GetParam().message);
  EXPECT_EQ(rank.model().num_forwards(), 1);
}

std::vector<BadPlan> BadPlans() {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  return {
      {"InitOfASlotBeyondTheTable",
       {.slot_init = {{4, {}, {}}}},
       "slot_init: slot 4 is not in 0 … 3"},
      {"InitOfASlotInUse", {.slot_init = {{1, {}, {}}}}, "slot_init: slot 1 was not released"},
      {"InitTwice",
       {.slot_init = {{2, {}, {}}, {2, {}, {}}}},
       "slot_init: slot 2 was not released"},
      {"BlockBeyondThePool",
       {.slot_init = {{2, {}, Blocks({40})}}},
       "slot 2: block 40 is not in 0 … 39"},
      {"NegativeBlock",
       {.slot_init = {{2, {}, Blocks({-1})}}},
       "slot 2: block -1 is not in 0 … 39"},
      {"TooManyBlocks",
       {.slot_init = {{2, {}, std::vector<BlockId>(11)}}},
       "slot 2: a block table of 11 blocks, 600 tokens need at most 10"},
      {"NegativeTemperature",
       {.slot_init = {{2, {.temperature = -1}, {}}}},
       "slot 2: temperature -1 is not a finite number >= 0"},
      {"NanTemperature",
       {.slot_init = {{2, {.temperature = kNan}, {}}}},
       "slot 2: temperature nan is not a finite number >= 0"},
      {"TopPOfZero", {.slot_init = {{2, {.top_p = 0}, {}}}}, "slot 2: top_p 0 is not in (0, 1]"},
      {"NanTopP", {.slot_init = {{2, {.top_p = kNan}, {}}}}, "slot 2: top_p nan is not in (0, 1]"},
      {"NegativeTopK", {.slot_init = {{2, {.top_k = -2}, {}}}}, "slot 2: top_k -2 is negative"},
      {"MinPAboveOne", {.slot_init = {{2, {.min_p = 2}, {}}}}, "slot 2: min_p 2 is not in [0, 1]"},
      {"NanMinP", {.slot_init = {{2, {.min_p = kNan}, {}}}}, "slot 2: min_p nan is not in [0, 1]"},
      {"RepetitionPenaltyOfZero",
       {.slot_init = {{2, {.repetition_penalty = 0}, {}}}},
       "slot 2: repetition_penalty 0 is not a finite number > 0"},
      {"PresencePenaltyTooLarge",
       {.slot_init = {{2, {.presence_penalty = -3}, {}}}},
       "slot 2: presence_penalty -3 is not in [-2, 2]"},
      {"NanFrequencyPenalty",
       {.slot_init = {{2, {.frequency_penalty = kNan}, {}}}},
       "slot 2: frequency_penalty nan is not in [-2, 2]"},
      {"TooManyTopLogprobs",
       {.slot_init = {{2, {.num_top_logprobs = 21}, {}}}},
       "slot 2: 21 top log-probabilities, allowed are 0 … 20"},
      {"TooManyPromptTopLogprobs",
       {.slot_init = {{2, {.num_prompt_top_logprobs = 21}, {}}}},
       "slot 2: 21 top log-probabilities, allowed are 0 … 20"},
      {"PromptLogprobsOfASlotThatAsksForNone",
       {.rows = {PromptRow(1, 2, {7, 8}, false, 9)}},
       "slot 1: a row asks for log-probabilities of its prompt, the slot for none"},
      {"PromptLogprobsOfNoToken",
       {.slot_init = {{2, {.num_prompt_top_logprobs = 0}, Blocks({6})}},
        .rows = {PromptRow(2, 0, {7}, true, 0)}},
       "slot 2: a row asks for log-probabilities, but it brings no token of a prompt that follows "
       "another one"},
      {"NextTokenBeyondTheVocabulary",
       {.slot_init = {{2, {.num_prompt_top_logprobs = 0}, Blocks({6})}},
        .rows = {PromptRow(2, 0, {7}, false, 1000)}},
       "slot 2: the next token 1000 is not in 0 … 999"},
      {"BiasOfNoToken",
       {.slot_init = {{2, {.logit_biases = {{1000, 1}}}, {}}}},
       "slot 2: a bias of token 1000, which is not in 0 … 999"},
      {"BiasesOutOfOrder",
       {.slot_init = {{2, {.logit_biases = {{5, 1}, {5, 2}}}, {}}}},
       "slot 2: a bias of token 5 after one of 5"},
      {"BiasTooLarge",
       {.slot_init = {{2, {.logit_biases = {{5, 101}}}, {}}}},
       "slot 2: the bias 101 of token 5 is not in [-100, 100]"},
      {"TooManyBiases",
       {.slot_init = {{2, {.logit_biases = std::vector<TokenBias>(1025)}, {}}}},
       "slot 2: 1025 logit biases, allowed are 1024"},
      {"HistoryOfNoTokens",
       {.slot_init = {{2, {}, {}, {1, 1000}, {}}}},
       "slot 2: token 1000 of its history is not in 0 … 999"},
      {"HistoryTooLong",
       {.slot_init = {{2, {}, {}, std::vector<int32_t>(300), std::vector<int32_t>(301)}}},
       "slot 2: a history of 601 tokens, sequences have at most 600"},
      {"AppendToAFreeSlot",
       {.block_append = {{2, Blocks({1})}}},
       "block_append: slot 2 is not in use"},
      {"AppendOfABadBlock",
       {.block_append = {{0, Blocks({99})}}},
       "slot 0: block 99 is not in 0 … 39"},
      {"RowOfAFreeSlot", {.rows = {DecodeRow(3, 0)}}, "row: slot 3 is not in use"},
      {"RowOfASlotBeyondTheTable",
       {.rows = {DecodeRow(1u << 31, 0)}},
       "row: slot 2147483648 is not in use"},
      {"TwoRowsOfASlot",
       {.rows = {DecodeRow(0, 3), DecodeRow(0, 4)}},
       "rows: slot 0 is named twice"},
      {"RowWithoutTokens", {.rows = {PrefillRow(0, 3, {}, true)}}, "slot 0: a row without tokens"},
      {"PositionAhead",
       {.rows = {DecodeRow(0, 4)}},
       "slot 0: a row at position 4, the sequence is at 3"},
      {"PositionBehind",
       {.rows = {DecodeRow(0, 2)}},
       "slot 0: a row at position 2, the sequence is at 3"},
      {"BlockTableTooShort",
       {.rows = {PrefillRow(0, 3, std::vector<int32_t>(62), true)}},
       "slot 0: a row up to position 65, its block table covers 64"},
      {"SequenceTooLong",
       {.slot_init = {{2, {}, std::vector<BlockId>(10)}}, .rows = {PrefillRow(2, 600, {1}, true)}},
       "slot 2: a row up to position 601, sequences have at most 600 tokens"},
      {"PositionThatWraps",
       {.slot_init = {{2, {}, std::vector<BlockId>(10)}},
        .rows = {PrefillRow(2, 0xffffffff, {1}, true)}},
       "slot 2: a row up to position 4294967296, sequences have at most 600 tokens"},
      {"SeveralTokensFromTheSlot",
       {.rows = {{0, 3, 2, true, {}}}},
       "slot 0: a row of 2 tokens without any id; only one can come from the slot"},
      {"NothingSampledInTheSlot",
       {.rows = {DecodeRow(1, 2)}},
       "slot 1: no token was sampled there that a row could take up"},
      {"FewerIdsThanTokens",
       {.rows = {{0, 3, 2, true, {1}}}},
       "slot 0: a row of 2 tokens with 1 ids"},
      {"TokenBeyondTheVocabulary",
       {.rows = {PrefillRow(0, 3, {1000}, true)}},
       "slot 0: token 1000 is not in 0 … 999"},
      {"NegativeToken",
       {.rows = {PrefillRow(0, 3, {-1}, true)}},
       "slot 0: token -1 is not in 0 … 999"},
      {"TooManyTokens",
       {.slot_init = {{2, {}, std::vector<BlockId>(10)}},
        .rows = {DecodeRow(0, 3), PrefillRow(2, 0, std::vector<int32_t>(600), true)}},
       "the plan has 601 tokens, allowed are 600"},
      {"ReleaseOfAFreeSlot", {.slot_release = {2}}, "slot_release: slot 2 is not in use"},
      {"CopyOfABlockThatIsNone",
       {.copies = {{.to_device = true, .block = BlockId{40}, .host_slot = 0}}},
       "copies: block 40 is not in 0 … 39"},
      {"CopyOfANegativeBlock",
       {.copies = {{.to_device = false, .block = BlockId{-1}, .host_slot = 0}}},
       "copies: block -1 is not in 0 … 39"},
      {"CopyOfAHostSlotThatIsNone",
       {.copies = {{.to_device = false, .block = BlockId{1}, .host_slot = 3}}},
       "copies: host slot 3 is not in 0 … 2"},
      {"TwoCopiesToABlock",
       {.copies = {{.to_device = true, .block = BlockId{7}, .host_slot = 0},
                   {.to_device = true, .block = BlockId{7}, .host_slot = 1}}},
       "copies: block 7 is the target of two"},
      {"TwoCopiesToAHostSlot",
       {.copies = {{.to_device = false, .block = BlockId{7}, .host_slot = 2},
                   {.to_device = false, .block = BlockId{8}, .host_slot = 2}}},
       "copies: host slot 2 is the target of two"},
      {"ReleaseTwice", {.slot_release = {0, 0}}, "slot_release: slot 0 is named twice"},
  };
}
INSTANTIATE_TEST_SUITE_P(Rules, BadPlanTest, testing::ValuesIn(BadPlans()),
                         [](const auto& info) { return info.param.name; });

struct BadChain {
  const char* name;
  std::function<void(StepPlan*)> spoil;
  const char* message;
};

class BadChainTest : public testing::TestWithParam<BadChain> {};

TEST_P(BadChainTest, IsRefused) {
  const auto collective = MakeSingleRankCollective();
  FakeModel model(collective.get());
  std::vector<int32_t> pool(kConfig.num_blocks * FakeModel::kBlockTokens);
  std::vector<int32_t> host_tier(kConfig.num_host_slots * FakeModel::kBlockTokens);
  auto runner =
      StepRunner::Create(kConfig, &model, collective.get(), pool.data(), host_tier.data());
  ASSERT_TRUE(runner.ok());
  StepPlan plan = {.group_epoch = 0xa, .pool_epoch = 0xb, .step = 1};
  ASSERT_TRUE((*runner)->Apply(plan, 0xfeed).ok());
  plan.step = 2;
  plan.previous_plan_hash = 0xfeed;
  GetParam().spoil(&plan);
  const absl::Status status = (*runner)->Apply(plan, 0xbeef).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(status.message(), GetParam().message);
}
INSTANTIATE_TEST_SUITE_P(
    Rules, BadChainTest,
    testing::Values(BadChain{"OtherGroup", [](StepPlan* plan) { plan->group_epoch = 0xc; },
                             "plan of group epoch c, this group is a"},
                    BadChain{"OtherPool", [](StepPlan* plan) { plan->pool_epoch = 0xc; },
                             "plan of pool epoch c, the mapped pool is b"},
                    BadChain{"StepRepeated", [](StepPlan* plan) { plan->step = 1; },
                             "plan of step 1 after step 1"},
                    BadChain{"StepSkipped", [](StepPlan* plan) { plan->step = 3; },
                             "plan of step 3 after step 1"},
                    BadChain{
                        "OtherHistory", [](StepPlan* plan) { plan->previous_plan_hash = 1; },
                        "step 2 follows a plan with hash 1, this rank executed one with feed"}),
    [](const auto& info) { return info.param.name; });

struct BadConfig {
  const char* name;
  std::function<void(StepRunnerConfig*)> spoil;
  const char* message;
};

class BadConfigTest : public testing::TestWithParam<BadConfig> {};

TEST_P(BadConfigTest, NamesTheNumberAndWhatTheWorkerCanDo) {
  const auto collective = MakeSingleRankCollective();
  FakeModel model(collective.get());
  StepRunnerConfig config = kConfig;
  GetParam().spoil(&config);
  const auto runner = StepRunner::Create(config, &model, collective.get(), nullptr, nullptr);
  EXPECT_EQ(runner.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(runner.status().message(), GetParam().message);
}
INSTANTIATE_TEST_SUITE_P(
    Rules, BadConfigTest,
    testing::Values(BadConfig{"NoSlots", [](StepRunnerConfig* config) { config->max_slots = 0; },
                              "max_slots is 0, this worker can do 1 … 65536"},
                    BadConfig{"SequencesBeyondTheModel",
                              [](StepRunnerConfig* config) { config->max_sequence_tokens = 4097; },
                              "max_sequence_tokens is 4097, this worker can do 1 … 4096"},
                    BadConfig{"SamplingBeyondTheVocabulary",
                              [](StepRunnerConfig* config) { config->sampled_vocab_size = 1001; },
                              "sampled_vocab_size is 1001, this worker can do 1 … 1000"},
                    BadConfig{"StopIdBeyondTheVocabulary",
                              [](StepRunnerConfig* config) {
                                config->stop_ids = {2, 1000};
                              },
                              "stop_ids holds 1000, this model has ids 0 … 999"},
                    BadConfig{"NegativeStopId",
                              [](StepRunnerConfig* config) { config->stop_ids = {-1}; },
                              "stop_ids holds -1, this model has ids 0 … 999"},
                    BadConfig{"NoBlocks", [](StepRunnerConfig* config) { config->num_blocks = 0; },
                              "num_blocks is 0, this worker can do 1 … 2147483647"}),
    [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace wintserve
