#include "tools/quantizer/calibrate/moments.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>

namespace wintserve::quantizer {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

Moments TwoInputs(float scale, int64_t num_rows, double weight) {
  Moments moments = MakeMoments(2, true);
  moments.hessian = {4 * scale, scale, scale, 2 * scale};
  moments.cross = {scale, 2 * scale, 3 * scale, 4 * scale};
  moments.num_rows = num_rows;
  moments.weight = weight;
  return moments;
}

TEST(CheckMoments, TakesWhatMakeMomentsMakes) {
  EXPECT_TRUE(CheckMoments(MakeMoments(3, false)).ok());
  EXPECT_TRUE(CheckMoments(MakeMoments(3, true)).ok());
}

TEST(CheckMoments, NamesTheArrayOfAWrongSize) {
  Moments moments = TwoInputs(1, 1, 1);
  moments.hessian.pop_back();
  EXPECT_THAT(CheckMoments(moments).ToString(),
              HasSubstr("hessian has 3 values, must have k^2 = 4"));
  moments = TwoInputs(1, 1, 1);
  moments.cross.pop_back();
  EXPECT_THAT(CheckMoments(moments).ToString(), HasSubstr("cross has 3 values"));
  moments = TwoInputs(1, 1, 1);
  moments.cross_output.resize(3);
  EXPECT_THAT(CheckMoments(moments).ToString(), HasSubstr("cross_output has 3 values"));
}

TEST(CheckMoments, NamesRowAndColumnOfAValueThatIsNotFinite) {
  Moments moments = TwoInputs(1, 1, 1);
  moments.cross[2] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_THAT(CheckMoments(moments).ToString(), HasSubstr("cross[1, 0] is nan"));
}

TEST(CheckMoments, RefusesANegativeSumOfSquares) {
  Moments moments = TwoInputs(1, 1, 1);
  moments.hessian[3] = -1;
  EXPECT_THAT(CheckMoments(moments).ToString(), HasSubstr("hessian[1, 1] is -1"));
}

TEST(InputImportance, IsTheMeanSquareOfEveryInput) {
  EXPECT_THAT(InputImportance(TwoInputs(1, 3, 2)), ElementsAre(2, 1));
}

TEST(InputImportance, IsOneForEveryInputWithoutRows) {
  EXPECT_THAT(InputImportance(MakeMoments(2, false)), ElementsAre(1, 1));
}

TEST(ShrinkTowards, AddsAverageRowsOfTheMean) {
  const Moments mean = TwoInputs(8, 4, 2);  // an average row: a fourth of it
  Moments own = TwoInputs(1, 1, 1);
  ShrinkTowards(mean, 2, own);
  EXPECT_THAT(own.hessian, ElementsAre(20, 5, 5, 10));
  EXPECT_THAT(own.cross, ElementsAre(5, 10, 15, 20));
  EXPECT_EQ(own.weight, 2);
  EXPECT_EQ(own.num_rows, 1);
}

TEST(ShrinkTowards, GivesAnExpertWithoutRowsTheMean) {
  const Moments mean = TwoInputs(8, 4, 2);
  Moments own = MakeMoments(2, false);
  ShrinkTowards(mean, 4, own);
  EXPECT_EQ(own.hessian, mean.hessian);
  EXPECT_EQ(own.cross, mean.cross);
}

TEST(ShrinkTowards, LeavesAnExpertAloneIfTheMeanHasNoRows) {
  Moments own = TwoInputs(1, 1, 1);
  ShrinkTowards(MakeMoments(2, true), 4, own);
  EXPECT_EQ(own.hessian, TwoInputs(1, 1, 1).hessian);
  EXPECT_THAT(own.cross_output, IsEmpty());
}

}  // namespace
}  // namespace wintserve::quantizer
