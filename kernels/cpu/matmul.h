// One column tile of a matrix product, and what the MLPs do with it. Free functions that pick the
// best SIMD target at run time; no allocation, no threads.
#pragma once

#include <cstdint>

#include "kernels/cpu/packed_matrix.h"

namespace wintserve::kernels::cpu {

// Weights are decoded at most this many k rows at a time: 16 KiB of float32 a tile.
inline constexpr int64_t kPanelRows = 128;
inline constexpr int64_t kPanelFloats = kPanelRows * kTileColumns;

// out [num_rows, kTileColumns] = x [num_rows, k] * tile `tile` of w. x_rows holds one pointer a
// row.
//   panel [kPanelFloats]   scratch
// Every output sums its k terms in storage order with one accumulator, for any num_rows.
void MatmulTile(const PackedMatrix& w, int64_t tile, const float* const* x_rows, int64_t num_rows,
                float* panel, float* out, int64_t out_stride);

// out[r, c] = silu(gate[r, c]) * up[r, c], c < kTileColumns; gate and up are dense.
void SwiGluTile(const float* gate, const float* up, int64_t num_rows, float* out,
                int64_t out_stride);

// Name of the SIMD target that the calls above use, for example "AVX2".
const char* SimdTargetName();

}  // namespace wintserve::kernels::cpu
