// Encodes one weight matrix in float32, looking at nothing but its weights and at most how much
// each of its inputs matters. The result is the canonical host form; kernels/formats packs it.
#pragma once

#include <cstdint>
#include <span>

#include "absl/status/statusor.h"
#include "kernels/cpu/thread_pool.h"
#include "kernels/formats/matrix.h"
#include "tools/quantizer/encode/code_map.h"

namespace wintserve::quantizer {

// Weights beyond are refused: their scales or decoded values could leave what bf16 holds.
inline constexpr float kLargestWeight = 0x1p127f;

// A view of W [k, n], row-major, rows in true K order: y[column] = sum over row of
// x[row] * W[row][column]. The caller owns the data and keeps it while the view is used.
struct FloatMatrix {
  const float* data = nullptr;
  int64_t k = 0;
  int64_t n = 0;

  float At(int64_t row, int64_t column) const { return data[row * n + column]; }
};

struct Wint2Options {
  // Of these each column takes the one with the least error. Not empty; each passes CheckCodeMap.
  std::span<const CodeMap> maps = DefaultCodeMaps();
  formats::KOrder k_order = formats::KOrder::kMma64;
  // Local scales tried for each 64-group besides 0: the first guess and so many to each side of it.
  // 0 … 7.
  int local_scale_radius = 2;
  // How often a column's super scale is fitted to its bytes by least squares, and the bytes
  // searched again. Ends early for columns that gain nothing. 0 or more.
  int num_refits = 1;
};

// Least sum over rows of importance[row] * (W - W')^2 that the search finds, for each column on its
// own: code map, super scale, local scales and bytes. A byte is always the best one for its scale,
// except where two differ by less than float32 rounding.
//
//   importance  [w.k], for instance the mean square of each input, or empty: all alike. Finite and
//               not negative. A group of 64 rows that are all 0 decodes to zeros.
//
// Super scales lie in 2^-126 … 2^119: never 0, subnormal or infinite, and no decoded weight is
// infinite. Weights below about 2^-128 become zeros. The error is never above that of zeros.
// Deterministic: it does not depend on the number of threads.
// Errors: InvalidArgument if w.k is not a multiple of 128 (the stored local scales are pairs of
// groups), if a weight is not finite or beyond kLargestWeight (names its row and column), or if
// `importance` or `options` is not as said above.
absl::StatusOr<formats::HostMatrix> EncodeWint2(FloatMatrix w, std::span<const float> importance,
                                                const Wint2Options& options,
                                                kernels::cpu::ThreadPool& pool);

// Whole numbers and a scale a column, as PaddlePaddle's weight_quantize on the CPU makes them from
// bf16 weights, bit for bit: scale = bf16(largest magnitude / qmax), code = weight / scale, rounded
// half away from zero and cut to -qmax … qmax, with qmax 7 (kWint4) or 127 (kWint8).
// Deterministic. Errors: InvalidArgument if w.k is not a multiple of 64 or w.n not one of 4
// (kWint4) or 2 (kWint8), which the stored layout needs, or if a weight is not finite or beyond
// kLargestWeight (names its row and column). REQUIRES: format is kWint4 or kWint8.
absl::StatusOr<formats::HostMatrix> EncodePerChannel(formats::WeightFormat format, FloatMatrix w,
                                                     kernels::cpu::ThreadPool& pool);

// OK if every weight is finite and within kLargestWeight, else InvalidArgument that names the first
// one that is not, by row and column. For whoever encodes in another way.
absl::Status CheckWeights(FloatMatrix w, kernels::cpu::ThreadPool& pool);

}  // namespace wintserve::quantizer
