// Calibration sets for tests.
#pragma once

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "Eigen/Core"
#include "tools/quantizer/calibrate/moments.h"
#include "tools/quantizer/encode/encode.h"

namespace wintserve::quantizer {

using FloatArray = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

inline FloatArray GaussianMatrix(int64_t rows, int64_t columns, std::mt19937& rng) {
  std::normal_distribution<float> normal;
  FloatArray matrix(rows, columns);
  for (float& value : matrix.reshaped()) value = normal(rng);
  return matrix;
}

// Rows of inputs whose covariance has eigenvalues that fall as 1 / (1 + index)^decay in a random
// basis: what the inputs of a trained model look like.
inline FloatArray CorrelatedInputs(int64_t rows, int64_t k, double decay, std::mt19937& rng) {
  FloatArray latent = GaussianMatrix(rows, k, rng);
  for (int64_t i = 0; i < k; ++i) {
    latent.col(i) *= static_cast<float>(std::pow(1.0 + static_cast<double>(i), -decay / 2));
  }
  return latent * (GaussianMatrix(k, k, rng) / std::sqrt(static_cast<float>(k)));
}

// The moments of rows with weight 1, summed in float64.
inline Moments MomentsOf(const FloatArray& inputs) {
  const int64_t k = inputs.cols();
  const Eigen::MatrixXd x = inputs.cast<double>();
  Moments moments = MakeMoments(k, false);
  moments.num_rows = inputs.rows();
  moments.weight = static_cast<double>(inputs.rows());
  Eigen::Map<FloatArray>(moments.hessian.data(), k, k) = (x.transpose() * x).cast<float>();
  return moments;
}

inline FloatMatrix View(const FloatArray& matrix) {
  return {.data = matrix.data(), .k = matrix.rows(), .n = matrix.cols()};
}

}  // namespace wintserve::quantizer
