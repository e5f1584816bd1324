#include "tools/quantizer/make_quantizer.h"

#include <fmt/format.h>
#include <xxhash.h>

#include <algorithm>
#include <utility>

#include "api_server/text/tokenizer.h"
#include "common/status_macros.h"
#include "tools/quantizer/output/rounding_quantizer.h"
#include "tools/text/line_reader.h"
#include "tools/text/plain_text.h"

namespace wintserve::quantizer {
namespace {

std::string YesOrNo(bool value) { return value ? "yes" : "no"; }

// As LoadCalibrationText tells them apart.
bool IsJsonl(const std::filesystem::path& path) { return path.extension() == ".jsonl"; }

// Of all its bytes, also those that the limits leave out. A plain text is checked besides: whatever
// else was named by mistake would be calibrated on without a word. (JSON says so itself.)
absl::StatusOr<std::string> DigestOfText(const std::filesystem::path& path) {
  constexpr size_t kPieceBytes = 1 << 20;
  std::error_code error;
  const auto status = std::filesystem::status(path, error);
  if (std::filesystem::exists(status) && !std::filesystem::is_regular_file(status)) {
    return absl::InvalidArgumentError(fmt::format(
        "--calibration: {} must be a regular file, as it is read twice", path.string()));
  }
  ASSIGN_OR_RETURN(tools::LineReader reader, tools::LineReader::Open(path));
  tools::Utf8Checker checker(path);
  const std::unique_ptr<XXH3_state_t, decltype(&XXH3_freeState)> state(XXH3_createState(),
                                                                       &XXH3_freeState);
  XXH3_64bits_reset(state.get());
  std::string piece;
  while (true) {
    ASSIGN_OR_RETURN(const bool has_more, reader.Next(kPieceBytes, &piece));
    if (!has_more) break;
    XXH3_64bits_update(state.get(), piece.data(), piece.size());
    if (!IsJsonl(path)) RETURN_IF_ERROR(checker.Add(piece));
  }
  if (!IsJsonl(path)) RETURN_IF_ERROR(checker.Finish());
  return fmt::format("{:016x}", XXH3_64bits_digest(state.get()));
}

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
  ASSIGN_OR_RETURN(const std::string digest, DigestOfText(options.calibration));
  const FeedbackEncoderOptions& feedback = options.feedback;
  const auto number = [](auto value) { return fmt::format("{}", value); };
  identity.insert(identity.end(),
                  {{"the calibration file's digest", digest},
                   {"its form", IsJsonl(options.calibration) ? "*.jsonl" : "plain text"},
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
