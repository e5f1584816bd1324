#include "tools/quantizer/calibrate/target.h"

#include <algorithm>
#include <cmath>

#include "Eigen/Cholesky"
#include "Eigen/Core"
#include "common/status_macros.h"
#include "fmt/format.h"

namespace wintserve::quantizer {
namespace {

using Matrix = Eigen::MatrixXd;  // column-major
using FloatMap =
    Eigen::Map<const Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>>;

constexpr int64_t kTileColumns = 64;
constexpr int64_t kTileRows = 256;  // of C that are float64 at a time

absl::Status CheckArguments(FloatMatrix w, const Moments& moments, const TargetOptions& options,
                            kernels::cpu::ThreadPool& pool) {
  RETURN_IF_ERROR(CheckMoments(moments));
  RETURN_IF_ERROR(CheckWeights(w, pool));
  if (moments.k != w.k) {
    return absl::InvalidArgumentError(
        fmt::format("target: the moments are of {} inputs, the matrix has {}", moments.k, w.k));
  }
  if (!moments.cross_output.empty() &&
      static_cast<int64_t>(moments.cross_output.size()) != w.k * w.n) {
    return absl::InvalidArgumentError(
        fmt::format("target: cross_output has {} values, the matrix has {} x {}",
                    moments.cross_output.size(), w.k, w.n));
  }
  if (!(options.ridge >= kSmallestRidge) || !std::isfinite(options.ridge)) {
    return absl::InvalidArgumentError(fmt::format(
        "target: ridge is {}, must be finite and at least {}", options.ridge, kSmallestRidge));
  }
  return absl::OkStatus();
}

// Columns [begin, begin + width) of C W + D.
Matrix RightHandSide(FloatMatrix w, const Moments& moments, int64_t begin, int64_t width) {
  const FloatMap weights(w.data, w.k, w.n);
  Matrix tile = Matrix::Zero(w.k, width);
  if (!moments.cross.empty()) {
    const FloatMap cross(moments.cross.data(), w.k, w.k);
    const Matrix columns = weights.middleCols(begin, width).cast<double>();
    for (int64_t row = 0; row < w.k; row += kTileRows) {
      const int64_t rows = std::min(kTileRows, w.k - row);
      const Matrix part = cross.middleRows(row, rows).cast<double>();
      tile.middleRows(row, rows).noalias() = part * columns;
    }
  }
  if (!moments.cross_output.empty()) {
    const FloatMap extra(moments.cross_output.data(), w.k, w.n);
    tile += extra.middleCols(begin, width).cast<double>();
  }
  return tile;
}

}  // namespace

absl::StatusOr<std::vector<float>> SolveTarget(FloatMatrix w, const Moments& moments,
                                               const TargetOptions& options,
                                               kernels::cpu::ThreadPool& pool) {
  RETURN_IF_ERROR(CheckArguments(w, moments, options, pool));
  std::vector<float> target(w.data, w.data + w.k * w.n);
  const FloatMap hessian(moments.hessian.data(), w.k, w.k);
  const double mean = hessian.diagonal().cast<double>().mean();
  const bool has_correction = !moments.cross.empty() || !moments.cross_output.empty();
  if (!has_correction || mean == 0) return target;

  // In units of the mean, which keeps the pivots near 1.
  Matrix damped = hessian.cast<double>() / mean;
  damped.diagonal().array() += options.ridge;
  const Eigen::LLT<Eigen::Ref<Matrix>> factor(damped);  // in place
  if (factor.info() != Eigen::Success) {
    return absl::FailedPreconditionError(
        fmt::format("target: the hessian of {} inputs with ridge {} is not positive definite", w.k,
                    options.ridge));
  }
  const int64_t num_tiles = (w.n + kTileColumns - 1) / kTileColumns;
  pool.Run(num_tiles, 3 * w.k * w.k * w.n, [&](int64_t item, int) {
    const int64_t begin = item * kTileColumns;
    const int64_t width = std::min(kTileColumns, w.n - begin);
    Matrix tile = RightHandSide(w, moments, begin, width) / mean;
    factor.solveInPlace(tile);
    for (int64_t row = 0; row < w.k; ++row) {
      float* out = target.data() + row * w.n + begin;
      for (int64_t column = 0; column < width; ++column) {
        out[column] = static_cast<float>(out[column] + tile(row, column));
      }
    }
  });
  return target;
}

}  // namespace wintserve::quantizer
