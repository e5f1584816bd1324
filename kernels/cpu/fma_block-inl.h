// The register-blocked multiply: rows of x times a float32 panel of weights.
#if defined(WINTSERVE_KERNELS_CPU_FMA_BLOCK_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef WINTSERVE_KERNELS_CPU_FMA_BLOCK_INL_H_
#undef WINTSERVE_KERNELS_CPU_FMA_BLOCK_INL_H_
#else
#define WINTSERVE_KERNELS_CPU_FMA_BLOCK_INL_H_
#endif

#include <algorithm>
#include <cstdint>

#include "kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace wintserve::kernels::cpu {
namespace HWY_NAMESPACE {

// panel [k, columns], row i belonging to the i-th k in storage order (see packed_matrix.h); only
// natural order may have k % 16 != 0. columns % 32 == 0.
struct Panel {
  const float* data;
  int64_t stride;
  int64_t k;
  int64_t columns;
  int quad_step = 4;
  int quad_jump = 2;
};

// out[r, c] = (accumulate ? out[r, c] : 0) + sum_i x[r][k_i] * panel[i, c], one fused multiply-add
// per term in order of i, whatever kRows is.
template <int kRows, int kVecs>
HWY_INLINE void MultiplyBlock(const float* const* x_rows, const Panel& panel, int64_t column,
                              bool accumulate, float* out, int64_t out_stride) {
  const D d;
  const float* x[kRows];
  V sum[kRows][kVecs];
  WINTSERVE_UNROLL
  for (int r = 0; r < kRows; ++r) {
    x[r] = x_rows[r];
    WINTSERVE_UNROLL
    for (int v = 0; v < kVecs; ++v) {
      sum[r][v] =
          accumulate ? hn::LoadU(d, out + r * out_stride + column + v * kLanes) : hn::Zero(d);
    }
  }
  const float* w_row = panel.data + column;
  const auto add_row = [&](int64_t k) HWY_ATTR {
    V w[kVecs];
    WINTSERVE_UNROLL
    for (int v = 0; v < kVecs; ++v) w[v] = hn::LoadU(d, w_row + v * kLanes);
    WINTSERVE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const V x_k = hn::Set(d, x[r][k]);
      WINTSERVE_UNROLL
      for (int v = 0; v < kVecs; ++v) sum[r][v] = hn::MulAdd(x_k, w[v], sum[r][v]);
    }
    w_row += panel.stride;
  };
  const int64_t step = panel.quad_step;
  const int64_t jump = panel.quad_jump;
  const int64_t num_quads = panel.k / 4;
  for (int64_t quad = 0; quad < num_quads; ++quad) {
    const int64_t k = (quad & ~int64_t{3}) * 4 + (quad & 3) * step;
    add_row(k);
    add_row(k + 1);
    add_row(k + jump);
    add_row(k + jump + 1);
  }
  for (int64_t k = num_quads * 4; k < panel.k; ++k) add_row(k);
  WINTSERVE_UNROLL
  for (int r = 0; r < kRows; ++r) {
    WINTSERVE_UNROLL
    for (int v = 0; v < kVecs; ++v) {
      hn::StoreU(sum[r][v], d, out + r * out_stride + column + v * kLanes);
    }
  }
}

template <int kRows>
HWY_NOINLINE void MultiplyRows(const float* const* x_rows, const Panel& panel, bool accumulate,
                               float* out, int64_t out_stride) {
  constexpr int kWide = BlockVecs(kRows, 64);
  constexpr int kNarrow = BlockVecs(kRows, 32);
  int64_t column = 0;
  for (; column + kWide * kLanes <= panel.columns; column += kWide * kLanes) {
    MultiplyBlock<kRows, kWide>(x_rows, panel, column, accumulate, out, out_stride);
  }
  if constexpr (kNarrow < kWide) {
    for (; column < panel.columns; column += kNarrow * kLanes) {
      MultiplyBlock<kRows, kNarrow>(x_rows, panel, column, accumulate, out, out_stride);
    }
  }
}

// out [num_rows, panel.columns]; x_rows[r] points at the k of the panel's first row.
inline void MultiplyPanel(const float* const* x_rows, int64_t num_rows, const Panel& panel,
                          bool accumulate, float* out, int64_t out_stride) {
  for (int64_t r = 0; r < num_rows;) {
    const int rows = static_cast<int>(std::min<int64_t>(kMaxBlockRows, num_rows - r));
    float* out_r = out + r * out_stride;
    switch (rows) {
      case 1:
        MultiplyRows<1>(x_rows + r, panel, accumulate, out_r, out_stride);
        break;
      case 2:
        MultiplyRows<2>(x_rows + r, panel, accumulate, out_r, out_stride);
        break;
      case 3:
        MultiplyRows<3>(x_rows + r, panel, accumulate, out_r, out_stride);
        break;
      case 4:
        MultiplyRows<4>(x_rows + r, panel, accumulate, out_r, out_stride);
        break;
      case 5:
        MultiplyRows<5>(x_rows + r, panel, accumulate, out_r, out_stride);
        break;
      case 6:
        MultiplyRows<6>(x_rows + r, panel, accumulate, out_r, out_stride);
        break;
      case 7:
        MultiplyRows<7>(x_rows + r, panel, accumulate, out_r, out_stride);
        break;
      default:
        MultiplyRows<8>(x_rows + r, panel, accumulate, out_r, out_stride);
        break;
    }
    r += rows;
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace wintserve::kernels::cpu
HWY_AFTER_NAMESPACE();

#endif
