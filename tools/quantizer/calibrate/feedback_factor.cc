#include "tools/quantizer/calibrate/feedback_factor.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "common/check.h"
#include "common/status_macros.h"
#include "fmt/format.h"
#include "kernels/formats/wint2.h"
#include "tools/quantizer/calibrate/cholesky.h"

namespace wintserve::quantizer {
namespace {

using formats::kWint2GroupSize;
using formats::WeightFormat;

// Stored row at every position of the encoding order. A unit of `unit_rows` rows stays together
// inside its group of `group_rows`, and each group stays together.
std::vector<int32_t> EncodingOrder(const std::vector<double>& importance, int64_t group_rows,
                                   int64_t unit_rows, bool important_first) {
  const auto k = static_cast<int64_t>(importance.size());
  const auto sorted = [&](int64_t begin, int64_t end, int64_t rows) {
    std::vector<int64_t> first_rows;
    for (int64_t row = begin; row < end; row += rows) first_rows.push_back(row);
    const auto sum = [&](int64_t row) {
      return std::accumulate(importance.begin() + row, importance.begin() + row + rows, 0.0);
    };
    if (important_first) {
      std::stable_sort(first_rows.begin(), first_rows.end(),
                       [&](int64_t a, int64_t b) { return sum(a) > sum(b); });
    }
    return first_rows;
  };
  std::vector<int32_t> order;
  order.reserve(k);
  for (const int64_t group : sorted(0, k, group_rows)) {
    for (const int64_t unit : sorted(group, group + group_rows, unit_rows)) {
      for (int64_t row = unit; row < unit + unit_rows; ++row) {
        order.push_back(static_cast<int32_t>(row));
      }
    }
  }
  return order;
}

int64_t TrueRow(int64_t stored_row, const FactorOptions& options) {
  if (options.format != WeightFormat::kWint2) return stored_row;
  const int64_t in_group = stored_row % kWint2GroupSize;
  return stored_row - in_group + formats::Wint2TrueRow(static_cast<int>(in_group), options.k_order);
}

}  // namespace

absl::StatusOr<FeedbackFactor> FeedbackFactor::Make(const Moments& moments,
                                                    const FactorOptions& options,
                                                    kernels::cpu::ThreadPool& pool) {
  CHECK(options.format == WeightFormat::kWint2 || options.format == WeightFormat::kWint4 ||
        options.format == WeightFormat::kWint8);
  RETURN_IF_ERROR(CheckMoments(moments, pool));
  const int64_t k = moments.k;
  if (k % kWint2GroupSize != 0) {
    return absl::InvalidArgumentError(
        fmt::format("error feedback: the matrix has {} inputs, must have a multiple of {}", k,
                    kWint2GroupSize));
  }
  if (!(options.damping >= kSmallestDamping) || !std::isfinite(options.damping)) {
    return absl::InvalidArgumentError(
        fmt::format("error feedback: damping is {}, must be finite and at least {}",
                    options.damping, kSmallestDamping));
  }
  FeedbackFactor factor;
  factor.k_ = k;
  factor.options_ = options;
  factor.SetOrder(moments);
  factor.SetHessian(moments, pool);
  RETURN_IF_ERROR(factor.Factorize(pool));
  return factor;
}

void FeedbackFactor::SetOrder(const Moments& moments) {
  std::vector<double> importance(k_);
  for (int64_t row = 0; row < k_; ++row) {
    const int64_t true_row = TrueRow(row, options_);
    importance[row] = moments.hessian[true_row * k_ + true_row];
  }
  const bool in_groups = options_.format == WeightFormat::kWint2;
  stored_row_ = EncodingOrder(importance, in_groups ? kWint2GroupSize : k_, in_groups ? 4 : 1,
                              options_.important_first);
  true_row_.resize(k_);
  for (int64_t i = 0; i < k_; ++i) {
    true_row_[i] = static_cast<int32_t>(TrueRow(stored_row_[i], options_));
  }
}

void FeedbackFactor::SetHessian(const Moments& moments, kernels::cpu::ThreadPool& pool) {
  double sum = 0;
  for (int64_t row = 0; row < k_; ++row) sum += moments.hessian[row * k_ + row];
  hessian_ = calibrate::LargeArray(k_ * hessian_stride());
  is_identity_ = !(sum > 0);
  unit_ = sum > 0 ? sum / static_cast<double>(k_) : 1;
  const auto damping = static_cast<float>(options_.damping);
  pool.Run(k_, k_ * k_, [&](int64_t row, int) {
    const float* from = moments.hessian.data() + int64_t{true_row_[row]} * k_;
    float* to = hessian_.data() + row * hessian_stride();
    if (!is_identity_) {
      for (int64_t i = 0; i < k_; ++i) to[i] = static_cast<float>(from[true_row_[i]] / unit_);
      to[row] += damping;
    } else {
      std::fill_n(to, k_, 0.0f);
      to[row] = 1;
    }
  });
}

absl::Status FeedbackFactor::Factorize(kernels::cpu::ThreadPool& pool) {
  // With rows and columns in reverse order the Cholesky factor L of H = L L^T is the transpose of M
  // in reverse order.
  Eigen::MatrixXd reversed(k_, k_);
  pool.Run(k_, k_ * k_, [&](int64_t column, int) {
    const float* row = hessian_.data() + (k_ - 1 - column) * hessian_stride();
    for (int64_t i = column; i < k_; ++i) reversed(i, column) = row[k_ - 1 - i];
  });
  if (!calibrate::FactorInPlace(reversed, pool)) {
    return absl::FailedPreconditionError(
        fmt::format("error feedback: the hessian of {} inputs with damping {} is not positive "
                    "definite, so it is no sum of squares",
                    k_, options_.damping));
  }
  factor_ = calibrate::LargeArray(k_ * k_);
  pool.Run(k_, k_ * k_, [&](int64_t row, int) {
    // M[row][i] = L[k - 1 - i][k - 1 - row]: a column of L, from the end.
    const double* from = reversed.data() + (k_ - 1 - row) * k_;
    float* to = factor_.data() + row * k_;
    for (int64_t i = 0; i <= row; ++i) to[i] = static_cast<float>(from[k_ - 1 - i]);
    std::fill(to + row + 1, to + k_, 0.0f);
  });
  return absl::OkStatus();
}

}  // namespace wintserve::quantizer
