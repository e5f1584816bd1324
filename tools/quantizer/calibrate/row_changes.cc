#include "tools/quantizer/calibrate/row_changes.h"

#include <algorithm>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "tools/quantizer/calibrate/row_changes.cc"
#include "hwy/foreach_target.h"
// After foreach_target.
#include "tools/quantizer/calibrate/column_lanes-inl.h"

HWY_BEFORE_NAMESPACE();
namespace wintserve::quantizer::calibrate {
namespace HWY_NAMESPACE {

constexpr int kVectors = kStripColumns / kLanes;
// As many accumulators as the registers hold: 32 with AVX-512, else 16.
constexpr int kBlockRows = kLanes == 16 ? 16 : kLanes == 8 ? 4 : 2;
static_assert(kProductRows % kBlockRows == 0);

// out[i, :] += sum over changes of hessian[rows[change] * stride + i] * deltas[change, :]
void AddStripProduct(const float* hessian, int64_t stride, const int32_t* rows, const float* deltas,
                     int64_t num_rows, float* out) {
  const D d;
  for (int64_t first = 0; first < kProductRows; first += kBlockRows) {
    V sum[kBlockRows][kVectors];
    WINTSERVE_UNROLL
    for (int i = 0; i < kBlockRows; ++i) {
      WINTSERVE_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        sum[i][v] = hn::LoadU(d, out + (first + i) * kTileColumns + v * kLanes);
      }
    }
    for (int64_t change = 0; change < num_rows; ++change) {
      const float* h = hessian + rows[change] * stride + first;
      V delta[kVectors];
      WINTSERVE_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        delta[v] = hn::LoadU(d, deltas + change * kStripColumns + v * kLanes);
      }
      WINTSERVE_UNROLL
      for (int i = 0; i < kBlockRows; ++i) {
        const V h_i = hn::Set(d, h[i]);
        WINTSERVE_UNROLL
        for (int v = 0; v < kVectors; ++v) sum[i][v] = hn::MulAdd(h_i, delta[v], sum[i][v]);
      }
    }
    WINTSERVE_UNROLL
    for (int i = 0; i < kBlockRows; ++i) {
      WINTSERVE_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        hn::StoreU(sum[i][v], d, out + (first + i) * kTileColumns + v * kLanes);
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

HWY_EXPORT(AddStripProduct);

bool IsZero(const float* values, int count) {
  return std::all_of(values, values + count, [](float value) { return value == 0; });
}

}  // namespace

void RowChanges::Add(int32_t row, const float* delta) {
  bool any = false;
  for (Strip& strip : strips_) {
    if (!IsZero(delta, kStripColumns)) {
      strip.rows.push_back(row);
      strip.deltas.insert(strip.deltas.end(), delta, delta + kStripColumns);
      any = true;
    }
    delta += kStripColumns;
  }
  if (any) rows_.push_back(row);
}

void RowChanges::Clear() {
  rows_.clear();
  for (Strip& strip : strips_) {
    strip.rows.clear();
    strip.deltas.clear();
  }
}

void RowChanges::AddProduct(const FeedbackFactor& factor, int64_t first, float* out) const {
  for (const Strip& strip : strips_) {
    if (!strip.rows.empty()) {
      HWY_DYNAMIC_DISPATCH(AddStripProduct)
      (factor.hessian() + first, factor.hessian_stride(), strip.rows.data(), strip.deltas.data(),
       static_cast<int64_t>(strip.rows.size()), out);
    }
    out += kStripColumns;
  }
}

void RowChanges::Prefetch(const FeedbackFactor& factor, int64_t first) const {
  const float* const hessian = factor.hessian() + first;
  for (const int32_t row : rows_) __builtin_prefetch(hessian + row * factor.hessian_stride());
}

}  // namespace wintserve::quantizer::calibrate
#endif
