#include "tools/quantizer/calibrate/column_tile.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>

#include "kernels/formats/bf16.h"

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

void MultiplyHessian(const FeedbackFactor& factor, const float* panel, float* out) {
  const int64_t k = factor.k();
  AddProduct(factor.hessian(), k, k, k, panel, out);
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
    : factor_(factor), tile_(tile) {}

std::pair<const float*, int64_t> LazyGradient::Part(std::span<const int32_t> rows) {
  const int64_t k = tile_.k;
  const auto is_step = [](int32_t a, int32_t b) { return b != a + 1; };
  if (std::adjacent_find(pending_.begin(), pending_.end(), is_step) == pending_.end() &&
      std::adjacent_find(rows.begin(), rows.end(), is_step) == rows.end()) {
    return {factor_.hessian() + rows[0] * k + pending_[0], k};
  }
  // Rows that lie side by side are copied together: cache lines, mostly.
  std::vector<std::pair<int32_t, int32_t>> runs;  // first row, number of rows
  for (const int32_t row : pending_) {
    if (!runs.empty() && row == runs.back().first + runs.back().second) {
      ++runs.back().second;
    } else {
      runs.emplace_back(row, 1);
    }
  }
  packed_.resize(rows.size() * pending_.size());
  float* to = packed_.data();
  for (const int32_t row : rows) {
    const float* from = factor_.hessian() + row * k;
    for (const auto& [first, length] : runs) to = std::copy_n(from + first, length, to);
  }
  return {packed_.data(), static_cast<int64_t>(pending_.size())};
}

void LazyGradient::Get(Rows rows, float* gradient) {
  for (int i = 0; i < kGroupRows; ++i) {
    std::copy_n(tile_.gradient.data() + int64_t{rows[i]} * kTileColumns, kTileColumns,
                gradient + i * kTileColumns);
  }
  if (pending_.empty()) return;
  const auto [part, stride] = Part(rows);
  AddProduct(part, stride, kGroupRows, static_cast<int64_t>(pending_.size()), pending_delta_.data(),
             gradient);
}

void LazyGradient::Add(Rows rows, const float* delta) {
  pending_.insert(pending_.end(), rows.begin(), rows.end());
  pending_delta_.insert(pending_delta_.end(), delta, delta + kGroupRows * kTileColumns);
  if (pending_.size() == kPendingRows) Flush();
}

void LazyGradient::Flush() {
  if (pending_.empty()) return;
  constexpr int64_t kRows = 256;  // whose part of H stays in the second-level cache
  std::vector<int32_t> rows;
  for (int64_t begin = 0; begin < tile_.k; begin += kRows) {
    rows.resize(std::min(kRows, tile_.k - begin));
    std::iota(rows.begin(), rows.end(), static_cast<int32_t>(begin));
    const auto [part, stride] = Part(rows);
    AddProduct(part, stride, static_cast<int64_t>(rows.size()),
               static_cast<int64_t>(pending_.size()), pending_delta_.data(),
               tile_.gradient.data() + begin * kTileColumns);
  }
  pending_.clear();
  pending_delta_.clear();
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
