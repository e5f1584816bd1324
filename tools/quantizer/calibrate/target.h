// What a matrix should compute from quantised inputs, so that its outputs come nearest to those of
// the unquantised model.
#pragma once

#include "absl/status/statusor.h"
#include "kernels/cpu/thread_pool.h"
#include "tools/quantizer/calibrate/moments.h"
#include "tools/quantizer/encode/encode.h"

namespace wintserve::quantizer {

struct TargetOptions {
  // How much staying near W counts, in units of the mean of the hessian's diagonal: ridge
  // regression. At least kSmallestRidge.
  double ridge = 0.1;
};

inline constexpr double kSmallestRidge = 1e-6;

// The W' [k, n] of least
//     sum over rows of w ||x_f W + d - x_q W'||^2  +  ridge mean(diag H) ||W' - W||^2,
// which is W + (H + ridge mean(diag H) I)^-1 (C W + D) with H, C, D the three arrays of `moments`
// (asymmetric calibration, arXiv:2504.02692, with a ridge). Both the target of a matrix that is
// quantised next and the new weights of one that stays in float32 or bfloat16, such as a router.
// W itself where moments has neither cross nor cross_output, or no rows.
//
// Solved in float64 (Cholesky); C W is a product in float32, summed up in float64 every 256 terms:
// 8 k^2 bytes beside the operands, and 16 k bytes for each of 64 columns a thread. Deterministic:
// it does not depend on the number of threads. Errors: InvalidArgument if `moments` fails
// CheckMoments or does not fit w's shape, if w has a value that is not finite, or if the ridge is
// not finite or below kSmallestRidge.
absl::StatusOr<LargeVector> SolveTarget(FloatMatrix w, const Moments& moments,
                                        const TargetOptions& options,
                                        kernels::cpu::ThreadPool& pool);

}  // namespace wintserve::quantizer
