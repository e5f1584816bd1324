#include <fmt/core.h>

#include <algorithm>
#include <atomic>
#include <cmath>

#include "common/check.h"
#include "common/status_macros.h"
#include "kernels/formats/bf16.h"
#include "kernels/formats/format_name.h"
#include "tools/quantizer/encode/encode.h"

namespace wintserve::quantizer {
namespace {

using formats::HostMatrix;
using formats::WeightFormat;

void EncodeChannels(FloatMatrix w, float largest_code, int64_t begin, int64_t end,
                    HostMatrix* out) {
  for (int64_t column = begin; column < end; ++column) {
    float largest = 0;
    for (int64_t row = 0; row < w.k; ++row)
      largest = std::max(largest, std::abs(w.At(row, column)));
    const float scale = formats::RoundToBfloat16(largest / largest_code);
    out->channel_scale[column] = scale;
    // All codes of a column of zeros are 0.
    const float divisor = scale > 0 ? scale : 1.0f;
    for (int64_t row = 0; row < w.k; ++row) {
      const float code = std::round(w.At(row, column) / divisor);
      out->codes_i8[row * w.n + column] =
          static_cast<int8_t>(std::clamp(code, -largest_code, largest_code));
    }
  }
}

}  // namespace

absl::Status CheckWeights(FloatMatrix w, kernels::cpu::ThreadPool& pool) {
  if (w.k <= 0 || w.n <= 0) {
    return absl::InvalidArgumentError(
        fmt::format("a matrix of {} rows and {} columns has no weights", w.k, w.n));
  }
  std::atomic<int64_t> first_wrong_row = w.k;
  pool.Run(w.k, w.k * w.n, [&](int64_t row, int) {
    const float* weights = w.data + row * w.n;
    bool all_right = true;
    // Also false for a NaN.
    for (int64_t column = 0; column < w.n; ++column) {
      all_right &= std::abs(weights[column]) <= kLargestWeight;
    }
    if (all_right) return;
    int64_t known = first_wrong_row;
    while (row < known && !first_wrong_row.compare_exchange_weak(known, row)) {
    }
  });
  const int64_t row = first_wrong_row;
  if (row == w.k) return absl::OkStatus();
  int64_t column = 0;
  while (std::abs(w.At(row, column)) <= kLargestWeight) ++column;
  return absl::InvalidArgumentError(
      fmt::format("the weight in row {}, column {} is {}; weights must be finite and at most 2^127",
                  row, column, w.At(row, column)));
}

absl::StatusOr<HostMatrix> EncodePerChannel(WeightFormat format, FloatMatrix w,
                                            kernels::cpu::ThreadPool& pool) {
  CHECK(format == WeightFormat::kWint4 || format == WeightFormat::kWint8, "format={}",
        formats::FormatName(format));
  RETURN_IF_ERROR(CheckWeights(w, pool));
  const int64_t interleaved_columns = format == WeightFormat::kWint4 ? 4 : 2;
  if (w.k % 64 != 0 || w.n % interleaved_columns != 0) {
    return absl::InvalidArgumentError(
        fmt::format("{} rows and {} columns: {} needs a multiple of 64 rows and of {} columns", w.k,
                    w.n, formats::FormatName(format), interleaved_columns));
  }
  HostMatrix out = formats::MakeHostMatrix(format, w.k, w.n);
  const float largest_code = format == WeightFormat::kWint4 ? 7.0f : 127.0f;
  constexpr int64_t kColumns = 64;
  pool.Run((w.n + kColumns - 1) / kColumns, w.k * w.n, [&](int64_t item, int) {
    EncodeChannels(w, largest_code, item * kColumns, std::min(w.n, (item + 1) * kColumns), &out);
  });
  return out;
}

}  // namespace wintserve::quantizer
