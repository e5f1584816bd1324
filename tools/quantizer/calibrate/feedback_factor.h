// The hessian of a matrix's inputs, prepared for encoders with error feedback: damped, in the order
// in which the rows are encoded, and factored. Made once, used for every matrix with these inputs.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/cpu/thread_pool.h"
#include "kernels/formats/matrix.h"
#include "tools/quantizer/calibrate/large_array.h"
#include "tools/quantizer/calibrate/moments.h"

namespace wintserve::quantizer {

inline constexpr double kSmallestDamping = 1e-6;

struct FactorOptions {
  // Added to the diagonal, in units of its mean: how far the calibration set is not trusted. At
  // least kSmallestDamping.
  double damping = 0.03;
  // kWint2: rows go in blocks of four, those of a byte. kWint4, kWint8: one by one.
  formats::WeightFormat format = formats::WeightFormat::kWint2;
  formats::KOrder k_order = formats::KOrder::kMma64;  // of a kWint2 matrix
  // Groups of 64 rows, and blocks inside a group, with the largest sum of their diagonal first, so
  // that many rows are left to make up for the errors that matter most. Else in stored order.
  bool important_first = true;
};

// Immutable; any thread may read it. Memory: 8 k^2 bytes; Make needs 8 k^2 more while it runs,
// beside the 4 k^2 of moments.hessian (k = 8192: 512 MiB, 1.25 GiB at the peak).
class FeedbackFactor {
 public:
  // A hessian of zeros (no calibration rows) counts as the identity: rounding to nearest. Inputs
  // that are always 0 are damped like the others, so their weights are rounded to nearest. Errors:
  // InvalidArgument if `moments` fails CheckMoments, if k is not a multiple of 64 or the damping is
  // not finite or below kSmallestDamping; FailedPrecondition if the damped hessian has no Cholesky
  // factor in float64, which means that `hessian` is not a sum of squares. REQUIRES: options.format
  // is kWint2, kWint4 or kWint8.
  static absl::StatusOr<FeedbackFactor> Make(const Moments& moments, const FactorOptions& options,
                                             kernels::cpu::ThreadPool& pool);

  FeedbackFactor(FeedbackFactor&&) = default;
  FeedbackFactor& operator=(FeedbackFactor&&) = default;

  int64_t k() const { return k_; }
  const FactorOptions& options() const { return options_; }

  // Mean of the undamped diagonal, by which hessian() is divided (1 for a hessian of zeros).
  double unit() const { return unit_; }

  // Whether there were no calibration rows: hessian() is the identity.
  bool is_identity() const { return is_identity_; }

  // [k]: the true row at each position of the encoding order, and its row in the stored order. The
  // four rows of a WINT2 byte are neighbours in slot order, the 64 rows of a group as well.
  std::span<const int32_t> true_row() const { return true_row_; }
  std::span<const int32_t> stored_row() const { return stored_row_; }

  // [k, k] in encoding order, row-major: (hessian + damping mean(diag) I) / unit(). Its rows are
  // hessian_stride() apart and begin at cache lines, those side by side in other sets of a cache.
  const float* hessian() const { return hessian_.data(); }
  int64_t hessian_stride() const { return k_ + kStridePadding; }
  // [k, k] M, lower triangular, with M^T M = hessian(). The error e^T hessian() e of a column is so
  // the sum over positions i of (M_ii e_i + sum over j < i of M_ij e_j)^2: what is added at
  // position i depends on errors made before, for which the choice at i can make up. (Solving for
  // it is what GPTQ, arXiv:2210.17323, does by the inverse's factor, and LDLQ of arXiv:2307.13304.)
  const float* factor() const { return factor_.data(); }

 private:
  static constexpr int64_t kStridePadding = 16;  // a cache line

  FeedbackFactor() = default;

  void SetOrder(const Moments& moments);
  void SetHessian(const Moments& moments, kernels::cpu::ThreadPool& pool);
  absl::Status Factorize(kernels::cpu::ThreadPool& pool);

  int64_t k_ = 0;
  FactorOptions options_;
  double unit_ = 1;
  bool is_identity_ = false;
  std::vector<int32_t> true_row_;
  std::vector<int32_t> stored_row_;
  calibrate::LargeArray hessian_;
  calibrate::LargeArray factor_;
};

}  // namespace wintserve::quantizer
