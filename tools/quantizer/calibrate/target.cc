#include "tools/quantizer/calibrate/target.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "Eigen/Core"
#include "common/status_macros.h"
#include "fmt/format.h"
#include "tools/quantizer/calibrate/cholesky.h"
#include "tools/quantizer/calibrate/column_tile.h"
#include "tools/quantizer/calibrate/double_product.h"

namespace wintserve::quantizer {
namespace {

using FloatMap =
    Eigen::Map<const Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>>;

using calibrate::kPanelColumns;
static_assert(kPanelColumns == calibrate::kTileColumns);

// Terms of C W that are summed up in float32. Their error is of the kind and size that the sums of
// so many rows in C have themselves.
constexpr int64_t kTerms = 256;

// 64 columns, row-major.
struct Tile {
  explicit Tile(int64_t k)
      : values(k * kPanelColumns), weights(k * kPanelColumns), part(k * kPanelColumns) {}
  std::vector<double> values;
  std::vector<float> weights;
  std::vector<float> part;
};

absl::Status CheckArguments(FloatMatrix w, const Moments& moments, const TargetOptions& options,
                            kernels::cpu::ThreadPool& pool) {
  RETURN_IF_ERROR(CheckMoments(moments, pool));
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

// (C W + D) / mean of columns [begin, begin + width), and zeros.
void SetRightHandSide(FloatMatrix w, const Moments& moments, double mean, int64_t begin,
                      int64_t width, Tile& tile) {
  std::fill(tile.values.begin(), tile.values.end(), 0.0);
  if (!moments.cross.empty()) {
    std::fill(tile.weights.begin(), tile.weights.end(), 0.0f);
    for (int64_t row = 0; row < w.k; ++row) {
      std::copy_n(w.data + row * w.n + begin, width, tile.weights.data() + row * kPanelColumns);
    }
    for (int64_t first = 0; first < w.k; first += kTerms) {
      std::fill(tile.part.begin(), tile.part.end(), 0.0f);
      calibrate::AddProduct(moments.cross.data() + first, w.k, w.k, std::min(kTerms, w.k - first),
                            tile.weights.data() + first * kPanelColumns, tile.part.data());
      for (size_t i = 0; i < tile.values.size(); ++i) tile.values[i] += double{tile.part[i]};
    }
  }
  for (int64_t row = 0; row < w.k; ++row) {
    double* to = tile.values.data() + row * kPanelColumns;
    if (!moments.cross_output.empty()) {
      const float* extra = moments.cross_output.data() + row * w.n + begin;
      for (int64_t column = 0; column < width; ++column) to[column] += double{extra[column]};
    }
    for (int64_t column = 0; column < width; ++column) to[column] /= mean;
  }
}

}  // namespace

absl::StatusOr<LargeVector> SolveTarget(FloatMatrix w, const Moments& moments,
                                        const TargetOptions& options,
                                        kernels::cpu::ThreadPool& pool) {
  RETURN_IF_ERROR(CheckArguments(w, moments, options, pool));
  LargeVector target(w.k * w.n);
  pool.Run(w.k, w.k * w.n, [&](int64_t row, int) {
    std::copy_n(w.data + row * w.n, w.n, target.data() + row * w.n);
  });
  const FloatMap hessian(moments.hessian.data(), w.k, w.k);
  const double mean = hessian.diagonal().cast<double>().mean();
  const bool has_correction = !moments.cross.empty() || !moments.cross_output.empty();
  if (!has_correction || mean == 0) return target;

  // In units of the mean, which keeps the pivots near 1.
  Eigen::MatrixXd damped(w.k, w.k);
  pool.Run(w.k, w.k * w.k, [&](int64_t column, int) {
    damped.col(column) = hessian.row(column).cast<double>() / mean;
    damped(column, column) += options.ridge;
  });
  if (!calibrate::FactorInPlace(damped, pool)) {
    return absl::FailedPreconditionError(
        fmt::format("target: the hessian of {} inputs with ridge {} is not positive definite", w.k,
                    options.ridge));
  }
  calibrate::MirrorLower(damped, pool);
  const int64_t num_tiles = (w.n + kPanelColumns - 1) / kPanelColumns;
  std::vector<std::unique_ptr<Tile>> tiles(pool.num_threads());
  pool.Run(num_tiles, 3 * w.k * w.k * w.n, [&](int64_t item, int thread) {
    if (tiles[thread] == nullptr) tiles[thread] = std::make_unique<Tile>(w.k);
    Tile& tile = *tiles[thread];
    const int64_t begin = item * kPanelColumns;
    const int64_t width = std::min(kPanelColumns, w.n - begin);
    SetRightHandSide(w, moments, mean, begin, width, tile);
    calibrate::SolvePanel(damped, tile.values.data());
    for (int64_t row = 0; row < w.k; ++row) {
      float* out = target.data() + row * w.n + begin;
      const double* correction = tile.values.data() + row * kPanelColumns;
      for (int64_t column = 0; column < width; ++column) {
        out[column] = static_cast<float>(out[column] + correction[column]);
      }
    }
  });
  return target;
}

}  // namespace wintserve::quantizer
