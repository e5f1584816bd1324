// Sums the second moments of a matrix's inputs, some rows at a time.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/cpu/thread_pool.h"
#include "kernels/operands.h"
#include "tools/quantizer/calibrate/moments.h"

namespace wintserve::quantizer {

// Threading: one thread calls; the pool outlives it.
// Memory:    the Moments, and 12 k bytes for each row of a call.
// Precision: float32 inside a call, whose sums are then added to the Moments: a relative error of
// at
//            most (rows of a call + number of calls) * 2^-24, of the sum of magnitudes.
// Determinism: sums do not depend on the number of threads, but on how rows are split over calls.
class MomentSums {
 public:
  // num_outputs: columns of cross_output; 0: none.
  MomentSums(int64_t k, int64_t num_outputs, kernels::cpu::ThreadPool* pool);

  // Rows [num_rows, k] of both models. x_f may be x_q; where every row so far had the same bits in
  // both there will be no cross. weights [num_rows], or empty: 1 each.
  // d [num_rows, num_outputs], wanted of every row beyond x_f W; null without num_outputs.
  void Add(kernels::ConstRows x_q, kernels::ConstRows x_f, kernels::ConstRows d, int64_t num_rows,
           std::span<const float> weights);

  Moments Finish();

 private:
  // sum[i, j] += sum over rows of left[r, i] right[r, j], for j <= i only if is_symmetric.
  // left is given as its transpose [k, row_stride].
  void AddProduct(const std::vector<float>& left, int64_t row_stride, std::vector<float> right,
                  int64_t num_columns, bool is_symmetric, std::vector<float>* sum);

  const int64_t k_;
  const int64_t num_outputs_;
  kernels::cpu::ThreadPool* const pool_;
  Moments moments_;
};

}  // namespace wintserve::quantizer
