#include <fmt/core.h>

#include <algorithm>
#include <array>
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

constexpr int64_t kBlockColumns = 64;

// Half away from zero, as std::round, by a conversion that compilers turn into vector code. With a
// whole half, the largest number below it would round up. REQUIRES: the result fits int32.
int32_t RoundHalfAway(float value) {
  constexpr float kJustBelowHalf = 0x1.fffffep-2f;
  return static_cast<int32_t>(value + std::copysign(kJustBelowHalf, value));
}

// A block of columns by rows: columns are far apart in memory.
void EncodeBlock(FloatMatrix w, int32_t largest_code, int64_t begin, int64_t end, HostMatrix* out) {
  const int64_t num_columns = end - begin;
  std::array<float, kBlockColumns> largest{};
  for (int64_t row = 0; row < w.k; ++row) {
    const float* weights = w.data + row * w.n + begin;
    for (int64_t i = 0; i < num_columns; ++i) {
      largest[i] = std::max(largest[i], std::abs(weights[i]));
    }
  }
  std::array<float, kBlockColumns> divisors{};
  for (int64_t i = 0; i < num_columns; ++i) {
    const float scale = formats::RoundToBfloat16(largest[i] / static_cast<float>(largest_code));
    out->channel_scale[begin + i] = scale;
    // Of weights so small that their scale is 0 all codes are 0: any divisor does that.
    divisors[i] = scale > 0 ? scale : 1.0f;
  }
  for (int64_t row = 0; row < w.k; ++row) {
    const float* weights = w.data + row * w.n + begin;
    int8_t* codes = out->codes_i8.data() + row * w.n + begin;
    for (int64_t i = 0; i < num_columns; ++i) {
      const int32_t code = RoundHalfAway(weights[i] / divisors[i]);
      codes[i] = static_cast<int8_t>(std::clamp(code, -largest_code, largest_code));
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
  const int32_t largest_code = format == WeightFormat::kWint4 ? 7 : 127;
  pool.Run((w.n + kBlockColumns - 1) / kBlockColumns, w.k * w.n, [&](int64_t item, int) {
    const int64_t begin = item * kBlockColumns;
    EncodeBlock(w, largest_code, begin, std::min(w.n, begin + kBlockColumns), &out);
  });
  return out;
}

}  // namespace wintserve::quantizer
