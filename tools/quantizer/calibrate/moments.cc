#include "tools/quantizer/calibrate/moments.h"

#include <cmath>
#include <string_view>

#include "common/check.h"
#include "common/status_macros.h"
#include "fmt/format.h"

namespace wintserve::quantizer {
namespace {

absl::Status CheckFinite(std::string_view name, const std::vector<float>& values, int64_t columns) {
  for (size_t i = 0; i < values.size(); ++i) {
    if (!std::isfinite(values[i])) {
      return absl::InvalidArgumentError(
          fmt::format("moments: {}[{}, {}] is {}, which is not finite", name, i / columns,
                      i % columns, values[i]));
    }
  }
  return absl::OkStatus();
}

// target += factor * source; an empty target becomes zeros first, an empty source adds nothing.
void AddScaled(const std::vector<float>& source, double factor, std::vector<float>& target) {
  if (source.empty()) return;
  if (target.empty()) target.resize(source.size());
  for (size_t i = 0; i < source.size(); ++i) {
    target[i] = static_cast<float>(target[i] + factor * source[i]);
  }
}

}  // namespace

Moments MakeMoments(int64_t k, bool with_cross) {
  CHECK(k > 0, "k={}", k);
  Moments moments;
  moments.k = k;
  moments.hessian.resize(k * k);
  if (with_cross) moments.cross.resize(k * k);
  return moments;
}

absl::Status CheckMoments(const Moments& moments) {
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
  RETURN_IF_ERROR(CheckFinite("hessian", moments.hessian, k));
  RETURN_IF_ERROR(CheckFinite("cross", moments.cross, k));
  RETURN_IF_ERROR(CheckFinite("cross_output", moments.cross_output, output_columns));
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

void ShrinkTowards(const Moments& mean, double num_prior_rows, Moments& own) {
  CHECK(own.k == mean.k, "own.k={} mean.k={}", own.k, mean.k);
  CHECK(num_prior_rows >= 0 && std::isfinite(num_prior_rows), "num_prior_rows={}", num_prior_rows);
  if (mean.num_rows == 0) return;
  const double factor = num_prior_rows / static_cast<double>(mean.num_rows);
  AddScaled(mean.hessian, factor, own.hessian);
  AddScaled(mean.cross, factor, own.cross);
  own.weight += factor * mean.weight;
}

}  // namespace wintserve::quantizer
