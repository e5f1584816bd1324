#include "tools/quantizer/make_quantizer.h"

#include <fmt/format.h>
#include <xxhash.h>

#include <algorithm>
#include <utility>

#include "api_server/text/tokenizer.h"
#include "common/read_file.h"
#include "common/status_macros.h"
#include "tools/quantizer/output/rounding_quantizer.h"

namespace wintserve::quantizer {
namespace {

std::string YesOrNo(bool value) { return value ? "yes" : "no"; }

absl::StatusOr<Method> MakeCalibrated(const MethodOptions& options, const Source& source,
                                      kernels::cpu::ThreadPool* pool) {
  ASSIGN_OR_RETURN(const std::unique_ptr<Tokenizer> tokenizer, Tokenizer::Load(source.dir));
  CalibrationLimits limits = options.limits;
  if (limits.max_tokens == 0) limits.max_tokens = DefaultCalibrationTokens(source.config);
  limits.max_sequence_tokens =
      std::min<int64_t>(limits.max_sequence_tokens, source.config.max_position_embeddings);
  ASSIGN_OR_RETURN(CalibrationText text,
                   LoadCalibrationText(options.calibration, *tokenizer, limits));
  Method method;
  method.note = fmt::format("calibrating with {} tokens in {} sequences of {} records",
                            text.num_tokens, text.sequences.size(), text.num_records);
  if (text.num_cut_records > 0) {
    method.note += fmt::format(", {} of which lost what is beyond {} tokens", text.num_cut_records,
                               limits.max_sequence_tokens);
  }
  FeedbackEncoderOptions feedback = options.feedback;
  feedback.feedback.k_order = options.k_order;
  ASSIGN_OR_RETURN(method.quantizer,
                   CalibratedQuantizer::Create(
                       source.config, *source.checkpoint, std::move(text.sequences),
                       std::make_unique<FeedbackEncoder>(feedback, pool), options.steps, pool));
  return method;
}

}  // namespace

int64_t DefaultCalibrationTokens(const ModelConfig& config) {
  constexpr int64_t kBytes = int64_t{4} << 30;
  const int64_t hidden = config.hidden_size;
  const int64_t attended = int64_t{config.num_heads} * config.head_dim;
  // Residuals of both models; in MoE layers what the experts of both give and what is to be made up
  // for, and between qkv and output the attention of both.
  return std::max<int64_t>(1, kBytes / (8 * hidden + std::max(12 * hidden, 8 * attended)));
}

absl::StatusOr<RunIdentity> IdentityOf(const MethodOptions& options) {
  const bool is_natural = options.k_order == formats::KOrder::kNatural;
  RunIdentity identity = {{"--k-order", is_natural ? "natural" : "mma64"}};
  if (options.calibration.empty()) return identity;
  ASSIGN_OR_RETURN(const std::string text, ReadFile(options.calibration));
  const FeedbackEncoderOptions& feedback = options.feedback;
  const auto number = [](auto value) { return fmt::format("{}", value); };
  identity.insert(identity.end(),
                  {{"the calibration file's digest",
                    fmt::format("{:016x}", XXH3_64bits(text.data(), text.size()))},
                   {"--calibration-records", number(options.limits.max_records)},
                   {"--calibration-tokens", number(options.limits.max_tokens)},
                   {"--calibration-sequence", number(options.limits.max_sequence_tokens)},
                   {"--damping", number(feedback.feedback.damping)},
                   {"--sweeps", number(feedback.feedback.num_sweeps)},
                   {"--ridge", number(feedback.target.ridge)},
                   {"--asymmetric", YesOrNo(feedback.asymmetric)},
                   {"--repair-residual", YesOrNo(feedback.repair_residual)},
                   {"--resolve-router", YesOrNo(feedback.resolve_router)},
                   {"--resolve-dense", YesOrNo(feedback.resolve_plain)},
                   {"--resolve-final-norm", YesOrNo(options.steps.solve_final_norm)}});
  return identity;
}

absl::StatusOr<Method> MakeQuantizer(const MethodOptions& options, const Source& source,
                                     kernels::cpu::ThreadPool* pool) {
  if (!options.calibration.empty()) return MakeCalibrated(options, source, pool);
  Method method;
  method.quantizer = std::make_unique<RoundingQuantizer>(
      source.config, *source.checkpoint, Wint2Options{.k_order = options.k_order}, pool);
  return method;
}

}  // namespace wintserve::quantizer
