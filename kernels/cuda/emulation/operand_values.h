// The numbers that 16-bit operands of matrix instructions stand for.
#pragma once

#include <bit>
#include <cstdint>
#include <vector>

#include "kernels/plan/float16.h"

namespace wintserve::kernels::cuda::emulation {

inline double Bfloat16Value(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

inline double Float16Value(uint16_t bits) {
  static const auto* const values = [] {
    auto* table = new std::vector<double>;
    for (uint32_t i = 0; i <= 0xFFFF; ++i) {
      table->push_back(plan::Float16ToFloat(static_cast<uint16_t>(i)));
    }
    return table;
  }();
  return (*values)[bits];
}

}  // namespace wintserve::kernels::cuda::emulation
