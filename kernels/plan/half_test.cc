#include "kernels/plan/half.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>

namespace wintserve::kernels::plan {
namespace {

double Value(uint16_t bits) {
  const int exponent = (bits >> 10) & 31;
  const int mantissa = bits & 1023;
  return exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
}

TEST(Half, EveryFiniteHalfBecomesItsValue) {
  for (int bits = 0; bits <= kLargestHalf; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    EXPECT_EQ(HalfToFloat(half), Value(half)) << bits;
    EXPECT_EQ(HalfToFloat(half | 0x8000), -Value(half)) << bits;
  }
  EXPECT_TRUE(std::isinf(HalfToFloat(0x7C00)));
  EXPECT_TRUE(std::isnan(HalfToFloat(0x7E00)));
}

TEST(Half, EveryHalfIsItsOwnRounding) {
  for (int bits = 0; bits <= kLargestHalf; ++bits) {
    EXPECT_EQ(FloatToHalfRoundUp(HalfToFloat(static_cast<uint16_t>(bits))), bits);
  }
}

TEST(Half, RoundsToTheNextHalfAbove) {
  std::mt19937 rng(1);
  for (int i = 0; i < 100000; ++i) {
    const float value = std::exp2(std::uniform_real_distribution<float>(-30.0f, 15.9f)(rng));
    const uint16_t half = FloatToHalfRoundUp(value);
    ASSERT_GE(Value(half), value) << value;
    ASSERT_LT(Value(half - 1), value) << value;
  }
  // The neighbours of every half.
  for (int bits = 1; bits < kLargestHalf; ++bits) {
    const float exact = HalfToFloat(static_cast<uint16_t>(bits));
    ASSERT_EQ(FloatToHalfRoundUp(std::nextafter(exact, 0.0f)), bits);
    ASSERT_EQ(FloatToHalfRoundUp(std::nextafter(exact, 1e6f)), bits + 1);
  }
}

TEST(Half, WhatIsTooLargeOrNoNumberBecomesTheLargest) {
  for (const float value : {65504.5f, 1e9f, std::numeric_limits<float>::infinity(),
                            std::numeric_limits<float>::quiet_NaN()}) {
    EXPECT_EQ(FloatToHalfRoundUp(value), kLargestHalf) << value;
  }
  EXPECT_EQ(FloatToHalfRoundUp(65504.0f), kLargestHalf);
  EXPECT_EQ(FloatToHalfRoundUp(0.0f), 0);
  EXPECT_EQ(FloatToHalfRoundUp(1e-30f), 1);
}

}  // namespace
}  // namespace wintserve::kernels::plan
