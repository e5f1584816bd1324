// Cholesky factors of large matrices, on all threads.
#pragma once

#include "Eigen/Core"
#include "kernels/cpu/thread_pool.h"

namespace wintserve::quantizer::calibrate {

// Replaces the lower half of a symmetric matrix by L, with L L^T the matrix; the upper half is
// neither read nor written. Returns whether the matrix is positive definite; if not, it holds
// nothing of use. Deterministic: it does not depend on the number of threads.
bool FactorInPlace(Eigen::MatrixXd& matrix, kernels::cpu::ThreadPool& pool);

}  // namespace wintserve::quantizer::calibrate
