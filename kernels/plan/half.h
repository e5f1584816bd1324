// IEEE half precision as bit patterns, for the scales of the 8-bit KV cache.
#pragma once

#include <bit>
#include <cstdint>

#include "kernels/plan/host_device.h"

namespace wintserve::kernels::plan {

inline constexpr uint16_t kLargestHalf = 0x7BFF;  // 65504

WINTSERVE_HOST_DEVICE constexpr float HalfToFloat(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const uint32_t exponent = (bits >> 10) & 31;
  const uint32_t mantissa = bits & 0x3FF;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7F800000 | mantissa << 13);
  if (exponent == 0) {  // a multiple of 2^-24
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(magnitude));
  }
  return std::bit_cast<float>(sign | (exponent + 112) << 23 | mantissa << 13);
}

// The smallest half that is not below `value`, and 65504 for what is above that. value >= 0; a NaN
// becomes 65504 too.
WINTSERVE_HOST_DEVICE constexpr uint16_t FloatToHalfRoundUp(float value) {
  if (!(value <= 65504.0f)) return kLargestHalf;
  if (value < 0x1p-14f) {
    // Below the normal numbers halves are multiples of 2^-24; the product is exact.
    const float scaled = value * 0x1p24f;
    const auto whole = static_cast<uint32_t>(scaled);
    return static_cast<uint16_t>(whole + (static_cast<float>(whole) < scaled ? 1 : 0));
  }
  // The carry of a mantissa that rounds up may go on into the exponent.
  const uint32_t bits = std::bit_cast<uint32_t>(value) - (112u << 23);
  return static_cast<uint16_t>((bits + 0x1FFF) >> 13);
}

}  // namespace wintserve::kernels::plan
