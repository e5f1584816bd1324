// What the encoders with error feedback check alike.
#pragma once

#include "absl/status/status.h"
#include "tools/quantizer/calibrate/column_tile.h"
#include "tools/quantizer/calibrate/error_feedback.h"

namespace wintserve::quantizer::calibrate {

// Errors: those that EncodeWint2WithFeedback and EncodePerChannelWithFeedback share.
absl::Status CheckTarget(FloatMatrix target, int64_t row_multiple, int64_t column_multiple,
                         const FeedbackFactor& factor, const FeedbackOptions& options,
                         kernels::cpu::ThreadPool& pool);

}  // namespace wintserve::quantizer::calibrate
