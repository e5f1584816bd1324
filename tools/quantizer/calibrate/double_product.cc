#include "tools/quantizer/calibrate/double_product.h"

#include <algorithm>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "tools/quantizer/calibrate/double_product.cc"
#include "hwy/foreach_target.h"
// After foreach_target.
#include "kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace wintserve::quantizer::calibrate {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using DoubleTag = hn::CappedTag<double, 8>;
using DoubleVector = hn::Vec<DoubleTag>;
constexpr int kDoubleLanes = static_cast<int>(hn::MaxLanes(DoubleTag()));
// As many accumulators as the registers hold: 32 with AVX-512, else 16.
constexpr int kBlockRows = kDoubleLanes == 8 ? 6 : kDoubleLanes == 4 ? 6 : 4;
constexpr int kBlockVectors = kDoubleLanes == 8 ? 4 : 2;
constexpr int64_t kBlockColumns = kBlockVectors * kDoubleLanes;
static_assert(kPanelColumns % kBlockColumns == 0);

template <int kRows>
HWY_INLINE void SubtractBlock(const double* x, int64_t x_stride, int64_t depth, const double* panel,
                              double* out, int64_t out_stride) {
  const DoubleTag d;
  DoubleVector sum[kRows][kBlockVectors];
  WINTSERVE_UNROLL
  for (int r = 0; r < kRows; ++r) {
    WINTSERVE_UNROLL
    for (int v = 0; v < kBlockVectors; ++v) {
      sum[r][v] = hn::LoadU(d, out + r * out_stride + v * kDoubleLanes);
    }
  }
  for (int64_t i = 0; i < depth; ++i) {
    DoubleVector w[kBlockVectors];
    WINTSERVE_UNROLL
    for (int v = 0; v < kBlockVectors; ++v) {
      w[v] = hn::LoadU(d, panel + i * kPanelColumns + v * kDoubleLanes);
    }
    WINTSERVE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const DoubleVector x_i = hn::Set(d, x[r * x_stride + i]);
      WINTSERVE_UNROLL
      for (int v = 0; v < kBlockVectors; ++v) sum[r][v] = hn::NegMulAdd(x_i, w[v], sum[r][v]);
    }
  }
  WINTSERVE_UNROLL
  for (int r = 0; r < kRows; ++r) {
    WINTSERVE_UNROLL
    for (int v = 0; v < kBlockVectors; ++v) {
      hn::StoreU(sum[r][v], d, out + r * out_stride + v * kDoubleLanes);
    }
  }
}

void SubtractProduct(const double* x, int64_t x_stride, int64_t num_rows, int64_t depth,
                     const double* panel, double* out, int64_t out_stride) {
  constexpr int64_t kDepth = 128;  // of which a block's columns stay in the first-level cache
  for (int64_t begin = 0; begin < depth; begin += kDepth) {
    const int64_t terms = std::min(kDepth, depth - begin);
    for (int64_t column = 0; column < kPanelColumns; column += kBlockColumns) {
      const double* part = panel + begin * kPanelColumns + column;
      int64_t row = 0;
      for (; row + kBlockRows <= num_rows; row += kBlockRows) {
        SubtractBlock<kBlockRows>(x + row * x_stride + begin, x_stride, terms, part,
                                  out + row * out_stride + column, out_stride);
      }
      for (; row < num_rows; ++row) {
        SubtractBlock<1>(x + row * x_stride + begin, x_stride, terms, part,
                         out + row * out_stride + column, out_stride);
      }
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace wintserve::quantizer::calibrate
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace wintserve::quantizer::calibrate {
namespace {

HWY_EXPORT(SubtractProduct);

}  // namespace

void SubtractProduct(const double* x, int64_t x_stride, int64_t num_rows, int64_t depth,
                     const double* panel, double* out, int64_t out_stride) {
  HWY_DYNAMIC_DISPATCH(SubtractProduct)(x, x_stride, num_rows, depth, panel, out, out_stride);
}

}  // namespace wintserve::quantizer::calibrate
#endif
