#include "tools/quantizer/encode/encode.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "kernels/formats/bf16.h"
#include "kernels/formats/wint2.h"

namespace wintserve::quantizer {
namespace {

using formats::HostMatrix;
using formats::KOrder;
using formats::WeightFormat;
using ::testing::HasSubstr;

struct Weights {
  int64_t k, n;
  std::vector<float> values;

  FloatMatrix view() const { return {values.data(), k, n}; }
};

// Each column with a deviation of its own, as in a model.
Weights NormalWeights(int64_t k, int64_t n, unsigned seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<float> factor(0.7f, 1.3f);
  std::vector<float> deviations(n);
  for (float& deviation : deviations) deviation = 0.02f * factor(rng);
  Weights w{k, n, std::vector<float>(k * n)};
  for (int64_t i = 0; i < k * n; ++i) {
    w.values[i] = formats::RoundToBfloat16(normal(rng) * deviations[i % n]);
  }
  return w;
}

// Sum (W - W')^2 / sum W^2.
double NormalizedError(const Weights& w, const HostMatrix& matrix) {
  const std::vector<float> decoded = formats::DecodeToFloat(matrix);
  double error = 0;
  double norm = 0;
  for (size_t i = 0; i < w.values.size(); ++i) {
    error += std::pow(double{w.values[i]} - decoded[i], 2);
    norm += std::pow(double{w.values[i]}, 2);
  }
  return error / norm;
}

TEST(EncodeWint2, ComesAsNearToNormalWeightsAsTheFormatAllows) {
  kernels::cpu::ThreadPool pool(2);
  const Weights w = NormalWeights(256, 64, 1);
  const auto matrix = EncodeWint2(w.view(), {}, {}, pool);
  ASSERT_TRUE(matrix.ok()) << matrix.status();
  EXPECT_LT(NormalizedError(w, *matrix), 0.1025);
}

TEST(EncodePerChannel, ComesAsNearToNormalWeightsAsTheFormatAllows) {
  kernels::cpu::ThreadPool pool(2);
  const Weights w = NormalWeights(1024, 512, 1);
  const auto wint4 = EncodePerChannel(WeightFormat::kWint4, w.view(), pool);
  const auto wint8 = EncodePerChannel(WeightFormat::kWint8, w.view(), pool);
  ASSERT_TRUE(wint4.ok()) << wint4.status();
  ASSERT_TRUE(wint8.ok()) << wint8.status();
  EXPECT_LT(NormalizedError(w, *wint4), 0.0205);
  EXPECT_LT(NormalizedError(w, *wint8), 7e-5);
}

TEST(EncodeWint2, RefusesWhatIsNoNumberAndSaysWhereItIs) {
  kernels::cpu::ThreadPool pool(1);
  Weights w = NormalWeights(128, 40, 1);
  w.values[77 * 40 + 33] = std::nanf("");
  EXPECT_THAT(EncodeWint2(w.view(), {}, {}, pool).status().message(),
              HasSubstr("row 77, column 33"));
}

}  // namespace
}  // namespace wintserve::quantizer
