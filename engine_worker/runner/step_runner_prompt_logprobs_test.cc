// Log-probabilities of a prompt's tokens, from the plan to the report.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <thread>
#include <vector>

#include "common/check.h"
#include "common/mapped_memory.h"
#include "engine_worker/collectives/shm/shm_collective.h"
#include "engine_worker/runner/step_runner.h"
#include "engine_worker/runner/step_runner_test_util.h"
#include "kernels/cpu/logprobs.h"
#include "tests/fakes/fake_model.h"

namespace wintserve {
namespace {

using testing::HasSubstr;
using testing_fakes::FakeModel;

constexpr int kTop = 4;
constexpr SamplingParams kSampling = {.temperature = 0, .num_prompt_top_logprobs = kTop};

// Of tokens[1…], from the logits that the model gives after each prefix.
std::vector<PositionLogprobs> Expected(const std::vector<int32_t>& tokens, int num_top = kTop) {
  std::vector<PositionLogprobs> expected;
  kernels::cpu::LogprobReader reader;
  for (size_t i = 1; i < tokens.size(); ++i) {
    std::vector<float> logits = FakeModel::LogitsAfter(std::span(tokens).first(i));
    logits.resize(kConfig.sampled_vocab_size);
    const auto row = reader.Read(logits, tokens[i], num_top);
    CHECK(row.ok());
    PositionLogprobs& position = expected.emplace_back();
    position.logprob = row->logprob;
    position.rank = row->rank;
    for (const auto [id, logprob] : row->top) position.top.push_back({id, logprob});
  }
  return expected;
}

// The rows of a prompt that is computed in pieces of these lengths, each a plan of its own.
std::vector<PositionLogprobs> RunInChunks(Rank* rank, const std::vector<int32_t>& prompt,
                                          const std::vector<size_t>& lengths) {
  std::vector<PositionLogprobs> told;
  size_t begin = 0;
  for (const size_t length : lengths) {
    const size_t end = begin + length;
    const bool is_last = end == prompt.size();
    const std::vector<int32_t> tokens(prompt.begin() + begin, prompt.begin() + end);
    StepPlan plan = {.rows = {is_last && length == 1
                                  ? PrefillRow(1, static_cast<uint32_t>(begin), tokens, true)
                                  : PromptRow(1, static_cast<uint32_t>(begin), tokens, is_last,
                                              is_last ? 0 : prompt[end])}};
    if (begin == 0) plan.slot_init = {{1, kSampling, Blocks({9, 2, 5})}};
    const StepDone done = rank->MustApply(plan);
    for (const PromptRowLogprobs& row : done.prompt_logprobs) {
      EXPECT_EQ(row.slot, 1u);
      EXPECT_EQ(row.position, told.size() + 1);
      told.insert(told.end(), row.tokens.begin(), row.tokens.end());
    }
    begin = end;
  }
  CHECK(begin == prompt.size());
  return told;
}

TEST(PromptLogprobs, AreThoseOfTheLogitsHoweverThePromptIsDivided) {
  std::vector<int32_t> prompt = Prompt(4, 150);
  prompt[77] = 950;  // of the model's vocabulary, but never sampled
  const std::vector<PositionLogprobs> expected = Expected(prompt);
  EXPECT_EQ(expected[76].logprob, -std::numeric_limits<float>::infinity());
  for (const std::vector<size_t>& lengths :
       {std::vector<size_t>{150}, {149, 1}, {1, 149}, {64, 64, 22}, {100, 1, 49}}) {
    SCOPED_TRACE(testing::PrintToString(lengths));
    Rank rank;
    EXPECT_EQ(RunInChunks(&rank, prompt, lengths), expected);
    // Several passes a plan, and several rounds of logits a pass.
    for (const int max_batch_tokens : {7, 64}) {
      for (const int max_logit_rows : {1, 3, 64}) {
        SCOPED_TRACE(max_batch_tokens * 100 + max_logit_rows);
        Rank pieces(MakeSingleRankCollective(), max_batch_tokens, kConfig, max_logit_rows);
        EXPECT_EQ(RunInChunks(&pieces, prompt, lengths), expected);
      }
    }
  }
}

TEST(PromptLogprobs, ComeBesideOtherRowsWhichTheyDoNotChange) {
  const std::vector<int32_t> prompt = Prompt(4, 100);
  const std::vector<int32_t> other = Prompt(5, 90);
  const std::vector<int32_t> third = Prompt(6, 30);
  SamplingParams asks = {.temperature = 0.8f, .seed = 3, .num_top_logprobs = 2};
  const auto run = [&](bool with_prompt_logprobs, int max_batch_tokens) {
    Rank rank(MakeSingleRankCollective(), max_batch_tokens);
    SamplingParams third_sampling = kSampling;
    third_sampling.num_prompt_top_logprobs = 0;
    StepPlan plan = {.slot_init = {{0, asks, Blocks({0, 1})},
                                   {1, kSampling, Blocks({2, 3})},
                                   {2, third_sampling, Blocks({4})}},
                     .rows = {PrefillRow(0, 0, other, true), PromptRow(1, 0, prompt, true, 0),
                              PromptRow(2, 0, third, true, 0)}};
    if (!with_prompt_logprobs) {
      for (PlanRow& row : plan.rows) row.prompt_logprobs = false;
    }
    std::vector<StepDone> done = {rank.MustApply(plan)};
    done.push_back(
        rank.MustApply({.rows = {DecodeRow(0, 90), DecodeRow(1, 100), DecodeRow(2, 30)}}));
    EXPECT_EQ(rank.model().num_token_logits(), with_prompt_logprobs ? 99 + 29 : 0);
    return done;
  };
  for (const int max_batch_tokens : {512, 40}) {
    SCOPED_TRACE(max_batch_tokens);
    const std::vector<StepDone> with = run(true, max_batch_tokens);
    const std::vector<StepDone> without = run(false, max_batch_tokens);
    for (size_t i = 0; i < 2; ++i) {
      ASSERT_EQ(with[i].sampled.size(), 3u);
      for (size_t row = 0; row < 3; ++row) {
        EXPECT_EQ(with[i].sampled[row].token, without[i].sampled[row].token);
        EXPECT_EQ(with[i].sampled[row].logprobs, without[i].sampled[row].logprobs);
      }
      EXPECT_TRUE(without[i].prompt_logprobs.empty());
    }
    EXPECT_TRUE(with[0].sampled[0].logprobs.has_value());
    ASSERT_EQ(with[0].prompt_logprobs.size(), 2u);
    EXPECT_EQ(with[0].prompt_logprobs[0].slot, 1u);
    EXPECT_EQ(with[0].prompt_logprobs[0].tokens, Expected(prompt));
    EXPECT_EQ(with[0].prompt_logprobs[1].slot, 2u);
    EXPECT_EQ(with[0].prompt_logprobs[1].tokens, Expected(third, 0));
    EXPECT_TRUE(with[1].prompt_logprobs.empty());
  }
}

TEST(PromptLogprobs, OfAPromptThatGoesOnAfterACachedPrefixBeginBehindIt) {
  const std::vector<int32_t> prompt = Prompt(7, 130);
  Rank rank;
  rank.MustApply({.slot_init = {{0, {}, Blocks({3})}},
                  .rows = {PrefillRow(0, 0, {prompt.begin(), prompt.begin() + 64}, false)}});
  const StepDone done =
      rank.MustApply({.slot_init = {{1, kSampling, Blocks({3, 7, 8})}},
                      .rows = {PromptRow(1, 64, {prompt.begin() + 64, prompt.end()}, true, 0)}});
  const std::vector<PositionLogprobs> expected = Expected(prompt);
  ASSERT_EQ(done.prompt_logprobs.size(), 1u);
  EXPECT_EQ(done.prompt_logprobs[0].position, 65u);
  EXPECT_EQ(done.prompt_logprobs[0].tokens,
            std::vector<PositionLogprobs>(expected.begin() + 64, expected.end()));
}

TEST(PromptLogprobs, ComeFromRank0AfterAllRanksHaveComputedThem) {
  constexpr int64_t kSlotBytes = 4096;
  const std::vector<int32_t> prompt = Prompt(4, 150);
  auto memory = MappedMemory::Create("step_runner_test", ShmGroupMemoryBytes(2, kSlotBytes));
  ASSERT_TRUE(memory.ok());
  const auto shared = std::make_shared<MappedMemory>(*std::move(memory));
  std::vector<std::vector<PositionLogprobs>> told(2);
  const auto run = [&](int index) {
    auto collective = ShmCollective::Create(shared, {.group_epoch = kConfig.group_epoch,
                                                     .rank = index,
                                                     .world_size = 2,
                                                     .slot_bytes = kSlotBytes});
    CHECK(collective.ok());
    Rank rank(*std::move(collective), 40, kConfig, /*max_logit_rows=*/9);
    told[index] = RunInChunks(&rank, prompt, {100, 50});
    EXPECT_EQ(rank.model().num_token_logits(), 149);
  };
  std::thread second(run, 1);
  run(0);
  second.join();
  EXPECT_EQ(told[0], Expected(prompt));
  EXPECT_TRUE(told[1].empty());
}

TEST(PromptLogprobs, LogitsThatAreNotFiniteNameSlotAndPosition) {
  Rank rank;
  rank.model().BreakLogits();
  const absl::Status status = rank.Apply({.slot_init = {{1, kSampling, Blocks({0})}},
                                          .rows = {PromptRow(1, 0, {5, 6}, false, 7)}})
                                  .status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
  EXPECT_THAT(status.message(),
              HasSubstr("slot 1 at position 1: a logit of the prompt is not a finite number"));
}

}  // namespace
}  // namespace wintserve
