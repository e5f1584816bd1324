// Second moments of a matrix's inputs over a calibration set: what decides which errors of its
// weights show in its outputs.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "kernels/cpu/thread_pool.h"
#include "tools/quantizer/calibrate/large_array.h"

namespace wintserve::quantizer {

// Sums over the calibration rows that reach a matrix W [k, n]. Every row counts with a weight w: 1,
// or for the matrices of an expert the square of its routing weight, as its outputs count so. With
//   x_q  the row's inputs in the model whose earlier matrices are quantised already,
//   x_f  the same row's inputs in the unquantised model,
//   d    an extra output that is wanted beyond x_f W, for instance what repairs the residual
//   stream:
// Inputs are in true K order. Owns its arrays; thread-compatible.
struct Moments {
  int64_t k = 0;
  double weight = 0;         // sum of w
  int64_t num_rows = 0;      // rows added
  LargeVector hessian;       // [k, k] sum of w x_q x_q^T: symmetric, both halves filled
  LargeVector cross;         // [k, k] sum of w x_q (x_f - x_q)^T, or empty: x_f = x_q
  LargeVector cross_output;  // [k, n] sum of w x_q d^T, or empty: d = 0
};

// k^2 zeros in `hessian`, and in `cross` if wanted. REQUIRES: k > 0.
Moments MakeMoments(int64_t k, bool with_cross);

// OK if k > 0, the arrays have the sizes above (cross_output: any multiple of k), every value is
// finite and no diagonal entry of the hessian is negative. Else InvalidArgument that names the
// array and, for a value, its row and column. Reads everything once.
absl::Status CheckMoments(const Moments& moments, kernels::cpu::ThreadPool& pool);

// The hessian's diagonal divided by `weight`: the mean square of every input [k], the importance
// that quantizer::EncodeWint2 takes. All ones if no row was added. REQUIRES: CheckMoments is OK.
std::vector<float> InputImportance(const Moments& moments);

// Adds `num_prior_rows` imaginary rows to `own` that look like the average row of `mean`: for an
// expert that too few calibration rows were routed to, with `mean` the moments over all experts of
// its layer. own.hessian += num_prior_rows * mean.hessian / mean.num_rows, own.cross likewise where
// `mean` has it (made where `own` lacks it), own.weight likewise; num_rows and cross_output stay,
// as imaginary rows want no extra output. So an expert with num_prior_rows rows of its own weighs
// both alike, and one with none has the mean's. Nothing happens if mean.num_rows is 0. REQUIRES:
// own.k == mean.k, num_prior_rows >= 0 and finite.
void ShrinkTowards(const Moments& mean, double num_prior_rows, kernels::cpu::ThreadPool& pool,
                   Moments& own);

}  // namespace wintserve::quantizer
