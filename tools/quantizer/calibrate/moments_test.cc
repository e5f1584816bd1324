#include "tools/quantizer/calibrate/moments.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>

namespace wintserve::quantizer {
namespace {

using kernels::cpu::ThreadPool;
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
  ThreadPool pool(2);
  EXPECT_TRUE(CheckMoments(MakeMoments(3, false), pool).ok());
  EXPECT_TRUE(CheckMoments(MakeMoments(3, true), pool).ok());
}

TEST(CheckMoments, NamesTheArrayOfAWrongSize) {
  ThreadPool pool(2);
  Moments moments = TwoInputs(1, 1, 1);
  moments.hessian.pop_back();
  EXPECT_THAT(CheckMoments(moments, pool).ToString(),
              HasSubstr("hessian has 3 values, must have k^2 = 4"));
  moments = TwoInputs(1, 1, 1);
  moments.cross.pop_back();
  EXPECT_THAT(CheckMoments(moments, pool).ToString(), HasSubstr("cross has 3 values"));
  moments = TwoInputs(1, 1, 1);
  moments.cross_output.resize(3);
  EXPECT_THAT(CheckMoments(moments, pool).ToString(), HasSubstr("cross_output has 3 values"));
}

TEST(CheckMoments, NamesRowAndColumnOfAValueThatIsNotFinite) {
  ThreadPool pool(2);
  Moments moments = TwoInputs(1, 1, 1);
  moments.cross[2] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_THAT(CheckMoments(moments, pool).ToString(), HasSubstr("cross[1, 0] is nan"));
}

TEST(CheckMoments, NamesTheFirstOfManyValuesThatAreNotFiniteWhateverThreadFindsIt) {
  ThreadPool pool(4);
  constexpr int64_t kInputs = 512;  // enough for all threads
  Moments moments = MakeMoments(kInputs, false);
  for (int64_t row = 3; row < kInputs; row += 2) {
    moments.hessian[row * kInputs + 7] = std::numeric_limits<float>::infinity();
  }
  for (int i = 0; i < 20; ++i) {
    ASSERT_THAT(CheckMoments(moments, pool).ToString(), HasSubstr("hessian[3, 7] is inf"));
  }
}

TEST(CheckMoments, RefusesANegativeSumOfSquares) {
  ThreadPool pool(2);
  Moments moments = TwoInputs(1, 1, 1);
  moments.hessian[3] = -1;
  EXPECT_THAT(CheckMoments(moments, pool).ToString(), HasSubstr("hessian[1, 1] is -1"));
}

TEST(InputImportance, IsTheMeanSquareOfEveryInput) {
  EXPECT_THAT(InputImportance(TwoInputs(1, 3, 2)), ElementsAre(2, 1));
}

TEST(InputImportance, IsOneForEveryInputWithoutRows) {
  EXPECT_THAT(InputImportance(MakeMoments(2, false)), ElementsAre(1, 1));
}

TEST(ShrinkTowards, AddsAverageRowsOfTheMean) {
  ThreadPool pool(2);
  const Moments mean = TwoInputs(8, 4, 2);  // an average row: a fourth of it
  Moments own = TwoInputs(1, 1, 1);
  ShrinkTowards(mean, 2, pool, own);
  EXPECT_THAT(own.hessian, ElementsAre(20, 5, 5, 10));
  EXPECT_THAT(own.cross, ElementsAre(5, 10, 15, 20));
  EXPECT_EQ(own.weight, 2);
  EXPECT_EQ(own.num_rows, 1);
}

TEST(ShrinkTowards, GivesAnExpertWithoutRowsTheMean) {
  ThreadPool pool(2);
  const Moments mean = TwoInputs(8, 4, 2);
  Moments own = MakeMoments(2, false);
  ShrinkTowards(mean, 4, pool, own);
  EXPECT_EQ(own.hessian, mean.hessian);
  EXPECT_EQ(own.cross, mean.cross);
}

TEST(ShrinkTowards, AddsTheSameOnManyThreads) {
  constexpr int64_t kInputs = 512;
  Moments mean = MakeMoments(kInputs, true);
  mean.num_rows = 4;
  for (int64_t i = 0; i < kInputs * kInputs; ++i) {
    mean.hessian[i] = static_cast<float>(i % 1009);
    mean.cross[i] = static_cast<float>(i % 997);
  }
  ThreadPool pool(4);
  Moments own = MakeMoments(kInputs, false);
  std::fill(own.hessian.begin(), own.hessian.end(), 1.0f);
  ShrinkTowards(mean, 2, pool, own);
  for (int64_t i = 0; i < kInputs * kInputs; ++i) {
    ASSERT_EQ(own.hessian[i], 1 + mean.hessian[i] / 2) << i;
    ASSERT_EQ(own.cross[i], mean.cross[i] / 2) << i;
  }
}

TEST(ShrinkTowards, LeavesAnExpertAloneIfTheMeanHasNoRows) {
  ThreadPool pool(2);
  Moments own = TwoInputs(1, 1, 1);
  ShrinkTowards(MakeMoments(2, true), 4, pool, own);
  EXPECT_EQ(own.hessian, TwoInputs(1, 1, 1).hessian);
  EXPECT_THAT(own.cross_output, IsEmpty());
}

}  // namespace
}  // namespace wintserve::quantizer
