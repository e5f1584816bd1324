#include "tools/quantizer/calibrate/column_tile.h"

#include <algorithm>
#include <cmath>
#include <functional>

#include "kernels/formats/bf16.h"
#include "tools/quantizer/calibrate/row_changes.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "tools/quantizer/calibrate/column_tile.cc"
#include "hwy/foreach_target.h"
// After foreach_target.
#include "kernels/cpu/fma_block-inl.h"

HWY_BEFORE_NAMESPACE();
namespace wintserve::quantizer::calibrate {
namespace HWY_NAMESPACE {

void AddProduct(const float* x, int64_t x_stride, int64_t num_rows, int64_t depth,
                const float* panel, float* out) {
  namespace simd = kernels::cpu::HWY_NAMESPACE;
  constexpr int64_t kDepth = 256;  // rows of the panel that stay in the first-level cache
  constexpr int64_t kRows = 64;
  for (int64_t begin = 0; begin < depth; begin += kDepth) {
    const simd::Panel part = {.data = panel + begin * kTileColumns,
                              .stride = kTileColumns,
                              .k = std::min(kDepth, depth - begin),
                              .columns = kTileColumns};
    for (int64_t row = 0; row < num_rows; row += kRows) {
      const int64_t rows = std::min(kRows, num_rows - row);
      const float* x_rows[kRows];
      for (int64_t r = 0; r < rows; ++r) x_rows[r] = x + (row + r) * x_stride + begin;
      simd::MultiplyPanel(x_rows, rows, part, /*accumulate=*/true, out + row * kTileColumns,
                          kTileColumns);
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace wintserve::quantizer::calibrate
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace wintserve::quantizer::calibrate {
namespace {

HWY_EXPORT(AddProduct);

// sums[column] += sum over rows of a * b.
void AddDots(const float* a, const float* b, int64_t num_rows, ColumnSums& sums) {
  for (int64_t row = 0; row < num_rows; ++row) {
    const float* a_row = a + row * kTileColumns;
    const float* b_row = b + row * kTileColumns;
    for (int column = 0; column < kTileColumns; ++column) {
      sums[column] += static_cast<double>(a_row[column]) * b_row[column];
    }
  }
}

// Changes that are added together: H's lines at them and they themselves stay in the first-level
// cache while they pass all rows.
constexpr int64_t kPendingRows = 4 * kGroupRows;

// gradient [factor.k(), kTileColumns] += H times the changes.
void AddChanges(const FeedbackFactor& factor, const RowChanges& changes, float* gradient) {
  changes.Prefetch(factor, 0);
  for (int64_t row = 0; row < factor.k(); row += kProductRows) {
    if (row + kProductRows < factor.k()) changes.Prefetch(factor, row + kProductRows);
    changes.AddProduct(factor, row, gradient + row * kTileColumns);
  }
}

// gradient += H panel, both [factor.k(), kTileColumns].
void MultiplyHessian(const FeedbackFactor& factor, const float* panel, float* gradient) {
  RowChanges changes;
  for (int64_t row = 0; row < factor.k(); ++row) {
    changes.Add(static_cast<int32_t>(row), panel + row * kTileColumns);
    if (changes.num_rows() < kPendingRows && row + 1 < factor.k()) continue;
    AddChanges(factor, changes, gradient);
    changes.Clear();
  }
}

// Sums of squares in units of the matrix.
void MultiplyByUnits(const ColumnTile& tile, ColumnSums& sums) {
  for (int i = 0; i < kTileColumns; ++i) {
    sums[i] *= static_cast<double>(tile.unit[i]) * tile.unit[i];
  }
}

// The bf16 scale of least error of each column while its codes stay, by the quadratic that scaling
// the decoded values gives, or the present one if that gains nothing.
ColumnScales BestScales(const ColumnSums& zero_errors, const ColumnScales& scales,
                        const ColumnTile& tile) {
  ColumnSums weight_dots = {};
  ColumnSums decoded_dots = {};
  AddDots(tile.weights.data(), tile.gradient.data(), tile.k, weight_dots);
  AddDots(tile.decoded.data(), tile.gradient.data(), tile.k, decoded_dots);
  MultiplyByUnits(tile, weight_dots);
  MultiplyByUnits(tile, decoded_dots);
  ColumnScales best = scales;
  for (int column = 0; column < kTileColumns; ++column) {
    if (!tile.is_open[column / kStripColumns]) continue;
    const double error = weight_dots[column] - decoded_dots[column];
    // q^T H q, with q = w - e.
    const double power = zero_errors[column] - 2 * weight_dots[column] + error;
    if (!(power > 0)) continue;
    const double wanted = scales[column] * (1 + decoded_dots[column] / power);
    const float scale = formats::RoundToBfloat16(static_cast<float>(wanted));
    const double step = scale / scales[column] - 1.0;
    const double change = step * (step * power - 2 * decoded_dots[column]);
    const float unit = tile.unit[column];
    if (scale >= SmallestScale(unit) && scale <= LargestScale(unit) && change < 0) {
      best[column] = scale;
    }
  }
  return best;
}

}  // namespace

ColumnTile::ColumnTile(int64_t k)
    : k(k),
      weights(k * kTileColumns),
      decoded(k * kTileColumns),
      gradient(k * kTileColumns),
      old_gradient(k * kTileColumns),
      scratch(k * kTileColumns) {}

void LoadWeights(FloatMatrix target, const FeedbackFactor& factor, std::span<const int64_t> columns,
                 ColumnTile& tile) {
  tile.columns.fill(-1);
  std::copy(columns.begin(), columns.end(), tile.columns.begin());
  ColumnScales largest = {};
  for (int64_t row = 0; row < tile.k; ++row) {
    const float* from = target.data + int64_t{factor.true_row()[row]} * target.n;
    float* to = tile.weights.data() + row * kTileColumns;
    for (int i = 0; i < kTileColumns; ++i) {
      to[i] = tile.columns[i] < 0 ? 0.0f : from[tile.columns[i]];
      largest[i] = std::max(largest[i], std::abs(to[i]));
    }
  }
  ColumnScales inverse;
  for (int i = 0; i < kTileColumns; ++i) {
    const int exponent = largest[i] > 0 ? std::ilogb(largest[i]) : 0;
    tile.unit[i] = std::ldexp(1.0f, std::clamp(exponent, -100, 126));
    inverse[i] = 1 / tile.unit[i];
  }
  for (int64_t row = 0; row < tile.k; ++row) {
    float* weights = tile.weights.data() + row * kTileColumns;
    for (int i = 0; i < kTileColumns; ++i) weights[i] *= inverse[i];
  }
}

void AddProduct(const float* x, int64_t x_stride, int64_t num_rows, int64_t depth,
                const float* panel, float* out) {
  HWY_DYNAMIC_DISPATCH(AddProduct)(x, x_stride, num_rows, depth, panel, out);
}

ColumnSums ZeroErrors(const FeedbackFactor& factor, ColumnTile& tile) {
  const int64_t k = tile.k;
  std::fill(tile.scratch.begin(), tile.scratch.end(), 0.0f);
  for (int64_t row = 0; row < k; row += kGroupRows) {
    AddProduct(factor.factor() + row * k, k, kGroupRows, row + kGroupRows, tile.weights.data(),
               tile.scratch.data() + row * kTileColumns);
  }
  ColumnSums sums = {};
  AddDots(tile.scratch.data(), tile.scratch.data(), k, sums);
  MultiplyByUnits(tile, sums);
  return sums;
}

void StartGradient(const FeedbackFactor& factor, ColumnTile& tile) {
  std::transform(tile.weights.begin(), tile.weights.end(), tile.decoded.begin(),
                 tile.scratch.begin(), std::minus<>());
  std::fill(tile.gradient.begin(), tile.gradient.end(), 0.0f);
  MultiplyHessian(factor, tile.scratch.data(), tile.gradient.data());
}

ColumnSums Errors(const ColumnTile& tile) {
  ColumnSums sums = {};
  for (int64_t row = 0; row < tile.k; ++row) {
    const int64_t i = row * kTileColumns;
    for (int column = 0; column < kTileColumns; ++column) {
      const float error = tile.weights[i + column] - tile.decoded[i + column];
      sums[column] += static_cast<double>(error) * tile.gradient[i + column];
    }
  }
  MultiplyByUnits(tile, sums);
  return sums;
}

LazyGradient::LazyGradient(const FeedbackFactor& factor, ColumnTile& tile)
    : factor_(factor), tile_(tile), pending_(std::make_unique<RowChanges>()) {}

LazyGradient::~LazyGradient() = default;

void LazyGradient::Get(Rows rows, float* gradient) {
  for (int i = 0; i < kGroupRows; ++i) {
    std::copy_n(tile_.gradient.data() + int64_t{rows[i]} * kTileColumns, kTileColumns,
                gradient + i * kTileColumns);
  }
  for (int i = 0; i < kGroupRows; i += kProductRows) {
    pending_->AddProduct(factor_, rows[i], gradient + i * kTileColumns);
  }
}

void LazyGradient::Add(Rows rows, const float* delta) {
  for (int i = 0; i < kGroupRows; ++i) pending_->Add(rows[i], delta + i * kTileColumns);
  if (pending_->num_rows() + kGroupRows > kPendingRows) Flush();
}

void LazyGradient::Flush() {
  if (pending_->num_rows() == 0) return;
  AddChanges(factor_, *pending_, tile_.gradient.data());
  pending_->Clear();
}

void RefitScales(const FeedbackFactor& factor, const ColumnSums& zero_errors, DecodeFunction decode,
                 ColumnScales& scales, ColumnTile& tile) {
  const ColumnScales wanted = BestScales(zero_errors, scales, tile);
  if (wanted == scales) return;
  const ColumnSums before = Errors(tile);
  decode(wanted, tile.scratch.data());
  tile.scratch.swap(tile.decoded);  // scratch: the old values
  std::transform(tile.scratch.begin(), tile.scratch.end(), tile.decoded.begin(),
                 tile.scratch.begin(), std::minus<>());
  tile.old_gradient = tile.gradient;
  MultiplyHessian(factor, tile.scratch.data(), tile.gradient.data());
  const ColumnSums after = Errors(tile);

  // Rounding of the decoded values can undo what the quadratic promised.
  bool any_undone = false;
  for (int column = 0; column < kTileColumns; ++column) {
    if (wanted[column] == scales[column]) continue;
    if (after[column] < before[column]) {
      scales[column] = wanted[column];
      continue;
    }
    any_undone = true;
    for (int64_t row = 0; row < tile.k; ++row) {
      const int64_t i = row * kTileColumns + column;
      tile.gradient[i] = tile.old_gradient[i];
    }
  }
  if (any_undone) decode(scales, tile.decoded.data());
}

}  // namespace wintserve::quantizer::calibrate
#endif
