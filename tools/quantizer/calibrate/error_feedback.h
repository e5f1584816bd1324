// Encoders that look at the inputs of a matrix: the least error of its outputs over a calibration
// set, not of its weights.
//
// The error of a column is e^T A e with e the column of (target - decoded), A = H + damping
// mean(diag H) I and H the hessian of its Moments. "Decoded" are the very bf16 values that
// formats::DecodeToFloat gives, so what is minimised is what is served.
//
// Rows are rounded in turn, and the rows after them make up for the errors before them (error
// feedback); then sweeps of coordinate descent go over the codes again, each with the least error
// while all others stay, which never raises the error of a column.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/cpu/thread_pool.h"
#include "kernels/formats/matrix.h"
#include "tools/quantizer/calibrate/feedback_factor.h"
#include "tools/quantizer/calibrate/moments.h"
#include "tools/quantizer/encode/code_map.h"
#include "tools/quantizer/encode/encode.h"

namespace wintserve::quantizer {

struct FeedbackOptions {
  // The WINT2 maps: error feedback runs with each of them, every column keeps the best.
  std::span<const CodeMap> maps = DefaultCodeMaps();
  // Of EncodeWint2WithFeedback and EncodePerChannelWithFeedback from Moments; a FeedbackFactor has
  // its own.
  double damping = 0.03;
  bool important_first = true;
  formats::KOrder k_order = formats::KOrder::kMma64;
  // Sweeps after the feedback, at most. 16 columns that go together get no more after one that
  // lowered their error by less than least_gain of it. 0 or more; at least 0, below 1.
  int num_sweeps = 4;
  // WINT2: how often after each sweep all bytes are searched once more, 16 together, of which four
  // and four lie in a group that is drawn, so that not the same ones meet each time. 0 or more.
  int num_mixed_searches = 1;
  double least_gain = 0.001;
  // Before each sweep, fit the scale of every column (super scale of WINT2) by least squares; kept
  // where it lowers the error.
  bool refit_scale = true;
  // WINT2: local scales tried for each group of 64 rows besides 0, in the feedback and in the
  // sweeps: so many to each side of the first guess or of the present one. 0 … 7.
  int local_scale_radius = 2;
  // WINT4: scales tried for a column run from its largest magnitude / 7 down to this multiple of
  // it.
  double smallest_scale_factor = 0.5;
};

struct FeedbackResult {
  formats::HostMatrix matrix;
  // Sum over columns of e^T A e, in the units of Moments::hessian: after the feedback, then after
  // each sweep. The last one belongs to `matrix`.
  std::vector<double> errors;
  // The same of a matrix of zeros: errors / zero_error is the relative error of the outputs.
  double zero_error = 0;
};

// WINT2. `target` [k, n] in true K order, k == factor.k().
// Without calibration rows the search starts from EncodeWint2's result, so it is never worse.
// Deterministic: it does not depend on the number of threads. Beside the result, a thread holds
// 24 k bytes for each of 64 columns.
// Errors: InvalidArgument if target.k is not a multiple of 128 or not factor.k(), if a weight is
// not finite or beyond kLargestWeight, or if `options` is not as said above. REQUIRES: factor was
// made for kWint2.
absl::StatusOr<FeedbackResult> EncodeWint2WithFeedback(FloatMatrix target,
                                                       const FeedbackFactor& factor,
                                                       const FeedbackOptions& options,
                                                       kernels::cpu::ThreadPool& pool);

// WINT4 and WINT8: codes -7 … 7 or -127 … 127 and a scale a column.
// Errors: as above, with target.k a multiple of 64 and target.n one of 4 (WINT4) or 2 (WINT8).
// REQUIRES: factor was made for `format`, which is kWint4 or kWint8.
absl::StatusOr<FeedbackResult> EncodePerChannelWithFeedback(formats::WeightFormat format,
                                                            FloatMatrix target,
                                                            const FeedbackFactor& factor,
                                                            const FeedbackOptions& options,
                                                            kernels::cpu::ThreadPool& pool);

// The same for a matrix that shares its inputs with no other: makes the factor, too.
absl::StatusOr<FeedbackResult> EncodeWint2WithFeedback(FloatMatrix target, const Moments& moments,
                                                       const FeedbackOptions& options,
                                                       kernels::cpu::ThreadPool& pool);
absl::StatusOr<FeedbackResult> EncodePerChannelWithFeedback(formats::WeightFormat format,
                                                            FloatMatrix target,
                                                            const Moments& moments,
                                                            const FeedbackOptions& options,
                                                            kernels::cpu::ThreadPool& pool);

}  // namespace wintserve::quantizer
