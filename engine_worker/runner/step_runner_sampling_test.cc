// Penalties, biases and log-probabilities from the plan to the report.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <optional>
#include <span>
#include <vector>

#include "engine_worker/runner/step_runner.h"
#include "engine_worker/runner/step_runner_test_util.h"
#include "tests/fakes/fake_model.h"

namespace wintserve {
namespace {

using testing_fakes::FakeModel;

constexpr int32_t kSampledVocab = 900;

// The greedy token by the definition of penalties, from the logits that the model gave.
int32_t GreedyToken(std::span<const float> logits, const SamplingParams& sampling,
                    const std::vector<int32_t>& prompt, const std::vector<int32_t>& generated) {
  std::vector<double> scores(logits.begin(), logits.begin() + kSampledVocab);
  for (const auto [token, bias] : sampling.logit_biases) scores[token] += bias;
  std::map<int32_t, int> counts;
  for (const int32_t token : prompt) counts[token] += 0;
  for (const int32_t token : generated) ++counts[token];
  for (const auto& [token, count] : counts) {
    if (token >= kSampledVocab) continue;
    double& score = scores[token];
    score = score < 0 ? score * sampling.repetition_penalty : score / sampling.repetition_penalty;
    if (count > 0) score -= count * sampling.frequency_penalty + sampling.presence_penalty;
  }
  return static_cast<int32_t>(std::max_element(scores.begin(), scores.end()) - scores.begin());
}

struct Penalised {
  const char* name;
  SamplingParams sampling;
};

class PenaltyTest : public testing::TestWithParam<Penalised> {};

TEST_P(PenaltyTest, TokensFollowTheDefinitionStepByStep) {
  const SamplingParams& sampling = GetParam().sampling;
  const std::vector<int32_t> prompt = Prompt(4, 300);
  Rank rank;
  std::vector<int32_t> generated;
  int num_changed = 0;
  StepPlan plan = {.slot_init = {{1, sampling, Blocks({0, 1, 2, 3, 4, 5, 6}), prompt}},
                   .rows = {PrefillRow(1, 0, prompt, true)}};
  for (uint32_t i = 0; i < 100; ++i) {
    const int32_t token = rank.MustApply(plan).sampled.at(0).token;
    const std::span<const float> logits = rank.model().logits();
    ASSERT_EQ(token, GreedyToken(logits, sampling, prompt, generated)) << "token " << i;
    num_changed += token != GreedyToken(logits, {}, {}, {}) ? 1 : 0;
    generated.push_back(token);
    plan = {.rows = {DecodeRow(1, 300 + i)}};
  }
  EXPECT_GT(num_changed, 5);  // the penalties did something
}

// Logits are below 8, so a bias of 6 makes few tokens come again and again.
const std::vector<TokenBias> kFavourites = {{5, 6}, {6, 6}, {7, 6}, {8, 6}, {9, 6}};

INSTANTIATE_TEST_SUITE_P(
    Each, PenaltyTest,
    testing::Values(
        Penalised{"Repetition", {.temperature = 0, .repetition_penalty = 1.3f}},
        Penalised{"Presence",
                  {.temperature = 0, .presence_penalty = 1.5f, .logit_biases = kFavourites}},
        Penalised{"Frequency",
                  {.temperature = 0, .frequency_penalty = 0.75f, .logit_biases = kFavourites}},
        Penalised{"All",
                  {.temperature = 0,
                   .repetition_penalty = 0.8f,
                   .presence_penalty = -0.5f,
                   .frequency_penalty = 1.25f,
                   .logit_biases = kFavourites}}),
    [](const auto& info) { return info.param.name; });

TEST(StepRunnerSampling, ASequenceThatIsComputedAgainGoesOnWithTheSameTokens) {
  const std::vector<int32_t> prompt = Prompt(4, 100);
  const SamplingParams sampling = {.temperature = 0.7f,
                                   .seed = 9,
                                   .repetition_penalty = 1.2f,
                                   .frequency_penalty = 0.75f,
                                   .logit_biases = kFavourites};
  const auto run = [&](std::optional<size_t> preempt_after) {
    Rank rank;
    std::vector<int32_t> generated;
    uint32_t slot = 0;
    StepPlan plan = {.slot_init = {{slot, sampling, Blocks({0, 1, 2}), prompt}},
                     .rows = {PrefillRow(slot, 0, prompt, true)}};
    while (generated.size() < 80) {
      generated.push_back(rank.MustApply(plan).sampled.at(0).token);
      plan = {.rows = {DecodeRow(slot, static_cast<uint32_t>(99 + generated.size()))}};
      if (generated.size() != preempt_after) continue;
      rank.MustApply({.slot_release = {slot}});
      slot = 3;
      std::vector<int32_t> all = prompt;
      all.insert(all.end(), generated.begin(), generated.end());
      plan = {.slot_init = {{slot, sampling, Blocks({9, 8, 7}), prompt, generated}},
              .rows = {PrefillRow(slot, 0, all, true)}};
    }
    return generated;
  };
  const std::vector<int32_t> undisturbed = run(std::nullopt);
  EXPECT_EQ(run(1), undisturbed);
  EXPECT_EQ(run(40), undisturbed);
}

TEST(StepRunnerSampling, LogprobsAreReportedForTheSlotsThatAsk) {
  Rank rank;
  const StepDone done = rank.MustApply(
      {.slot_init = {{0, {.temperature = 0, .num_top_logprobs = 3}, Blocks({0})},
                     {1, {.temperature = 0}, Blocks({1})},
                     {2,
                      {.temperature = 5, .logit_biases = {{17, 100}}, .num_top_logprobs = 0},
                      Blocks({2})}},
       .rows = {PrefillRow(0, 0, {1, 2, 3}, true), PrefillRow(1, 0, {4, 5}, true),
                PrefillRow(2, 0, {6}, true)}});
  ASSERT_EQ(done.sampled.size(), 3u);
  EXPECT_FALSE(done.sampled[1].logprobs.has_value());
  for (const size_t i : {0, 2}) {
    SCOPED_TRACE(i);
    ASSERT_TRUE(done.sampled[i].logprobs.has_value());
    const auto row = rank.model().logits().subspan(i * FakeModel::kVocabSize, kSampledVocab);
    double total = 0;
    for (const float logit : row) total += std::exp(double{logit});
    const auto logprob_of = [&](int32_t id) { return row[id] - std::log(total); };
    const PositionLogprobs& logprobs = *done.sampled[i].logprobs;
    EXPECT_NEAR(logprobs.logprob, logprob_of(done.sampled[i].token), 1e-5);
    const auto num_larger =
        std::ranges::count_if(row, [&](float logit) { return logit > row[done.sampled[i].token]; });
    EXPECT_GT(logprobs.rank, num_larger);
    ASSERT_EQ(logprobs.top.size(), i == 0 ? 3u : 0u);
    for (size_t j = 0; j < logprobs.top.size(); ++j) {
      EXPECT_NEAR(logprobs.top[j].logprob, logprob_of(logprobs.top[j].token), 1e-5);
      EXPECT_LE(logprobs.top[j].logprob, logprobs.top[j == 0 ? 0 : j - 1].logprob);
    }
  }
  EXPECT_EQ(done.sampled[0].logprobs->rank, 1);
  EXPECT_EQ(done.sampled[0].logprobs->top[0].token, done.sampled[0].token);
  // The bias decides the token, and its log-probability does not know of it.
  EXPECT_EQ(done.sampled[2].token, 17);
}

TEST(StepRunnerSampling, LogprobsOfAPlanThatTakesSeveralPassesAreThoseOfOne) {
  const auto run = [](int max_batch_tokens) {
    Rank rank(MakeSingleRankCollective(), max_batch_tokens);
    StepPlan plan;
    for (uint32_t slot = 0; slot < 4; ++slot) {
      plan.slot_init.push_back({slot,
                                {.seed = slot, .num_top_logprobs = slot == 2 ? -1 : 5},
                                Blocks({static_cast<int>(slot)})});
      plan.rows.push_back(PrefillRow(slot, 0, Prompt(slot, 10), true));
    }
    std::vector<std::optional<PositionLogprobs>> logprobs;
    for (const SampledToken& sampled : rank.MustApply(plan).sampled) {
      logprobs.push_back(sampled.logprobs);
    }
    return logprobs;
  };
  const auto whole = run(512);
  ASSERT_EQ(whole.size(), 4u);
  EXPECT_FALSE(whole[2].has_value());
  EXPECT_EQ(run(7), whole);
}

}  // namespace
}  // namespace wintserve
