// WINT4 as PaddlePaddle's weight_quantize lays it out for its mixed-input GEMM: two weights a byte,
// stored as code + 8, rows shuffled inside every 32, four columns interleaved by 64-row tiles.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/formats/matrix.h"

namespace wintserve::formats {

// Views of the checkpoint's tensors of one matrix [k, n].
// REQUIRES: k is a multiple of 64, n of 4.
struct Wint4Tensors {
  int64_t k = 0;
  int64_t n = 0;
  const uint8_t* codes = nullptr;        // quant_weight [n / 2, k], k * n / 2 bytes
  const float* channel_scale = nullptr;  // weight_scale [n]
};

// Nibble of weight (row, column) in a quant_weight tensor of k rows: byte index * 2, + 1 if high.
constexpr int64_t Wint4NibbleIndex(int64_t k, int64_t row, int64_t column) {
  const int64_t r = row % 32;
  const int64_t p = row / 32 * 32 + 4 * (r % 8) + r / 8;
  return column / 4 * 4 * k + p / 64 * 256 + column % 4 * 64 + p % 64;
}

// Copies `slice` to the columns of `matrix` from `first_column` on.
// REQUIRES: matrix.format is kWint4, matrix.k is the number of rows of the slice.
void UnpackWint4(const Wint4Tensors& stored, const MatrixSlice& slice, int64_t first_column,
                 HostMatrix& matrix);

// The bytes of quant_weight.
std::vector<uint8_t> PackWint4(const HostMatrix& matrix);

}  // namespace wintserve::formats
