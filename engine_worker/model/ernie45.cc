#include "engine_worker/model/ernie45.h"

#include <algorithm>
#include <string>
#include <string_view>
#include <utility>

#include "absl/status/status.h"
#include "common/check.h"
#include "common/status_macros.h"
#include "fmt/format.h"
#include "xxhash.h"

namespace wintserve {
namespace {

using kernels::Backend;
using kernels::Buffer;
using kernels::ConstRows;
using kernels::ExpertWeights;
using kernels::KvLayer;
using kernels::MatrixUse;
using kernels::Rows;
using kernels::SequenceChunk;
using kernels::WeightMatrix;

using Matrix = std::unique_ptr<WeightMatrix>;

struct Mlp {
  Matrix gate_up;
  Matrix down;

  ExpertWeights view() const { return {gate_up.get(), down.get()}; }
};

struct Layer {
  std::unique_ptr<Buffer> input_norm;
  std::unique_ptr<Buffer> post_attention_norm;
  Matrix qkv;
  Matrix output;
  Mlp mlp;  // dense layers only; the rest is for MoE layers
  Matrix router;
  std::unique_ptr<Buffer> router_bias;  // null without has_router_bias
  std::vector<Mlp> experts;
  std::vector<ExpertWeights> expert_views;
  Mlp shared;  // empty without shared experts

  bool is_moe() const { return router != nullptr; }
};

struct Weights {
  Matrix embedding;
  std::vector<Layer> layers;
  std::unique_ptr<Buffer> final_norm;
  Matrix head;
};

const float* Floats(const std::unique_ptr<Buffer>& buffer) {
  return buffer == nullptr ? nullptr : static_cast<const float*>(buffer->data());
}

absl::Status InFrontOf(const absl::Status& status, std::string_view place) {
  return absl::Status(status.code(), fmt::format("{}: {}", place, std::string(status.message())));
}

// Reads one rank's tensors and packs each at once, so that one at a time exists unpacked.
class Loader {
 public:
  Loader(const ModelConfig& config, const Checkpoint& checkpoint, Backend* backend, int rank,
         int world_size)
      : config_(config),
        checkpoint_(checkpoint),
        backend_(backend),
        rank_(rank),
        world_size_(world_size) {}

  absl::StatusOr<Weights> LoadAll() {
    Weights w;
    ASSIGN_OR_RETURN(w.embedding,
                     LoadMatrix({MatrixRole::kEmbedding}, MatrixUse::kEmbedding, "embedding"));
    for (int i = 0; i < config_.num_layers; ++i) {
      ASSIGN_OR_RETURN(Layer layer, LoadLayer(i));
      w.layers.push_back(std::move(layer));
    }
    ASSIGN_OR_RETURN(w.final_norm, LoadVector(VectorRole::kFinalNorm, 0));
    ASSIGN_OR_RETURN(w.head, LoadMatrix({MatrixRole::kHead}, MatrixUse::kLinear, "head"));
    return w;
  }

 private:
  absl::StatusOr<Matrix> LoadMatrix(const MatrixRef& ref, MatrixUse use, std::string_view place) {
    ASSIGN_OR_RETURN(const formats::HostMatrix host,
                     checkpoint_.LoadMatrix(ref, rank_, world_size_));
    absl::StatusOr<Matrix> packed = backend_->Pack(host, use);
    if (!packed.ok()) return InFrontOf(packed.status(), place);
    return packed;
  }

  absl::StatusOr<std::unique_ptr<Buffer>> LoadVector(VectorRole role, int layer) {
    ASSIGN_OR_RETURN(const std::vector<float> host, checkpoint_.LoadVector(role, layer));
    const auto size_bytes = static_cast<int64_t>(host.size() * sizeof(float));
    std::unique_ptr<Buffer> buffer = backend_->Allocate(size_bytes);
    backend_->CopyFromHost(buffer->data(), host.data(), size_bytes);
    return buffer;
  }

  absl::StatusOr<Mlp> LoadMlp(int layer, int expert, const std::string& place) {
    Mlp mlp;
    ASSIGN_OR_RETURN(mlp.gate_up, LoadMatrix({MatrixRole::kGateUp, layer, expert},
                                             MatrixUse::kGateUp, place + " gate-up"));
    ASSIGN_OR_RETURN(mlp.down, LoadMatrix({MatrixRole::kDown, layer, expert}, MatrixUse::kLinear,
                                          place + " down"));
    return mlp;
  }

  absl::StatusOr<Layer> LoadLayer(int i) {
    const std::string place = fmt::format("layer {}", i);
    Layer layer;
    ASSIGN_OR_RETURN(layer.input_norm, LoadVector(VectorRole::kInputNorm, i));
    ASSIGN_OR_RETURN(layer.qkv,
                     LoadMatrix({MatrixRole::kQkv, i}, MatrixUse::kLinear, place + " qkv"));
    ASSIGN_OR_RETURN(layer.output,
                     LoadMatrix({MatrixRole::kOutput, i}, MatrixUse::kLinear, place + " output"));
    ASSIGN_OR_RETURN(layer.post_attention_norm, LoadVector(VectorRole::kPostAttentionNorm, i));
    if (!config_.IsMoeLayer(i)) {
      ASSIGN_OR_RETURN(layer.mlp, LoadMlp(i, kDenseMlp, place + " mlp"));
      return layer;
    }
    ASSIGN_OR_RETURN(layer.router,
                     LoadMatrix({MatrixRole::kRouter, i}, MatrixUse::kLinear, place + " router"));
    if (config_.has_router_bias) {
      ASSIGN_OR_RETURN(layer.router_bias, LoadVector(VectorRole::kRouterBias, i));
    }
    for (int e = 0; e < config_.num_experts; ++e) {
      ASSIGN_OR_RETURN(Mlp expert, LoadMlp(i, e, fmt::format("{} expert {}", place, e)));
      layer.expert_views.push_back(expert.view());
      layer.experts.push_back(std::move(expert));
    }
    if (config_.num_shared_experts > 0) {
      ASSIGN_OR_RETURN(layer.shared, LoadMlp(i, kSharedExperts, place + " shared experts"));
    }
    return layer;
  }

  const ModelConfig& config_;
  const Checkpoint& checkpoint_;
  Backend* const backend_;
  const int rank_;
  const int world_size_;
};

// Activations [max_batch_tokens, columns] in device memory.
class Activations {
 public:
  Activations(Backend* backend, int64_t rows, int64_t columns)
      : stride_(kernels::PaddedStride(columns)),
        buffer_(backend->Allocate(rows * stride_ * static_cast<int64_t>(sizeof(float)))) {}
  Rows rows() const { return {static_cast<float*>(buffer_->data()), stride_}; }

 private:
  int64_t stride_;
  std::unique_ptr<Buffer> buffer_;
};

class Ernie45 final : public Model {
 public:
  Ernie45(const ModelConfig& config, Weights weights, uint64_t weights_digest, Backend* backend,
          Collective* collective, const Ernie45Options& options)
      : config_(config),
        weights_(std::move(weights)),
        weights_digest_(weights_digest),
        backend_(backend),
        collective_(collective),
        world_size_(collective == nullptr ? 1 : collective->world_size()),
        max_batch_tokens_(options.max_batch_tokens),
        attention_{config.num_heads / world_size_, std::max(1, config.num_kv_heads / world_size_),
                   config.head_dim},
        residual_(backend, max_batch_tokens_, config.hidden_size),
        normed_(backend, max_batch_tokens_, config.hidden_size),
        // Summed over ranks as one array, hence without padding.
        delta_stride_(world_size_ == 1 ? kernels::PaddedStride(config.hidden_size)
                                       : config.hidden_size),
        delta_(backend->Allocate(max_batch_tokens_ * delta_stride_ *
                                 static_cast<int64_t>(sizeof(float)))),
        qkv_(backend, max_batch_tokens_, attention_.qkv_columns()),
        attended_(backend, max_batch_tokens_, int64_t{attention_.num_heads} * attention_.head_dim),
        cos_sin_(backend, max_batch_tokens_, config.head_dim),
        expert_ids_(backend->Allocate(ExpertSlots() * static_cast<int64_t>(sizeof(int32_t)))),
        expert_weights_(backend->Allocate(ExpertSlots() * static_cast<int64_t>(sizeof(float)))) {}

  int vocab_size() const override { return config_.vocab_size; }
  int num_layers() const override { return config_.num_layers; }
  int max_position() const override { return config_.max_position_embeddings; }
  int max_batch_tokens() const override { return max_batch_tokens_; }
  uint64_t weights_digest() const override { return weights_digest_; }

  int64_t kv_block_bytes() const override {
    return config_.num_layers * LayerKvFloats() * static_cast<int64_t>(sizeof(float));
  }

  uint64_t kv_layout_digest() const override {
    const std::string layout = fmt::format(
        "{} block_tokens={} layers={} kv_heads={} head_dim={} world_size={} theta={} "
        "compression={}",
        backend_->kv_layout(), kernels::kKvBlockTokens, config_.num_layers, config_.num_kv_heads,
        config_.head_dim, world_size_, config_.rope_theta, config_.compression_ratio);
    return XXH3_64bits(layout.data(), layout.size());
  }

  absl::StatusOr<std::span<const float>> Forward(const Batch& batch, void* kv_pool) override {
    const auto num_tokens = static_cast<int64_t>(batch.tokens.size());
    CHECK(num_tokens >= 1 && num_tokens <= max_batch_tokens_, "num_tokens={}", num_tokens);
    PlaceTokens(batch);

    backend_->Embed(*weights_.embedding, batch.tokens, residual_.rows());
    backend_->RopeAngles(positions_, config_.head_dim, config_.rope_theta,
                         config_.compression_ratio, cos_sin_.rows());
    ConstRows pending;  // what the next norm adds to the residual first
    for (int i = 0; i < config_.num_layers; ++i) {
      const Layer& layer = weights_.layers[i];
      AddNorm(pending, Floats(layer.input_norm), num_tokens);
      RETURN_IF_ERROR(AttentionBlock(layer, KvOf(i, kv_pool), num_tokens));
      AddNorm(Delta(), Floats(layer.post_attention_norm), num_tokens);
      RETURN_IF_ERROR(MlpBlock(layer, num_tokens));
      pending = Delta();
    }
    return Head(pending);
  }

 private:
  int64_t ExpertSlots() const {
    return int64_t{max_batch_tokens_} * std::max(1, config_.num_experts_per_token);
  }
  int64_t LayerKvFloats() const {
    return int64_t{2} * attention_.num_kv_heads * kernels::kKvBlockTokens * attention_.head_dim;
  }
  KvLayer KvOf(int layer, void* kv_pool) const {
    return {static_cast<float*>(kv_pool), config_.num_layers * LayerKvFloats(),
            layer * LayerKvFloats()};
  }
  Rows Delta() const { return {static_cast<float*>(delta_->data()), delta_stride_}; }

  // Where each token stands in its sequence, and which rows want logits.
  void PlaceTokens(const Batch& batch) {
    positions_.clear();
    chunks_.clear();
    logit_rows_.clear();
    int64_t first_token = 0;
    for (const BatchRow& row : batch.rows) {
      chunks_.push_back({first_token, row.position, row.length, row.block_table});
      for (int32_t t = 0; t < row.length; ++t) positions_.push_back(row.position + t);
      first_token += row.length;
      if (row.want_logits) logit_rows_.push_back(static_cast<int32_t>(first_token - 1));
    }
    CHECK(positions_.size() == batch.tokens.size(), "rows hold {} tokens, the batch {}",
          positions_.size(), batch.tokens.size());
  }

  void AddNorm(ConstRows delta, const float* gain, int64_t num_tokens) {
    backend_->AddRmsNorm(residual_.rows(), delta, /*row_ids=*/{}, num_tokens, config_.hidden_size,
                         gain, config_.rms_norm_eps, normed_.rows());
  }

  absl::Status AttentionBlock(const Layer& layer, const KvLayer& kv, int64_t num_tokens) {
    backend_->Linear(normed_.rows(), num_tokens, *layer.qkv, qkv_.rows());
    backend_->RopeAndAppendKv(attention_, chunks_, cos_sin_.rows(), qkv_.rows(), kv);
    backend_->Attention(attention_, chunks_, qkv_.rows(), kv, attended_.rows());
    backend_->Linear(attended_.rows(), num_tokens, *layer.output, Delta());
    return SumDeltaOverRanks(num_tokens);
  }

  absl::Status MlpBlock(const Layer& layer, int64_t num_tokens) {
    if (layer.is_moe()) {
      auto* expert_ids = static_cast<int32_t*>(expert_ids_->data());
      auto* expert_weights = static_cast<float*>(expert_weights_->data());
      const kernels::RouterShape router = {config_.num_experts, config_.num_experts_per_token,
                                           config_.moe_norm_min};
      const ExpertWeights shared = layer.shared.view();
      backend_->Route(normed_.rows(), num_tokens, *layer.router, Floats(layer.router_bias), router,
                      expert_ids, expert_weights);
      backend_->MoeMlp(normed_.rows(), num_tokens, layer.expert_views, router.top_k, expert_ids,
                       expert_weights, shared.gate_up == nullptr ? nullptr : &shared, Delta());
    } else {
      backend_->SwiGluMlp(normed_.rows(), num_tokens, layer.mlp.view(), Delta());
    }
    return SumDeltaOverRanks(num_tokens);
  }

  absl::Status SumDeltaOverRanks(int64_t num_tokens) {
    if (world_size_ == 1) return absl::OkStatus();
    return collective_->AllReduceSum(Delta().data, num_tokens * delta_stride_);
  }

  // Logits of the rows that want them: full rows on rank 0, nothing elsewhere.
  absl::StatusOr<std::span<const float>> Head(ConstRows delta) {
    const auto num_rows = static_cast<int64_t>(logit_rows_.size());
    if (num_rows == 0) return std::span<const float>();
    backend_->AddRmsNorm(residual_.rows(), delta, logit_rows_, num_rows, config_.hidden_size,
                         Floats(weights_.final_norm), config_.rms_norm_eps, normed_.rows());
    const int64_t rank_vocab = weights_.head->n();
    const int64_t count = num_rows * rank_vocab;
    Reserve(count, &rank_logits_);
    auto* rank_logits = static_cast<float*>(rank_logits_->data());
    backend_->Linear(normed_.rows(), num_rows, *weights_.head, {rank_logits, rank_vocab});

    logits_.resize(num_rows * config_.vocab_size);
    if (world_size_ == 1) {
      backend_->CopyToHost(logits_.data(), rank_logits, count * sizeof(float));
      return logits_;
    }
    Reserve(count * world_size_, &gathered_logits_);
    auto* gathered = static_cast<float*>(gathered_logits_->data());
    RETURN_IF_ERROR(collective_->AllGather(rank_logits, count, gathered));
    if (collective_->rank() != 0) return std::span<const float>();
    for (int rank = 0; rank < world_size_; ++rank) {
      for (int64_t r = 0; r < num_rows; ++r) {
        backend_->CopyToHost(logits_.data() + r * config_.vocab_size + rank * rank_vocab,
                             gathered + rank * count + r * rank_vocab, rank_vocab * sizeof(float));
      }
    }
    return logits_;
  }

  void Reserve(int64_t count, std::unique_ptr<Buffer>* buffer) {
    const int64_t size_bytes = count * static_cast<int64_t>(sizeof(float));
    if (*buffer == nullptr || (*buffer)->size_bytes() < size_bytes) {
      *buffer = backend_->Allocate(size_bytes);
    }
  }

  const ModelConfig config_;
  const Weights weights_;
  const uint64_t weights_digest_;
  Backend* const backend_;
  Collective* const collective_;
  const int world_size_;
  const int max_batch_tokens_;
  const kernels::AttentionShape attention_;  // of this rank

  Activations residual_;
  Activations normed_;
  const int64_t delta_stride_;
  std::unique_ptr<Buffer> delta_;  // output of attention or MLP, before it joins the residual
  Activations qkv_;
  Activations attended_;
  Activations cos_sin_;
  std::unique_ptr<Buffer> expert_ids_;
  std::unique_ptr<Buffer> expert_weights_;
  std::unique_ptr<Buffer> rank_logits_;
  std::unique_ptr<Buffer> gathered_logits_;
  std::vector<float> logits_;

  std::vector<int32_t> positions_;
  std::vector<SequenceChunk> chunks_;
  std::vector<int32_t> logit_rows_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Model>> LoadErnie45(const ModelConfig& config,
                                                   const Checkpoint& checkpoint, Backend* backend,
                                                   Collective* collective,
                                                   const Ernie45Options& options) {
  CHECK(options.max_batch_tokens >= 1, "max_batch_tokens={}", options.max_batch_tokens);
  if (config.head_dim % 32 != 0) {
    return absl::InvalidArgumentError(
        fmt::format("head_dim {} is not supported; it must be a multiple of 32", config.head_dim));
  }
  const int rank = collective == nullptr ? 0 : collective->rank();
  const int world_size = collective == nullptr ? 1 : collective->world_size();
  RETURN_IF_ERROR(CheckTensorParallel(config, world_size));
  ASSIGN_OR_RETURN(Weights weights,
                   Loader(config, checkpoint, backend, rank, world_size).LoadAll());
  const std::string identity =
      fmt::format("checkpoint={:016x} k_order={} unrounded={}", checkpoint.digest(),
                  static_cast<int>(checkpoint.k_order()),
                  backend->rounding() == kernels::WeightRounding::kUnrounded);
  return std::make_unique<Ernie45>(config, std::move(weights),
                                   XXH3_64bits(identity.data(), identity.size()), backend,
                                   collective, options);
}

}  // namespace wintserve
