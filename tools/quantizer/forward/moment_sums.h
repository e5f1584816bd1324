// Sums the second moments of a matrix's inputs, some rows at a time.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/cpu/thread_pool.h"
#include "kernels/operands.h"
#include "tools/quantizer/calibrate/large_array.h"
#include "tools/quantizer/calibrate/moments.h"

namespace wintserve::quantizer {

// Threading: one thread calls; the pool outlives it.
// Memory:    the Moments, and 8 k bytes (4 k + 4 num_outputs if that is more) for each row of a
//            call.
// Precision: float32 inside kPartRows rows, whose sums are then added to the Moments: a relative
//            error of at most (kPartRows + number of parts) * 2^-24, of the sum of magnitudes.
// Determinism: sums do not depend on the number of threads, but on how rows are split into parts:
//            a call's rows by kPartRows, the last part with what is left.
class MomentSums {
 public:
  static constexpr int64_t kPartRows = 1024;

  // num_outputs: columns of cross_output; 0: none.
  MomentSums(int64_t k, int64_t num_outputs, kernels::cpu::ThreadPool* pool);

  // Rows [num_rows, k] of both models. x_f may be x_q; where every row so far had the same bits in
  // both there will be no cross. weights [num_rows], or empty: 1 each.
  // d [num_rows, num_outputs], wanted of every row beyond x_f W; null without num_outputs.
  void Add(kernels::ConstRows x_q, kernels::ConstRows x_f, kernels::ConstRows d, int64_t num_rows,
           std::span<const float> weights);

  Moments Finish();

 private:
  // One factor of a product, of the rows of a call.
  struct Operand {
    calibrate::LargeArray values;
    int64_t size = 0;
  };
  enum class Wanted { kAll, kLowerHalf, kPartsThatDiffer };

  int64_t num_parts() const { return (num_rows_ + kPartRows - 1) / kPartRows; }
  int64_t PartRows(int64_t part) const;
  // [k, num_columns] zeros.
  void SetZeros(int64_t num_columns, LargeVector* sum);
  // x_q times the roots of weights, transposed: of each part [k, rows of the part].
  void SetLeft(kernels::ConstRows x_q);
  // Tiles of columns, each [rows, kTileColumns]. row(r, column, count, out) writes so many columns.
  template <typename Row>
  void SetRight(int64_t num_columns, const Row& row);
  // Which rows differ in their bits, and whether any does.
  bool FindDifferences(kernels::ConstRows x_q, kernels::ConstRows x_f);
  bool PartDiffers(int64_t part) const;
  // sum[i, j] += left[r, i] right[r, j], part by part.
  void AddProduct(int64_t num_columns, Wanted wanted, LargeVector* sum);
  // Makes room; what was there is lost.
  static void Reserve(int64_t size, Operand* operand);

  const int64_t k_;
  const int64_t num_outputs_;
  kernels::cpu::ThreadPool* const pool_;
  Moments moments_;
  // Of the present call.
  int64_t num_rows_ = 0;
  std::vector<float> roots_;   // of the weights
  std::vector<char> differs_;  // [num_rows]
  Operand left_;
  Operand right_;
};

}  // namespace wintserve::quantizer
