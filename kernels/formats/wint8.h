// WINT8 as PaddlePaddle's weight_quantize lays it out for its mixed-input GEMM: one byte a weight,
// stored as code + 128, rows shuffled inside every 16, pairs of columns interleaved by 64-row
// tiles.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/formats/matrix.h"

namespace wintserve::formats {

// Views of the checkpoint's tensors of one matrix [k, n].
// REQUIRES: k is a multiple of 64, n of 2.
struct Wint8Tensors {
  int64_t k = 0;
  int64_t n = 0;
  const uint8_t* codes = nullptr;        // quant_weight [n, k], k * n bytes
  const float* channel_scale = nullptr;  // weight_scale [n]
};

// Byte of weight (row, column) in a quant_weight tensor of k rows.
constexpr int64_t Wint8ByteIndex(int64_t k, int64_t row, int64_t column) {
  const int64_t r = row % 16;
  const int64_t p = row / 16 * 16 + (r < 8 ? 2 * r : 2 * (r - 8) + 1);
  return column / 2 * 2 * k + p / 64 * 128 + column % 2 * 64 + p % 64;
}

// Copies `slice` to the columns of `matrix` from `first_column` on.
// REQUIRES: matrix.format is kWint8, matrix.k is the number of rows of the slice.
void UnpackWint8(const Wint8Tensors& stored, const MatrixSlice& slice, int64_t first_column,
                 HostMatrix& matrix);

// The bytes of quant_weight.
std::vector<uint8_t> PackWint8(const HostMatrix& matrix);

}  // namespace wintserve::formats
