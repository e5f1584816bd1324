// Makes matrices with error feedback, aimed at what the unquantised model computes.
#pragma once

#include <cstdint>

#include "kernels/cpu/thread_pool.h"
#include "tools/quantizer/calibrate/error_feedback.h"
#include "tools/quantizer/calibrate/target.h"
#include "tools/quantizer/forward/matrix_encoder.h"

namespace wintserve::quantizer {

struct FeedbackEncoderOptions {
  FeedbackOptions feedback;
  TargetOptions target = {.ridge = 0.1};
  // Quantised matrices aim at the outputs of the unquantised model rather than at those that their
  // own weights would give for the inputs that they get.
  bool asymmetric = true;
  // Matrices that stay as they are, solved towards the same.
  bool resolve_router = true;
  bool resolve_plain =
      true;  // attention, dense MLPs and shared experts, where the scheme has them so
  // Matrices that add to the residual make up for what it has lost so far.
  bool repair_residual = true;
  // A matrix with more inputs is rounded to nearest: its hessian, several times in memory, would
  // take gigabytes.
  int64_t max_inputs = 16384;
};

// Error feedback (calibrate/error_feedback.h) for every matrix that is quantised. The pool outlives
// it. Errors of Encode: as the functions of calibrate/ and encode/ have them.
class FeedbackEncoder final : public MatrixEncoder {
 public:
  FeedbackEncoder(const FeedbackEncoderOptions& options, kernels::cpu::ThreadPool* pool)
      : options_(options), pool_(pool) {}

  MomentNeeds Needs(const MatrixRef& ref, StoredFormat format, int64_t num_inputs,
                    bool models_differ) const override;
  absl::StatusOr<formats::HostMatrix> Encode(const MatrixRef& ref, StoredFormat format,
                                             const formats::HostMatrix& source,
                                             const Moments* moments) override;

 private:
  const FeedbackEncoderOptions options_;
  kernels::cpu::ThreadPool* const pool_;
};

}  // namespace wintserve::quantizer
