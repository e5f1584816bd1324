#include "kernels/cpu/row_ops.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/test_util.h"

namespace wintserve::kernels::cpu {
namespace {

TEST(RmsNorm, StaysWithinItsBoundAndWritesTheSumBack) {
  std::mt19937 rng(1);
  constexpr float kEpsilonOfNorm = 1e-5f;
  for (const int64_t columns : {1, 7, 16, 64, 100, 384, 2560}) {
    SCOPED_TRACE(columns);
    const std::vector<float> x = RandomFloats(columns, &rng);
    const std::vector<float> delta = RandomFloats(columns, &rng);
    const std::vector<float> gain = RandomFloats(columns, &rng);
    ForEachTarget([&] {
      std::vector<float> sum = x;
      std::vector<float> out(columns);
      AddRmsNormRow(sum.data(), delta.data(), columns, gain.data(), kEpsilonOfNorm, out.data());
      double squares = 0;
      for (int64_t c = 0; c < columns; ++c) {
        ASSERT_EQ(sum[c], x[c] + delta[c]);
        squares += double{sum[c]} * sum[c];
      }
      // The sum of squares has terms of one sign: off by gamma(columns + 1) at most, the mean and
      // the epsilon add two roundings. The root halves that; then a root, a division and two
      // products.
      const double relative = Gamma(static_cast<double>(columns) + 3) / 2 + Gamma(4);
      const double factor = 1 / std::sqrt(squares / static_cast<double>(columns) + kEpsilonOfNorm);
      for (int64_t c = 0; c < columns; ++c) {
        const double expected = sum[c] * factor * gain[c];
        ExpectWithin({expected, 1.01 * relative * std::fabs(expected)}, out[c]);
      }
    });
  }
}

TEST(RmsNorm, RowListChoosesAndPacksRows) {
  const auto backend = CreateCpuBackend({});
  std::mt19937 rng(2);
  std::vector<float> x = RandomFloats(5 * 48, &rng);
  const std::vector<float> gain = RandomFloats(32, &rng);
  std::vector<float> all(5 * 32);
  std::vector<float> chosen(2 * 32);
  backend->AddRmsNorm({x.data(), 48}, {}, nullptr, 5, 32, gain.data(), 1e-5f, {all.data(), 32});
  const std::vector<int32_t> rows = {4, 1};
  backend->AddRmsNorm({x.data(), 48}, {}, rows.data(), 2, 32, gain.data(), 1e-5f,
                      {chosen.data(), 32});
  EXPECT_TRUE(std::equal(chosen.begin(), chosen.begin() + 32, all.begin() + 4 * 32));
  EXPECT_TRUE(std::equal(chosen.begin() + 32, chosen.end(), all.begin() + 32));
}

TEST(Embed, WidensTheTokensRows) {
  std::mt19937 rng(3);
  for (const auto format : {formats::WeightFormat::kBfloat16, formats::WeightFormat::kFloat32}) {
    const auto matrix = RandomMatrix(format, 10, 8, formats::KOrder::kNatural, &rng);
    const auto values = formats::DecodeToFloat(matrix);
    const auto backend = CreateCpuBackend({});
    const auto table = *backend->Pack(matrix, MatrixUse::kEmbedding);
    std::vector<float> x(3 * 9);
    const std::vector<int32_t> tokens = {9, 0, 9};
    const std::vector<int32_t> block = {0};
    const auto batch = FilledBatch(
        backend.get(),
        {.tokens = tokens, .rows = {{.position = 5, .length = 3, .block_table = block}}});
    backend->Embed(*table, *batch, {x.data(), 9});
    for (int t = 0; t < 3; ++t) {
      for (int c = 0; c < 8; ++c) EXPECT_EQ(x[t * 9 + c], values[tokens[t] * 8 + c]);
    }
  }
}

TEST(RopeAngles, AreSinesAndCosinesOfTheFloat32Angle) {
  const auto backend = CreateCpuBackend({.num_threads = 2});
  const std::vector<int32_t> blocks(131072 / kKvBlockTokens);
  std::vector<int32_t> positions;
  Batch tokens;
  for (int32_t p = 0; p < 131072; p = p * 2 + 1) {
    positions.push_back(p);
    tokens.tokens.push_back(0);
    tokens.rows.push_back({.position = p, .length = 1, .block_table = blocks});
  }
  const auto batch = FilledBatch(backend.get(), tokens);
  for (const float ratio : {1.0f, 4.0f}) {
    std::vector<float> cos_sin(positions.size() * 64);
    backend->RopeAngles(*batch, 64, 500000.0f, ratio, {cos_sin.data(), 64});
    for (size_t t = 0; t < positions.size(); ++t) {
      for (int j = 0; j < 32; ++j) {
        const auto frequency = static_cast<float>(std::pow(500000.0, -2.0 * j / 64));
        const float angle = static_cast<float>(positions[t]) / ratio * frequency;
        // The C library's sine and cosine err by less than one unit in the last place.
        EXPECT_NEAR(cos_sin[t * 64 + j], std::cos(double{angle}), 2 * kEpsilon);
        EXPECT_NEAR(cos_sin[t * 64 + 32 + j], std::sin(double{angle}), 2 * kEpsilon);
      }
    }
  }
}

struct RouterCase {
  std::string name;
  std::vector<float> logits;
  std::vector<float> bias;
  std::vector<int32_t> ids;
  std::vector<float> weights;
};

class Router : public testing::TestWithParam<RouterCase> {};

TEST_P(Router, ChoosesByBiasedProbabilityAndWeighsByPlainProbability) {
  const RouterCase& c = GetParam();
  const RouterShape shape = {.num_experts = static_cast<int>(c.logits.size()),
                             .top_k = static_cast<int>(c.ids.size()),
                             .norm_min = 1e-12f};
  std::vector<float> probabilities(c.logits.size());
  std::vector<int32_t> ids(c.ids.size());
  std::vector<float> weights(c.ids.size());
  RouteRow(c.logits.data(), c.bias.empty() ? nullptr : c.bias.data(), shape, probabilities.data(),
           ids.data(), weights.data());
  EXPECT_EQ(ids, c.ids);
  for (size_t i = 0; i < weights.size(); ++i) EXPECT_NEAR(weights[i], c.weights[i], 1e-6f);
}

INSTANTIATE_TEST_SUITE_P(
    All, Router,
    testing::Values(
        RouterCase{"BestFirst", {0, 1, 2, 3}, {}, {3, 2}, {0.7310586f, 0.2689414f}},
        RouterCase{
            "TiesGoToTheLowerIndex", {5, 5, 5, 5}, {}, {0, 1, 2}, {1 / 3.f, 1 / 3.f, 1 / 3.f}},
        RouterCase{"BiasDecidesButDoesNotWeigh", {0, 0, 0, 3}, {1, 0, 1, -1}, {0, 2}, {0.5f, 0.5f}},
        // At 40 the spacing is 3.8e-6: probabilities closer than that tie after the addition.
        RouterCase{"TheSumWithTheBiasIsRoundedToFloat32",
                   {0, 1e-7f, 2e-7f, 3e-7f},
                   {40, 40, 40, 40},
                   {0, 1},
                   {0.5f, 0.5f}},
        RouterCase{"SharpLogitsDoNotOverflow", {-1000, 1000}, {}, {1, 0}, {1, 0}}),
    [](const auto& info) { return info.param.name; });

TEST(Route, DividesByNormMinAtLeast) {
  const RouterShape shape = {.num_experts = 2, .top_k = 1, .norm_min = 4.0f};
  const float logits[] = {0, 0};
  float probabilities[2];
  int32_t id;
  float weight;
  RouteRow(logits, nullptr, shape, probabilities, &id, &weight);
  EXPECT_EQ(weight, 0.125f);
}

TEST(Route, ThreadsAndBatchesDoNotChangeBits) {
  std::mt19937 rng(4);
  const auto matrix =
      RandomMatrix(formats::WeightFormat::kFloat32, 384, 16, formats::KOrder::kNatural, &rng);
  const std::vector<float> bias = RandomFloats(16, &rng, 0.01f);
  constexpr int64_t kRows = 100;
  const std::vector<float> x = RandomFloats(kRows * 384, &rng);
  const RouterShape shape = {.num_experts = 16, .top_k = 4, .norm_min = 1e-12f};
  const auto route = [&](int threads, int64_t first, int64_t rows, std::vector<int32_t>* ids,
                         std::vector<float>* weights) {
    const auto backend = CreateCpuBackend({.num_threads = threads});
    const auto router = *backend->Pack(matrix, MatrixUse::kRouter);
    ids->resize(rows * 4);
    weights->resize(rows * 4);
    backend->Route({x.data() + first * 384, 384}, rows, *router, bias.data(), shape, ids->data(),
                   weights->data());
  };
  std::vector<int32_t> ids, other_ids;
  std::vector<float> weights, other_weights;
  route(1, 0, kRows, &ids, &weights);
  route(3, 0, kRows, &other_ids, &other_weights);
  EXPECT_EQ(ids, other_ids);
  EXPECT_EQ(weights, other_weights);
  route(1, 42, 1, &other_ids, &other_weights);
  EXPECT_TRUE(std::equal(other_ids.begin(), other_ids.end(), ids.begin() + 42 * 4));
  EXPECT_TRUE(std::equal(other_weights.begin(), other_weights.end(), weights.begin() + 42 * 4));
}

}  // namespace
}  // namespace wintserve::kernels::cpu
