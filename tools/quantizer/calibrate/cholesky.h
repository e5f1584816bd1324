// Cholesky factors of large matrices, on all threads.
#pragma once

#include <cstdint>

#include "Eigen/Core"
#include "kernels/cpu/thread_pool.h"

namespace wintserve::quantizer::calibrate {

// Replaces the lower half of a symmetric matrix by L, with L L^T the matrix; of the upper half
// nothing is read, and what it holds afterwards means nothing. Returns whether the matrix is
// positive definite; if not, it holds nothing of use. Deterministic: it does not depend on the
// number of threads.
bool FactorInPlace(Eigen::MatrixXd& matrix, kernels::cpu::ThreadPool& pool);

// Copies the lower half to the upper one: L^T next to L.
void MirrorLower(Eigen::MatrixXd& matrix, kernels::cpu::ThreadPool& pool);

// Solves L L^T X = B in place. mirrored: L with L^T in its upper half, as MirrorLower makes it.
// tile [rows, kPanelColumns], row-major: B, then X.
void SolvePanel(const Eigen::MatrixXd& mirrored, double* tile);

}  // namespace wintserve::quantizer::calibrate
