// IEEE binary16 as bit patterns, for hosts whose compiler has no such type.
#pragma once

#include <bit>
#include <cstdint>

namespace wintserve::kernels::plan {

// Nearest, ties to even; beyond 65504 by half a unit or more: infinity. A NaN stays a NaN.
constexpr uint16_t FloatToFloat16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  const uint32_t magnitude = bits & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return static_cast<uint16_t>(sign | 0x7E00);
  if (magnitude >= 0x47800000) return static_cast<uint16_t>(sign | 0x7C00);  // 2^16 and above
  if (magnitude < 0x33000000) return sign;                                   // below 2^-25
  // A normal number keeps 10 of 23 fraction bits. A subnormal one (below 2^-14) is a multiple of
  // 2^-24, so it loses one more bit for each halving.
  const uint32_t exponent = magnitude >> 23;
  uint32_t significand = (magnitude & 0x7FFFFF) | 0x800000;
  uint32_t dropped_bits = 13;
  uint32_t base = (exponent - 112) << 10;
  if (exponent < 113) {
    dropped_bits += 113 - exponent;
    base = 0;
  } else {
    significand &= 0x7FFFFF;
  }
  const uint32_t kept = significand >> dropped_bits;
  const uint32_t rest = significand & ((1u << dropped_bits) - 1);
  const uint32_t half = 1u << (dropped_bits - 1);
  const uint32_t round_up = rest > half || (rest == half && (kept & 1) != 0) ? 1 : 0;
  // A carry out of the fraction moves to the next exponent, at the top to infinity.
  return static_cast<uint16_t>(sign | (base + kept + round_up));
}

constexpr float Float16ToFloat(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const uint32_t exponent = (bits >> 10) & 31;
  const uint32_t fraction = bits & 0x3FF;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7F800000 | fraction << 13);
  if (exponent != 0) return std::bit_cast<float>(sign | (exponent + 112) << 23 | fraction << 13);
  const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
  return sign != 0 ? -magnitude : magnitude;
}

}  // namespace wintserve::kernels::plan
