// bfloat16 as bit patterns: the upper half of a float32.
#pragma once

#include <bit>
#include <cstdint>

namespace wintserve::formats {

constexpr float Bfloat16ToFloat(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

// Nearest, ties to even. A NaN stays a NaN.
constexpr uint16_t FloatToBfloat16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  // Rounding would carry a NaN with a full mantissa over into zero.
  if (value != value) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

constexpr float RoundToBfloat16(float value) { return Bfloat16ToFloat(FloatToBfloat16(value)); }

}  // namespace wintserve::formats
