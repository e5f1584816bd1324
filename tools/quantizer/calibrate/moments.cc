#include "tools/quantizer/calibrate/moments.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <string_view>

#include "common/check.h"
#include "common/status_macros.h"
#include "fmt/format.h"

namespace wintserve::quantizer {
namespace {

// values [rows, columns]
absl::Status CheckFinite(std::string_view name, const LargeVector& values, int64_t columns,
                         kernels::cpu::ThreadPool& pool) {
  const auto size = static_cast<int64_t>(values.size());
  if (size == 0) return absl::OkStatus();
  const int64_t rows = size / columns;
  std::atomic<int64_t> first_wrong_row = rows;
  pool.Run(rows, size, [&](int64_t row, int) {
    const float* const first = values.data() + row * columns;
    bool all_right = true;
    // Also false for a NaN.
    for (int64_t i = 0; i < columns; ++i) {
      all_right &= std::abs(first[i]) <= std::numeric_limits<float>::max();
    }
    if (all_right) return;
    int64_t known = first_wrong_row;
    while (row < known && !first_wrong_row.compare_exchange_weak(known, row)) {
    }
  });
  const int64_t row = first_wrong_row;
  if (row == rows) return absl::OkStatus();
  int64_t column = 0;
  while (std::isfinite(values[row * columns + column])) ++column;
  return absl::InvalidArgumentError(fmt::format("moments: {}[{}, {}] is {}, which is not finite",
                                                name, row, column, values[row * columns + column]));
}

// target += factor * source; an empty target becomes zeros first, an empty source adds nothing.
void AddScaled(const LargeVector& source, double factor, int64_t columns,
               kernels::cpu::ThreadPool& pool, LargeVector& target) {
  const auto size = static_cast<int64_t>(source.size());
  if (size == 0) return;
  const bool is_new = target.empty();
  target.resize(size);
  pool.Run(size / columns, size, [&](int64_t row, int) {
    const float* const from = source.data() + row * columns;
    float* const to = target.data() + row * columns;
    if (is_new) std::fill_n(to, columns, 0.0f);
    for (int64_t i = 0; i < columns; ++i) to[i] = static_cast<float>(to[i] + factor * from[i]);
  });
}

}  // namespace

Moments MakeMoments(int64_t k, bool with_cross) {
  CHECK(k > 0, "k={}", k);
  Moments moments;
  moments.k = k;
  moments.hessian.assign(k * k, 0);
  if (with_cross) moments.cross.assign(k * k, 0);
  return moments;
}

absl::Status CheckMoments(const Moments& moments, kernels::cpu::ThreadPool& pool) {
  const int64_t k = moments.k;
  if (k <= 0) {
    return absl::InvalidArgumentError(fmt::format("moments: k is {}, must be positive", k));
  }
  const auto size = static_cast<size_t>(k * k);
  if (moments.hessian.size() != size) {
    return absl::InvalidArgumentError(fmt::format(
        "moments: hessian has {} values, must have k^2 = {}", moments.hessian.size(), size));
  }
  if (!moments.cross.empty() && moments.cross.size() != size) {
    return absl::InvalidArgumentError(fmt::format(
        "moments: cross has {} values, must have k^2 = {} or none", moments.cross.size(), size));
  }
  if (moments.cross_output.size() % k != 0) {
    return absl::InvalidArgumentError(
        fmt::format("moments: cross_output has {} values, must have a multiple of k = {}",
                    moments.cross_output.size(), k));
  }
  const auto output_columns = static_cast<int64_t>(moments.cross_output.size()) / k;
  RETURN_IF_ERROR(CheckFinite("hessian", moments.hessian, k, pool));
  RETURN_IF_ERROR(CheckFinite("cross", moments.cross, k, pool));
  RETURN_IF_ERROR(CheckFinite("cross_output", moments.cross_output, output_columns, pool));
  for (int64_t row = 0; row < k; ++row) {
    if (moments.hessian[row * k + row] < 0) {
      return absl::InvalidArgumentError(
          fmt::format("moments: hessian[{}, {}] is {}, a sum of squares cannot be negative", row,
                      row, moments.hessian[row * k + row]));
    }
  }
  return absl::OkStatus();
}

std::vector<float> InputImportance(const Moments& moments) {
  std::vector<float> importance(moments.k, 1.0f);
  if (moments.weight <= 0) return importance;
  for (int64_t row = 0; row < moments.k; ++row) {
    importance[row] = static_cast<float>(moments.hessian[row * moments.k + row] / moments.weight);
  }
  return importance;
}

void ShrinkTowards(const Moments& mean, double num_prior_rows, kernels::cpu::ThreadPool& pool,
                   Moments& own) {
  CHECK(own.k == mean.k, "own.k={} mean.k={}", own.k, mean.k);
  CHECK(num_prior_rows >= 0 && std::isfinite(num_prior_rows), "num_prior_rows={}", num_prior_rows);
  if (mean.num_rows == 0) return;
  const double factor = num_prior_rows / static_cast<double>(mean.num_rows);
  AddScaled(mean.hessian, factor, own.k, pool, own.hessian);
  AddScaled(mean.cross, factor, own.k, pool, own.cross);
  own.weight += factor * mean.weight;
}

}  // namespace wintserve::quantizer
