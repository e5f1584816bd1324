// WINT2: four weights a byte along K. A byte becomes a 15-bit code by an affine map of its column;
// the four weights are overlapping 6-bit windows of the code. Every 64 rows of a column share a
// 4-bit local scale.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <vector>

#include "kernels/formats/matrix.h"

namespace wintserve::formats {

// Views of the checkpoint's tensors of one matrix [k, n].
// REQUIRES: k is a multiple of 128.
struct Wint2Tensors {
  int64_t k = 0;
  int64_t n = 0;
  const uint8_t* codes = nullptr;  // quant_weight [k / 4, n]
  const uint8_t* local_scale =
      nullptr;                         // weight_scale [k / 128, n]: even 64-group in the high bits
  const float* super_scale = nullptr;  // super_scales [n]
  const float* code_scale = nullptr;   // [n]
  const float* code_zp = nullptr;      // [n]
};

// The fused multiply-add is part of the format: a separate rounding of the product can floor to the
// neighbouring code.
inline int32_t Wint2Code(uint8_t byte, float code_scale, float code_zp) {
  return static_cast<int32_t>(
      std::floor(std::fma(static_cast<float>(byte), code_scale, code_zp + 0.5f)));
}

// Weight `slot` (0 … 3) of a code, -32 … 31. Negative codes wrap as two's complement does.
constexpr int Wint2Value(int32_t code, int slot) { return ((code >> (9 - 3 * slot)) & 63) - 32; }

// K index inside its 64-group of a stored row (4 * byte row + slot) of that group.
constexpr int Wint2TrueRow(int stored_row, KOrder order) {
  if (order == KOrder::kNatural) return stored_row;
  const int slot = stored_row % 4;
  return 16 * (stored_row / 4 % 4) + 8 * (slot >> 1) + 2 * (stored_row / 16) + (slot & 1);
}

// Copies `slice` to the columns of `matrix` from `first_column` on. Rows stay in stored order.
// REQUIRES: matrix.format is kWint2, matrix.k is the number of rows of the slice; the slice begins
// and ends at 64-groups.
void UnpackWint2(const Wint2Tensors& stored, const MatrixSlice& slice, int64_t first_column,
                 HostMatrix& matrix);

// The bytes of weight_scale; quant_weight is codes_u8 as it is.
// REQUIRES: matrix.k is a multiple of 128.
std::vector<uint8_t> PackWint2LocalScale(const HostMatrix& matrix);

}  // namespace wintserve::formats
