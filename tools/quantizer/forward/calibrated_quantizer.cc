#include "tools/quantizer/forward/calibrated_quantizer.h"

#include <algorithm>
#include <iterator>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "common/check.h"
#include "common/log.h"
#include "common/status_macros.h"
#include "engine_worker/weights/weight_source.h"
#include "fmt/format.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/packed_matrix.h"
#include "kernels/cpu/row_ops.h"
#include "kernels/cpu/work_split.h"
#include "tools/quantizer/forward/moment_sums.h"
#include "tools/quantizer/forward/row_weights.h"

namespace wintserve::quantizer {
namespace {

using formats::HostMatrix;
using kernels::ConstRows;
using kernels::Rows;
using kernels::WeightMatrix;
using kernels::cpu::AccumulateScaled;

// Attention takes whole sequences at once; more tokens in a batch would only cost memory.
constexpr int64_t kBatchTokens = 4096;

bool SameMatrix(const HostMatrix& a, const HostMatrix& b) {
  return a.format == b.format && a.values_f32 == b.values_f32 && a.values_bf16 == b.values_bf16 &&
         a.codes_i8 == b.codes_i8 && a.codes_u8 == b.codes_u8 && a.local_scale == b.local_scale &&
         a.channel_scale == b.channel_scale && a.code_scale == b.code_scale &&
         a.code_zp == b.code_zp && a.k_order == b.k_order;
}

// The backend packs a gate-up matrix for its own MLP, of whose middle nothing is seen.
kernels::MatrixUse UseInCalibration(MatrixRole role) {
  return role == MatrixRole::kGateUp ? kernels::MatrixUse::kLinear : UseOf(role);
}

bool IsRouted(const MatrixRef& ref) { return ref.expert >= 0; }

absl::Status CheckSequences(const ModelConfig& config,
                            const std::vector<TokenSequence>& sequences) {
  if (sequences.empty()) return absl::InvalidArgumentError("calibration: found no tokens");
  for (size_t s = 0; s < sequences.size(); ++s) {
    const TokenSequence& sequence = sequences[s];
    if (sequence.empty() || std::ssize(sequence) > config.max_position_embeddings) {
      return absl::InvalidArgumentError(
          fmt::format("calibration: sequence {} has {} tokens, the model takes 1 to {}", s,
                      sequence.size(), config.max_position_embeddings));
    }
    for (const int32_t token : sequence) {
      if (token >= 0 && token < config.vocab_size) continue;
      return absl::InvalidArgumentError(
          fmt::format("calibration: sequence {} has token {}, the model's vocabulary is 0 to {}", s,
                      token, config.vocab_size - 1));
    }
  }
  return absl::OkStatus();
}

// Of the MLPs that the model has.
absl::Status CheckWidths(const ModelConfig& config) {
  for (int layer = 0; layer < config.num_layers; ++layer) {
    const int width =
        config.IsMoeLayer(layer) ? config.moe_intermediate_size : config.intermediate_size;
    if (width % kernels::cpu::kTileColumns == 0) continue;
    return absl::InvalidArgumentError(
        fmt::format("calibration: an MLP of width {}; it must be a multiple of {}", width,
                    kernels::cpu::kTileColumns));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<CalibratedQuantizer>> CalibratedQuantizer::Create(
    const ModelConfig& config, const Checkpoint& checkpoint, std::vector<TokenSequence> sequences,
    std::unique_ptr<MatrixEncoder> encoder, const CalibrationOptions& options,
    kernels::cpu::ThreadPool* pool) {
  RETURN_IF_ERROR(CheckSequences(config, sequences));
  RETURN_IF_ERROR(CheckWidths(config));
  std::unique_ptr<CalibratedQuantizer> quantizer(new CalibratedQuantizer(
      config, checkpoint, std::move(sequences), std::move(encoder), options, pool));
  RETURN_IF_ERROR(quantizer->Init());
  return quantizer;
}

CalibratedQuantizer::CalibratedQuantizer(const ModelConfig& config, const Checkpoint& checkpoint,
                                         std::vector<TokenSequence> sequences,
                                         std::unique_ptr<MatrixEncoder> encoder,
                                         const CalibrationOptions& options,
                                         kernels::cpu::ThreadPool* pool)
    : config_(config),
      checkpoint_(checkpoint),
      batches_(std::move(sequences), kBatchTokens),
      encoder_(std::move(encoder)),
      options_(options),
      pool_(pool),
      backend_(kernels::cpu::CreateCpuBackend({.num_threads = pool->num_threads()})),
      refs_(StoredMatrices(config, checkpoint.head_is_tied())) {}

absl::Status CalibratedQuantizer::Init() {
  for (std::unique_ptr<TokenStates>& states : states_) {
    ASSIGN_OR_RETURN(states, TokenStates::Create(config_, batches_, backend_.get(), pool_));
  }
  return absl::OkStatus();
}

absl::StatusOr<HostMatrix> CalibratedQuantizer::Next(const MatrixRef& ref, StoredFormat format) {
  has_made_ = true;
  RETURN_IF_ERROR(Begin(ref));
  ASSIGN_OR_RETURN(HostMatrix made, Make(ref, format));
  RETURN_IF_ERROR(Advance(ref, made));
  if (format == StoredFormat::kPlain) source_ = {};
  return made;
}

absl::Status CalibratedQuantizer::Replay(const MatrixRef& ref, HostMatrix done) {
  CHECK(!has_made_);
  RETURN_IF_ERROR(Begin(ref));
  if (done.k != source_.k || done.n != source_.n) {
    return absl::InvalidArgumentError(fmt::format("{}: found a matrix of {} x {}, expected {} x {}",
                                                  MatrixPlace(ref), done.k, done.n, source_.k,
                                                  source_.n));
  }
  return Advance(ref, done);
}

absl::StatusOr<std::vector<float>> CalibratedQuantizer::FinalNorm() const {
  CHECK(std::ssize(drift_) == config_.num_layers);
  if (!models_differ_ || !options_.solve_final_norm) return std::vector<float>();
  ASSIGN_OR_RETURN(std::vector<float> gain, checkpoint_.LoadVector(VectorRole::kFinalNorm, 0));
  const std::vector<float> ones(gain.size(), 1.0f);
  const int64_t chunk_rows =
      std::min(TokenStates::ChunkRows(config_.hidden_size), batches_.num_tokens());
  RowBuffer normed[2];
  for (RowBuffer& buffer : normed) {
    ASSIGN_OR_RETURN(buffer, RowBuffer::Allocate(chunk_rows, config_.hidden_size));
  }
  std::vector<double> product(gain.size());
  std::vector<double> square(gain.size());
  for (int64_t first = 0; first < batches_.num_tokens(); first += chunk_rows) {
    const int64_t count = std::min(chunk_rows, batches_.num_tokens() - first);
    states_[kUnquantized]->Normalize(first, count, gain.data(), normed[kUnquantized].rows());
    states_[kQuantized]->Normalize(first, count, ones.data(), normed[kQuantized].rows());
    constexpr int64_t kItemColumns = 64;
    pool_->Run(kernels::cpu::CeilDiv(config_.hidden_size, kItemColumns),
               count * config_.hidden_size, [&](int64_t item, int) {
                 const int64_t begin = item * kItemColumns;
                 const int64_t end = std::min<int64_t>(begin + kItemColumns, config_.hidden_size);
                 for (int64_t r = 0; r < count; ++r) {
                   const float* y = normed[kUnquantized].From(r).data;
                   const float* z = normed[kQuantized].From(r).data;
                   for (int64_t c = begin; c < end; ++c) {
                     product[c] += double{z[c]} * y[c];
                     square[c] += double{z[c]} * z[c];
                   }
                 }
               });
  }
  for (size_t c = 0; c < gain.size(); ++c) {
    if (square[c] > 0) gain[c] = static_cast<float>(product[c] / square[c]);
  }
  return gain;
}

absl::Status CalibratedQuantizer::Begin(const MatrixRef& ref) {
  CHECK(num_done_ < refs_.size());
  const MatrixRef& next = refs_[num_done_];
  CHECK(ref.role == next.role && ref.layer == next.layer && ref.expert == next.expert, "{} for {}",
        MatrixPlace(ref), MatrixPlace(next));
  source_ = {};
  ASSIGN_OR_RETURN(source_, checkpoint_.LoadMatrix(ref, /*rank=*/0, /*world_size=*/1));
  if (ref.role == MatrixRole::kQkv) {
    layer_began_ = std::chrono::steady_clock::now();
    ASSIGN_OR_RETURN(gain_, checkpoint_.LoadVector(VectorRole::kInputNorm, ref.layer));
    return ForeseeAttention(ref.layer);
  } else if (ref.role == MatrixRole::kOutput) {
    // Of the matrices after it.
    ASSIGN_OR_RETURN(gain_, checkpoint_.LoadVector(VectorRole::kPostAttentionNorm, ref.layer));
  } else if (ref.role == MatrixRole::kRouter) {
    router_bias_.clear();
    if (checkpoint_.has_router_bias()) {
      ASSIGN_OR_RETURN(router_bias_, checkpoint_.LoadVector(VectorRole::kRouterBias, ref.layer));
    }
  } else if (ref.role == MatrixRole::kGateUp && !config_.IsMoeLayer(ref.layer)) {
    return ForeseeDenseMlp(ref);
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<WeightMatrix>> CalibratedQuantizer::LoadSource(
    const MatrixRef& ref) const {
  ASSIGN_OR_RETURN(const HostMatrix host,
                   checkpoint_.LoadMatrix(ref, /*rank=*/0, /*world_size=*/1));
  return backend_->Pack(host, UseInCalibration(ref.role));
}

// The unquantised model attends here, and Advance leaves it out.
absl::Status CalibratedQuantizer::ForeseeAttention(int layer) {
  TokenStates& states = *states_[kUnquantized];
  {
    ASSIGN_OR_RETURN(const std::unique_ptr<WeightMatrix> qkv,
                     backend_->Pack(source_, UseInCalibration(MatrixRole::kQkv)));
    RETURN_IF_ERROR(states.Attend(gain_.data(), *qkv));
  }
  ASSIGN_OR_RETURN(const std::unique_ptr<WeightMatrix> output,
                   LoadSource({MatrixRole::kOutput, layer}));
  return WeighRows(states.attended(), *output);
}

// The unquantised model's activations stay for the down matrix; StartMlp leaves them out.
absl::Status CalibratedQuantizer::ForeseeDenseMlp(const MatrixRef& ref) {
  {
    ASSIGN_OR_RETURN(const std::unique_ptr<WeightMatrix> gate_up,
                     backend_->Pack(source_, UseInCalibration(ref.role)));
    ASSIGN_OR_RETURN(mlp_.activations[kUnquantized],
                     states_[kUnquantized]->Activate(
                         gain_.data(), AllTokens(batches_.num_tokens()).tokens, *gate_up));
  }
  ASSIGN_OR_RETURN(const std::unique_ptr<WeightMatrix> down,
                   LoadSource({MatrixRole::kDown, ref.layer, ref.expert}));
  return WeighRows(mlp_.activations[kUnquantized].rows(), *down);
}

absl::Status CalibratedQuantizer::WeighRows(ConstRows inputs, const WeightMatrix& matrix) {
  const TokenStates& states = *states_[kUnquantized];
  std::vector<double> mean_squares(batches_.num_tokens());
  RETURN_IF_ERROR(
      states.Multiply(inputs, batches_.num_tokens(), matrix, [&](int64_t t, const float* y) {
        mean_squares[t] = MeanSquareOfSum(states.residual().row(t), y, config_.hidden_size);
      }));
  row_weights_ = RowWeights(mean_squares, config_.rms_norm_eps);
  return absl::OkStatus();
}

absl::StatusOr<HostMatrix> CalibratedQuantizer::Make(const MatrixRef& ref, StoredFormat format) {
  const MomentNeeds needs = encoder_->Needs(ref, format, source_.k, models_differ_);
  if (!needs.hessian) return encoder_->Encode(ref, format, source_, nullptr);
  ASSIGN_OR_RETURN(const Moments moments, MomentsOf(ref, needs));
  return encoder_->Encode(ref, format, source_, &moments);
}

absl::StatusOr<Moments> CalibratedQuantizer::MomentsOf(const MatrixRef& ref,
                                                       const MomentNeeds& needs) {
  if (IsRouted(ref)) return ExpertMoments(ref, needs);
  switch (ref.role) {
    case MatrixRole::kQkv:
      return NormedMoments(AllTokens(batches_.num_tokens()), needs);
    case MatrixRole::kOutput:
      return Gather(AllTokens(batches_.num_tokens()), source_.k, needs,
                    [&](Which which, int64_t first, int64_t /*count*/) {
                      const ConstRows rows = states_[which]->attended();
                      return ConstRows(rows.row(first), rows.stride);
                    });
    case MatrixRole::kRouter:
      break;
    case MatrixRole::kGateUp:
      if (!config_.IsMoeLayer(ref.layer)) {
        return NormedMoments(AllTokens(batches_.num_tokens()), needs);
      }
      break;
    case MatrixRole::kDown:
      return DownMoments(mlp_, needs);
    case MatrixRole::kEmbedding:
    case MatrixRole::kHead:
      CHECK(false, "{} has no moments", MatrixPlace(ref));
  }
  ASSIGN_OR_RETURN(const Moments* all, AllTokensMoments(needs));
  return *all;
}

absl::StatusOr<Moments> CalibratedQuantizer::ExpertMoments(const MatrixRef& ref,
                                                           const MomentNeeds& needs) {
  const bool is_down = ref.role == MatrixRole::kDown;
  absl::StatusOr<Moments> own =
      is_down ? DownMoments(mlp_, needs)
              : NormedMoments(states_[kQuantized]->RoutedTo(ref.expert), needs);
  RETURN_IF_ERROR(own.status());
  const auto k = static_cast<double>(own->k);
  if (static_cast<double>(own->num_rows) >= options_.poor_rows * k) return own;
  Moments of_sample;
  ASSIGN_OR_RETURN(const Moments* const prior, PriorMoments(ref, needs, &of_sample));
  // A row of the prior weighs as much as one of the expert's does on average.
  const double mean_weight =
      own->num_rows == 0 ? 1.0 : own->weight / static_cast<double>(own->num_rows);
  const double mean_prior_weight = prior->weight / static_cast<double>(prior->num_rows);
  ShrinkTowards(*prior, options_.prior_rows * k * mean_weight / mean_prior_weight, *pool_, *own);
  return own;
}

absl::StatusOr<const Moments*> CalibratedQuantizer::PriorMoments(const MatrixRef& ref,
                                                                 const MomentNeeds& needs,
                                                                 Moments* of_sample) {
  const MomentNeeds prior_needs = {.hessian = true, .cross = needs.cross};
  if (ref.role == MatrixRole::kGateUp) return AllTokensMoments(prior_needs);
  // So many tokens as there are inputs, evenly spread.
  const int64_t num_samples = std::min(batches_.num_tokens(), source_.k);
  MlpStep sample;
  for (int64_t i = 0; i < num_samples; ++i) {
    sample.rows.tokens.push_back(static_cast<int32_t>(i * batches_.num_tokens() / num_samples));
    sample.rows.gates.push_back(1.0f);
  }
  for (const Which which : kBoth) {
    ASSIGN_OR_RETURN(
        sample.activations[which],
        states_[which]->Activate(gain_.data(), sample.rows.tokens, gate_up_.of(which)));
  }
  ASSIGN_OR_RETURN(*of_sample, DownMoments(sample, prior_needs));
  return of_sample;
}

absl::StatusOr<const Moments*> CalibratedQuantizer::AllTokensMoments(const MomentNeeds& needs) {
  if (all_tokens_ != nullptr && (all_tokens_->cross.empty() == !needs.cross)) {
    return all_tokens_.get();
  }
  all_tokens_ = nullptr;
  ASSIGN_OR_RETURN(Moments moments, NormedMoments(AllTokens(batches_.num_tokens()), needs));
  all_tokens_ = std::make_unique<Moments>(std::move(moments));
  return all_tokens_.get();
}

absl::StatusOr<Moments> CalibratedQuantizer::NormedMoments(const TokenRows& rows,
                                                           const MomentNeeds& needs) {
  RowBuffer normed[2];
  for (RowBuffer& buffer : normed) {
    ASSIGN_OR_RETURN(buffer, RowBuffer::Allocate(GatherRows(config_.hidden_size, rows.size()),
                                                 config_.hidden_size));
  }
  return Gather(rows, config_.hidden_size, needs, [&](Which which, int64_t first, int64_t count) {
    states_[which]->Normalize(std::span(rows.tokens).subspan(first, count), gain_.data(),
                              normed[which].rows());
    return ConstRows(normed[which].rows());
  });
}

absl::StatusOr<Moments> CalibratedQuantizer::DownMoments(const MlpStep& step,
                                                         const MomentNeeds& needs) {
  return Gather(step.rows, source_.k, needs, [&](Which which, int64_t first, int64_t /*count*/) {
    return ConstRows(step.activations[which].From(first));
  });
}

// Rows of a call of Gather's inputs, so many that the sums do not depend on it.
int64_t CalibratedQuantizer::GatherRows(int64_t k, int64_t num_rows) const {
  static_assert(TokenStates::kChunkRows % MomentSums::kPartRows == 0);
  return std::min(TokenStates::ChunkRows(std::max<int64_t>(k, config_.hidden_size)), num_rows);
}

absl::StatusOr<Moments> CalibratedQuantizer::Gather(const TokenRows& rows, int64_t k,
                                                    const MomentNeeds& needs, InputRows inputs) {
  const int64_t num_outputs = needs.cross_output ? config_.hidden_size : 0;
  const int64_t chunk_rows = GatherRows(k, rows.size());
  MomentSums sums(k, num_outputs, pool_);
  RowBuffer repairs;
  if (needs.cross_output) {
    ASSIGN_OR_RETURN(repairs, RowBuffer::Allocate(chunk_rows, num_outputs));
  }
  std::vector<float> weights;
  for (int64_t first = 0; first < rows.size(); first += chunk_rows) {
    const int64_t count = std::min(chunk_rows, rows.size() - first);
    const ConstRows quantized = inputs(kQuantized, first, count);
    const ConstRows unquantized = needs.cross ? inputs(kUnquantized, first, count) : quantized;
    if (needs.cross_output) FillRepairs(rows, first, count, repairs.rows());
    weights.resize(count);
    for (int64_t i = 0; i < count; ++i) {
      const float gate = rows.gates[first + i];
      weights[i] = gate * gate * row_weights_[rows.tokens[first + i]];
    }
    sums.Add(quantized, unquantized, needs.cross_output ? ConstRows(repairs.rows()) : ConstRows(),
             count, weights);
  }
  return sums.Finish();
}

void CalibratedQuantizer::FillRepairs(const TokenRows& rows, int64_t first, int64_t count,
                                      Rows out) const {
  const int64_t columns = config_.hidden_size;
  pool_->Run(count, count * columns, [&](int64_t i, int) {
    const int32_t token = rows.tokens[first + i];
    const float gate = rows.gates[first + i];
    float* d = out.row(i);
    if (gate == 0) {  // weighs nothing
      std::fill(d, d + columns, 0.0f);
    } else if (shortfall_.is_empty()) {
      const float* x_f = states_[kUnquantized]->residual().row(token);
      const float* x_q = states_[kQuantized]->residual().row(token);
      for (int64_t c = 0; c < columns; ++c) d[c] = (x_f[c] - x_q[c]) / gate;
    } else {
      const float* shortfall = shortfall_.From(token).data;
      for (int64_t c = 0; c < columns; ++c) d[c] = shortfall[c] / gate;
    }
  });
}

absl::Status CalibratedQuantizer::Advance(const MatrixRef& ref, const HostMatrix& made) {
  ++num_done_;
  if (ref.role == MatrixRole::kHead) return absl::OkStatus();
  ASSIGN_OR_RETURN(Packed packed, Pack(ref, made));
  switch (ref.role) {
    case MatrixRole::kEmbedding:
      for (const Which which : kBoth) states_[which]->Embed(packed.of(which));
      return absl::OkStatus();
    case MatrixRole::kQkv:
      return states_[kQuantized]->Attend(gain_.data(), packed.of(kQuantized));
    case MatrixRole::kOutput:
      for (const Which which : kBoth) {
        RETURN_IF_ERROR(states_[which]->AddAttentionOutput(packed.of(which)));
      }
      return absl::OkStatus();
    case MatrixRole::kRouter:
      for (const Which which : kBoth) {
        RETURN_IF_ERROR(states_[which]->Route(
            gain_.data(), packed.of(which), router_bias_.empty() ? nullptr : router_bias_.data()));
      }
      return BeginExperts(ref.layer);
    case MatrixRole::kGateUp:
      return StartMlp(ref, std::move(packed));
    case MatrixRole::kDown:
      return FinishMlp(ref, packed);
    case MatrixRole::kHead:
      break;
  }
  return absl::OkStatus();
}

absl::StatusOr<CalibratedQuantizer::Packed> CalibratedQuantizer::Pack(const MatrixRef& ref,
                                                                      const HostMatrix& made) {
  const kernels::MatrixUse use = UseInCalibration(ref.role);
  Packed packed;
  ASSIGN_OR_RETURN(packed.matrices[kUnquantized], backend_->Pack(source_, use));
  if (SameMatrix(source_, made)) return packed;
  models_differ_ = true;
  ASSIGN_OR_RETURN(packed.matrices[kQuantized], backend_->Pack(made, use));
  return packed;
}

absl::Status CalibratedQuantizer::BeginExperts(int layer) {
  experts_began_ = std::chrono::steady_clock::now();
  const int64_t columns = config_.hidden_size;
  ASSIGN_OR_RETURN(shortfall_, RowBuffer::Allocate(batches_.num_tokens(), columns));
  pool_->Run(batches_.num_tokens(), batches_.num_tokens() * columns, [&](int64_t t, int) {
    const float* x_f = states_[kUnquantized]->residual().row(t);
    const float* x_q = states_[kQuantized]->residual().row(t);
    float* shortfall = shortfall_.From(t).data;
    for (int64_t c = 0; c < columns; ++c) shortfall[c] = x_f[c] - x_q[c];
  });
  for (int expert = 0; expert < config_.num_experts; ++expert) {
    RETURN_IF_ERROR(ForeseeExpert(layer, expert));
  }
  if (config_.num_shared_experts > 0) RETURN_IF_ERROR(ForeseeExpert(layer, kSharedExperts));
  all_tokens_ = nullptr;  // of the router, with other weights
  std::vector<double> mean_squares(batches_.num_tokens());
  pool_->Run(batches_.num_tokens(), batches_.num_tokens() * columns, [&](int64_t t, int) {
    const TokenStates& states = *states_[kUnquantized];
    mean_squares[t] = MeanSquareOfSum(states.residual().row(t),
                                      states.MlpOutput(static_cast<int32_t>(t)), columns);
  });
  row_weights_ = RowWeights(mean_squares, config_.rms_norm_eps);
  return absl::OkStatus();
}

// The unquantised model passes its experts here, all at once. For the tokens that only the other
// sends to an expert it computes that as well.
absl::Status CalibratedQuantizer::ForeseeExpert(int layer, int expert) {
  TokenRows rows[2];
  for (const Which which : kBoth) {
    rows[which] = expert == kSharedExperts ? AllTokens(batches_.num_tokens())
                                           : states_[which]->RoutedTo(expert);
  }
  std::vector<int32_t> tokens;
  std::set_union(rows[0].tokens.begin(), rows[0].tokens.end(), rows[1].tokens.begin(),
                 rows[1].tokens.end(), std::back_inserter(tokens));
  std::vector<float> gates[2];
  for (const Which which : kBoth) {
    size_t next = 0;
    for (const int32_t token : tokens) {
      const bool is_routed = next < rows[which].tokens.size() && rows[which].tokens[next] == token;
      gates[which].push_back(is_routed ? rows[which].gates[next++] : 0);
    }
  }
  ASSIGN_OR_RETURN(const std::unique_ptr<WeightMatrix> gate_up,
                   LoadSource({MatrixRole::kGateUp, layer, expert}));
  ASSIGN_OR_RETURN(const std::unique_ptr<WeightMatrix> down,
                   LoadSource({MatrixRole::kDown, layer, expert}));
  ASSIGN_OR_RETURN(const RowBuffer activations,
                   states_[kUnquantized]->Activate(gain_.data(), tokens, *gate_up));
  return states_[kUnquantized]->Multiply(
      activations.rows(), std::ssize(tokens), *down, [&](int64_t i, const float* y) {
        const float gate_f = gates[kUnquantized][i];
        if (gate_f != 0) {
          AccumulateScaled(gate_f, y, config_.hidden_size,
                           states_[kUnquantized]->MlpOutput(tokens[i]));
        }
        const float surplus = gate_f - gates[kQuantized][i];
        if (surplus == 0) return;
        AccumulateScaled(surplus, y, config_.hidden_size, shortfall_.From(tokens[i]).data);
      });
}

absl::Status CalibratedQuantizer::StartMlp(const MatrixRef& ref, Packed gate_up) {
  mlp_.rows =
      IsRouted(ref) ? states_[kQuantized]->RoutedTo(ref.expert) : AllTokens(batches_.num_tokens());
  for (const Which which : kBoth) {
    if (!mlp_.activations[which].is_empty()) continue;
    ASSIGN_OR_RETURN(mlp_.activations[which],
                     states_[which]->Activate(gain_.data(), mlp_.rows.tokens, gate_up.of(which)));
  }
  gate_up_ = std::move(gate_up);
  return absl::OkStatus();
}

absl::Status CalibratedQuantizer::FinishMlp(const MatrixRef& ref, const Packed& down) {
  // Between equal models it stays 0; what both add would leave a rounding error.
  const bool falls_short = !shortfall_.is_empty() && models_differ_;
  for (const Which which : kBoth) {
    // BeginExperts has added the experts of the unquantised model.
    const bool is_added = which == kUnquantized && config_.IsMoeLayer(ref.layer);
    const float sign = which == kUnquantized ? 1.0f : -1.0f;
    RETURN_IF_ERROR(states_[which]->Multiply(
        mlp_.activations[which].rows(), mlp_.rows.size(), down.of(which),
        [&](int64_t i, const float* y) {
          const int32_t token = mlp_.rows.tokens[i];
          const float gate = mlp_.rows.gates[i];
          if (!is_added) {
            AccumulateScaled(gate, y, config_.hidden_size, states_[which]->MlpOutput(token));
          }
          if (!falls_short) return;
          AccumulateScaled(sign * gate, y, config_.hidden_size, shortfall_.From(token).data);
        }));
  }
  mlp_ = {};
  gate_up_ = {};
  const bool is_last = num_done_ == refs_.size() || refs_[num_done_].role == MatrixRole::kHead ||
                       refs_[num_done_].layer != ref.layer;
  return is_last ? FinishLayer(ref.layer) : absl::OkStatus();
}

absl::Status CalibratedQuantizer::FinishLayer(int layer) {
  all_tokens_ = nullptr;
  if (config_.IsMoeLayer(layer)) {
    for (const Which which : kBoth) states_[which]->FinishMlp();
    shortfall_ = {};
  }
  struct TokenSums {
    double error = 0;
    double square = 0;
  };
  std::vector<TokenSums> sums(batches_.num_tokens());
  pool_->Run(batches_.num_tokens(), batches_.num_tokens() * config_.hidden_size,
             [&](int64_t t, int) {
               const float* x_f = states_[kUnquantized]->residual().row(t);
               const float* x_q = states_[kQuantized]->residual().row(t);
               TokenSums token;
               for (int64_t c = 0; c < config_.hidden_size; ++c) {
                 const double difference = double{x_q[c]} - double{x_f[c]};
                 token.error += difference * difference;
                 token.square += double{x_f[c]} * double{x_f[c]};
               }
               sums[t] = token;
             });
  double error = 0;
  double square = 0;
  double token_errors = 0;
  for (const TokenSums& token : sums) {
    error += token.error;
    square += token.square;
    if (token.square > 0) token_errors += token.error / token.square;
  }
  drift_.push_back({layer, square > 0 ? error / square : 0,
                    token_errors / static_cast<double>(batches_.num_tokens())});
  using Seconds = std::chrono::duration<double>;
  const auto now = std::chrono::steady_clock::now();
  std::string took = fmt::format("{:.1f} s", Seconds(now - layer_began_).count());
  if (config_.IsMoeLayer(layer)) {
    took += fmt::format(", {:.1f} s for each expert",
                        Seconds(now - experts_began_).count() / config_.num_experts);
  }
  LOG_INFO(
      "layer {}: relative error of its output over {} calibration tokens {:.3g}, mean of each "
      "token's {:.3g}; took {}",
      layer, batches_.num_tokens(), drift_.back().relative_error, drift_.back().mean_token_error,
      took);
  return absl::OkStatus();
}

}  // namespace wintserve::quantizer
