#include "tools/quantizer/calibrate/encoder_checks.h"

#include "common/status_macros.h"
#include "fmt/format.h"

namespace wintserve::quantizer::calibrate {

absl::Status CheckTarget(FloatMatrix target, int64_t row_multiple, int64_t column_multiple,
                         const FeedbackFactor& factor, const FeedbackOptions& options,
                         kernels::cpu::ThreadPool& pool) {
  if (target.k != factor.k()) {
    return absl::InvalidArgumentError(fmt::format(
        "error feedback: the moments are of {} inputs, the matrix has {}", factor.k(), target.k));
  }
  if (target.k <= 0 || target.k % row_multiple != 0) {
    return absl::InvalidArgumentError(
        fmt::format("error feedback: the matrix has {} inputs, must have a positive multiple of {}",
                    target.k, row_multiple));
  }
  if (target.n <= 0 || target.n % column_multiple != 0) {
    return absl::InvalidArgumentError(fmt::format(
        "error feedback: the matrix has {} outputs, must have a positive multiple of {}", target.n,
        column_multiple));
  }
  if (options.num_sweeps < 0) {
    return absl::InvalidArgumentError(
        fmt::format("error feedback: num_sweeps is {}, must be 0 or more", options.num_sweeps));
  }
  if (!(options.least_gain >= 0 && options.least_gain < 1)) {
    return absl::InvalidArgumentError(fmt::format(
        "error feedback: least_gain is {}, must be at least 0 and below 1", options.least_gain));
  }
  return CheckWeights(target, pool);
}

}  // namespace wintserve::quantizer::calibrate
