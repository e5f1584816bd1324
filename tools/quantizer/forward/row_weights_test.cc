#include "tools/quantizer/forward/row_weights.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

namespace wintserve::quantizer {
namespace {

using ::testing::ElementsAre;

TEST(RowWeights, AreInverseMeanSquaresOfMeanOne) {
  // v = 4, 1, 1/4 with epsilon in each; their mean is 7/4.
  EXPECT_THAT(RowWeights(std::vector<double>{0.125, 0.875, 3.875}, 0.125),
              ElementsAre(16.0f / 7, 4.0f / 7, 1.0f / 7));
}

TEST(RowWeights, AResidualOfZerosHasAFiniteWeight) {
  const std::vector<float> weights = RowWeights(std::vector<double>{0, 1, 1, 1}, 1e-5);
  for (const float weight : weights) EXPECT_TRUE(std::isfinite(weight) && weight > 0) << weight;
  EXPECT_FLOAT_EQ(weights[0] / weights[1], 1.00001e5f);
  EXPECT_THAT(RowWeights(std::vector<double>{0, 0}, 1e-5), ElementsAre(1.0f, 1.0f));
}

TEST(MeanSquareOfSum, IsThatOfTheSumRoundedToFloat) {
  const float residual[] = {1, -2, 3, 0x1p24f};
  const float added[] = {1, 2, -1, 1};  // the last is lost
  EXPECT_EQ(MeanSquareOfSum(residual, added, 3), 8.0 / 3);
  EXPECT_EQ(MeanSquareOfSum(residual + 3, added + 3, 1), 0x1p48);
}

}  // namespace
}  // namespace wintserve::quantizer
