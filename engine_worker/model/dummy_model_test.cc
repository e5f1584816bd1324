// A deep model of dummy weights: activations and logits stay of the order of 1, tokens spread over
// the experts.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>
#include <vector>

#include "engine_worker/model/dummy_model_test_util.h"
#include "kernels/cpu/cpu_backend.h"

namespace wintserve {
namespace {

double Deviation(const std::vector<float>& values) {
  double squares = 0;
  for (const float value : values) squares += double{value} * value;
  return std::sqrt(squares / static_cast<double>(values.size()));
}

double Mean(const std::vector<int>& counts) {
  return std::accumulate(counts.begin(), counts.end(), 0.0) / static_cast<double>(counts.size());
}

TEST(DummyModel, LogitsHaveTheSizeThatASamplerIsUsedTo) {
  for (const bool tied : {false, true}) {
    SCOPED_TRACE(tied);
    ModelConfig config = DeepConfig();
    config.tie_word_embeddings = tied;
    DummyModel model(config, kernels::cpu::CreateCpuBackend({}));
    std::set<size_t> best;
    std::vector<std::vector<float>> rows = model.DecodeEach(1);
    int num_own = 0;
    for (size_t i = 0; i < rows.size(); ++i) {
      for (const float logit : rows[i]) ASSERT_TRUE(std::isfinite(logit));
      EXPECT_GT(Deviation(rows[i]), 1);
      EXPECT_LT(Deviation(rows[i]), 4);
      const size_t id = std::max_element(rows[i].begin(), rows[i].end()) - rows[i].begin();
      best.insert(id);
      num_own += id == (1 + 7 * i) % rows[i].size() ? 1 : 0;
    }
    // Streams go on with tokens of their own, and not with the one that they have.
    EXPECT_GT(best.size(), rows.size() / 2);
    EXPECT_LT(num_own, static_cast<int>(rows.size()) / 8);
    const std::vector<float> prefill = model.Prefill(1);
    EXPECT_GT(Deviation(prefill), 1);
    EXPECT_LT(Deviation(prefill), 4);
  }
}

TEST(DummyModel, TokensSpreadOverTheExpertsUnlessTheRouterIsSkewed) {
  DummyModel spread(DeepConfig(), kernels::cpu::CreateCpuBackend({}));
  spread.DecodeEach(5);
  const std::vector<int> counts = spread.DistinctExperts();
  ASSERT_EQ(counts.size(), 51u);
  EXPECT_THAT(counts, ::testing::Each(::testing::Ge(15)));  // of 16, by 64 tokens with 4 each

  DummyModel skewed(DeepConfig(), kernels::cpu::CreateCpuBackend({}), {.router_skew = 1000});
  skewed.DecodeEach(5);
  // Two biases may happen to be as near as two of a token's probabilities.
  EXPECT_THAT(skewed.DistinctExperts(), ::testing::Each(::testing::Le(6)));
  EXPECT_LT(Mean(skewed.DistinctExperts()), 4.5);

  DummyModel between(DeepConfig(), kernels::cpu::CreateCpuBackend({}), {.router_skew = 4});
  between.DecodeEach(5);
  EXPECT_GT(Mean(between.DistinctExperts()), 5);
  EXPECT_LT(Mean(between.DistinctExperts()), 15);
}

TEST(DummyModel, SaysWhatItsActivationsTake) {
  DummyModel model(DeepConfig(), kernels::cpu::CreateCpuBackend({}));
  // Three of the hidden size, qkv, attention's output and logits at the least, float32.
  const int64_t floats = DummyModel::kTokens * (3 * 256 + 512 + 256 + 1000);
  EXPECT_GE(model.model().workspace_bytes(), floats * 4);
  EXPECT_LE(model.model().workspace_bytes(), floats * 4 * 3 / 2);
}

}  // namespace
}  // namespace wintserve
