#include "kernels/plan/float16.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace wintserve::kernels::plan {
namespace {

// The value of a finite pattern by the definition of binary16.
double ValueByDefinition(uint16_t bits) {
  const int exponent = (bits >> 10) & 31;
  const int fraction = bits & 0x3FF;
  const double magnitude =
      exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
  return (bits & 0x8000) != 0 ? -magnitude : magnitude;
}

TEST(Float16, EveryFinitePatternHasItsValueAndComesBack) {
  for (uint32_t bits = 0; bits <= 0xFFFF; ++bits) {
    if (((bits >> 10) & 31) == 31) continue;
    const float value = Float16ToFloat(static_cast<uint16_t>(bits));
    ASSERT_EQ(value, ValueByDefinition(static_cast<uint16_t>(bits))) << bits;
    ASSERT_EQ(FloatToFloat16(value), bits);
  }
}

TEST(Float16, RoundsToTheNearerNeighbourAndTiesToEven) {
  for (uint16_t bits = 0; bits < 0x7BFF; ++bits) {
    const double low = ValueByDefinition(bits);
    const double high = ValueByDefinition(static_cast<uint16_t>(bits + 1));
    const auto middle = static_cast<float>((low + high) / 2);  // exact in float32
    const uint16_t even = (bits & 1) == 0 ? bits : bits + 1;
    ASSERT_EQ(FloatToFloat16(middle), even) << bits;
    ASSERT_EQ(FloatToFloat16(std::nextafter(middle, 0.0f)), bits);
    ASSERT_EQ(FloatToFloat16(std::nextafter(middle, 1e9f)), bits + 1);
    ASSERT_EQ(FloatToFloat16(-middle), even | 0x8000) << bits;
  }
}

TEST(Float16, OverflowsToInfinityFromHalfAUnitBeyondTheLargest) {
  EXPECT_EQ(FloatToFloat16(65519.0f), 0x7BFF);
  EXPECT_EQ(FloatToFloat16(65520.0f), 0x7C00);
  EXPECT_EQ(FloatToFloat16(std::numeric_limits<float>::max()), 0x7C00);
  EXPECT_EQ(FloatToFloat16(-std::numeric_limits<float>::infinity()), 0xFC00);
  EXPECT_TRUE(std::isinf(Float16ToFloat(0x7C00)));
  EXPECT_TRUE(std::isnan(Float16ToFloat(FloatToFloat16(std::nanf("")))));
}

}  // namespace
}  // namespace wintserve::kernels::plan
