// Which method makes the matrices of `wintserve quantize`: the one place that knows them all.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "kernels/cpu/thread_pool.h"
#include "tools/quantizer/forward/calibrated_quantizer.h"
#include "tools/quantizer/forward/calibration_text.h"
#include "tools/quantizer/forward/feedback_encoder.h"
#include "tools/quantizer/matrix_quantizer.h"
#include "tools/quantizer/output/output_dir.h"
#include "tools/quantizer/output/source.h"

namespace wintserve::quantizer {

struct MethodOptions {
  formats::KOrder k_order = formats::KOrder::kMma64;
  // Empty: every matrix is rounded by its weights alone. The rest means something with it only.
  std::filesystem::path calibration;
  CalibrationLimits limits;         // max_tokens 0: DefaultCalibrationTokens
  FeedbackEncoderOptions feedback;  // its k_order is the one above
  CalibrationOptions steps;
};

// As many tokens as 4 GiB hold of what calibration keeps of each while it goes through the layers,
// 8 * (hidden + max(1.5 * hidden, heads * head_dim)) bytes: 26,214 of the 300B model.
int64_t DefaultCalibrationTokens(const ModelConfig& config);

// What the method's results depend on, besides the source and the scheme. Reads the calibration
// file to its end, in little memory. Errors: a file that cannot be read, by its name;
// INVALID_ARGUMENT: it is no regular file, or a plain text that is not UTF-8.
absl::StatusOr<RunIdentity> IdentityOf(const MethodOptions& options);

struct Method {
  std::unique_ptr<MatrixQuantizer> quantizer;
  std::string note;  // a line about what it was given; empty: nothing to say
};

// Source and pool outlive it. Errors: whatever the method says before its first matrix, a
// calibration file among them.
absl::StatusOr<Method> MakeQuantizer(const MethodOptions& options, const Source& source,
                                     kernels::cpu::ThreadPool* pool);

}  // namespace wintserve::quantizer
