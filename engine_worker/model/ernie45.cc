#include "engine_worker/model/ernie45.h"

#include <algorithm>
#include <string>
#include <string_view>
#include <utility>

#include "absl/status/status.h"
#include "common/check.h"
#include "common/status_macros.h"
#include "engine_worker/weights/weight_source.h"
#include "fmt/format.h"
#include "xxhash.h"

namespace wintserve {
namespace {

using kernels::Backend;
using kernels::Buffer;
using kernels::ConstRows;
using kernels::DeviceBatch;
using kernels::ExpertGroup;
using kernels::KvLayer;
using kernels::MlpWeights;
using kernels::Rows;
using kernels::WeightMatrix;

using Matrix = std::unique_ptr<WeightMatrix>;

struct Mlp {
  Matrix gate_up;
  Matrix down;

  MlpWeights view() const { return {gate_up.get(), down.get()}; }
};

struct Layer {
  std::unique_ptr<Buffer> input_norm;
  std::unique_ptr<Buffer> post_attention_norm;
  Matrix qkv;
  Matrix output;
  Mlp mlp;  // dense layers only; the rest is for MoE layers
  Matrix router;
  std::unique_ptr<Buffer> router_bias;  // null without WeightSource::has_router_bias
  std::vector<Mlp> experts;
  std::unique_ptr<ExpertGroup> expert_group;  // of `experts`
  Mlp shared;                                 // empty without shared experts

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

// Takes one rank's weights from their source, one after the other.
class Loader {
 public:
  Loader(const ModelConfig& config, WeightSource* source, Backend* backend)
      : config_(config), source_(source), backend_(backend) {}

  absl::StatusOr<Weights> LoadAll() {
    Weights w;
    ASSIGN_OR_RETURN(w.embedding, LoadMatrix({MatrixRole::kEmbedding}, "embedding"));
    for (int i = 0; i < config_.num_layers; ++i) {
      ASSIGN_OR_RETURN(Layer layer, LoadLayer(i));
      w.layers.push_back(std::move(layer));
    }
    ASSIGN_OR_RETURN(w.final_norm, LoadVector(VectorRole::kFinalNorm, 0));
    ASSIGN_OR_RETURN(w.head, LoadMatrix({MatrixRole::kHead}, "head"));
    return w;
  }

 private:
  absl::StatusOr<Matrix> LoadMatrix(const MatrixRef& ref, std::string_view place) {
    absl::StatusOr<Matrix> matrix = source_->NextMatrix(ref);
    if (!matrix.ok()) return InFrontOf(matrix.status(), place);
    return matrix;
  }

  absl::StatusOr<std::unique_ptr<Buffer>> LoadVector(VectorRole role, int layer) {
    ASSIGN_OR_RETURN(const std::vector<float> host, source_->LoadVector(role, layer));
    const auto size_bytes = static_cast<int64_t>(host.size() * sizeof(float));
    ASSIGN_OR_RETURN(std::unique_ptr<Buffer> buffer, backend_->Allocate(size_bytes));
    backend_->CopyFromHost(buffer->data(), host.data(), size_bytes);
    return buffer;
  }

  absl::StatusOr<Mlp> LoadMlp(int layer, int expert, const std::string& place) {
    Mlp mlp;
    ASSIGN_OR_RETURN(mlp.gate_up,
                     LoadMatrix({MatrixRole::kGateUp, layer, expert}, place + " gate-up"));
    ASSIGN_OR_RETURN(mlp.down, LoadMatrix({MatrixRole::kDown, layer, expert}, place + " down"));
    return mlp;
  }

  absl::StatusOr<Layer> LoadLayer(int i) {
    const std::string place = fmt::format("layer {}", i);
    Layer layer;
    ASSIGN_OR_RETURN(layer.input_norm, LoadVector(VectorRole::kInputNorm, i));
    ASSIGN_OR_RETURN(layer.qkv, LoadMatrix({MatrixRole::kQkv, i}, place + " qkv"));
    ASSIGN_OR_RETURN(layer.output, LoadMatrix({MatrixRole::kOutput, i}, place + " output"));
    ASSIGN_OR_RETURN(layer.post_attention_norm, LoadVector(VectorRole::kPostAttentionNorm, i));
    if (!config_.IsMoeLayer(i)) {
      ASSIGN_OR_RETURN(layer.mlp, LoadMlp(i, kDenseMlp, place + " mlp"));
      return layer;
    }
    ASSIGN_OR_RETURN(layer.router, LoadMatrix({MatrixRole::kRouter, i}, place + " router"));
    if (source_->has_router_bias()) {
      ASSIGN_OR_RETURN(layer.router_bias, LoadVector(VectorRole::kRouterBias, i));
    }
    std::vector<MlpWeights> views;
    for (int e = 0; e < config_.num_experts; ++e) {
      ASSIGN_OR_RETURN(Mlp expert, LoadMlp(i, e, fmt::format("{} expert {}", place, e)));
      views.push_back(expert.view());
      layer.experts.push_back(std::move(expert));
    }
    absl::StatusOr<std::unique_ptr<ExpertGroup>> group = backend_->GroupExperts(views);
    if (!group.ok()) return InFrontOf(group.status(), place);
    layer.expert_group = *std::move(group);
    if (config_.num_shared_experts > 0) {
      ASSIGN_OR_RETURN(layer.shared, LoadMlp(i, kSharedExperts, place + " shared experts"));
    }
    return layer;
  }

  const ModelConfig& config_;
  WeightSource* const source_;
  Backend* const backend_;
};

// Rows in device memory.
class Activations {
 public:
  static absl::StatusOr<Activations> Allocate(Backend* backend, int64_t rows, int64_t columns,
                                              int64_t stride) {
    Activations activations;
    activations.stride_ = stride;
    CHECK(stride >= columns, "stride={} columns={}", stride, columns);
    ASSIGN_OR_RETURN(activations.buffer_,
                     backend->Allocate(rows * stride * static_cast<int64_t>(sizeof(float))));
    return activations;
  }
  static absl::StatusOr<Activations> Allocate(Backend* backend, int64_t rows, int64_t columns) {
    return Allocate(backend, rows, columns, kernels::PaddedStride(columns));
  }
  Rows rows() const { return {static_cast<float*>(buffer_->data()), stride_}; }
  int64_t size_bytes() const { return buffer_ == nullptr ? 0 : buffer_->size_bytes(); }

 private:
  int64_t stride_ = 0;
  std::unique_ptr<Buffer> buffer_;
};

// One rank's share of the model, and what follows from it.
struct RankShape {
  int rank = 0;
  int world_size = 1;
  kernels::AttentionShape attention;
  int64_t kv_layer_bytes = 0;
};

// What a forward pass leaves between its operators. Token rows but for the logits.
struct Workspace {
  Activations residual;
  Activations normed;
  Activations delta;  // output of attention or MLP, before it joins the residual
  Activations qkv;
  Activations attended;
  Activations cos_sin;
  std::unique_ptr<Buffer> expert_ids;  // [layers, tokens, experts of a token]
  std::unique_ptr<Buffer> expert_weights;
  Activations rank_logits;      // [logit rows, this rank's vocabulary]
  Activations gathered_logits;  // [ranks, logit rows, a rank's vocabulary]; of several ranks
  Activations logits;           // [logit rows, vocabulary]; rank 0 of several

  int64_t size_bytes() const {
    int64_t bytes = expert_ids->size_bytes() + expert_weights->size_bytes();
    for (const Activations* part : {&residual, &normed, &delta, &qkv, &attended, &cos_sin,
                                    &rank_logits, &gathered_logits, &logits}) {
      bytes += part->size_bytes();
    }
    return bytes;
  }
};

absl::StatusOr<Workspace> AllocateWorkspace(Backend* backend, const ModelConfig& config,
                                            const RankShape& shape, const Ernie45Options& options) {
  const int64_t tokens = options.max_batch_tokens;
  const int64_t hidden = config.hidden_size;
  const auto allocate = [&](int64_t columns) {
    return Activations::Allocate(backend, tokens, columns);
  };
  Workspace w;
  ASSIGN_OR_RETURN(w.residual, allocate(hidden));
  ASSIGN_OR_RETURN(w.normed, allocate(hidden));
  // Summed over ranks as one array, hence without padding.
  ASSIGN_OR_RETURN(w.delta, Activations::Allocate(
                                backend, tokens, hidden,
                                shape.world_size == 1 ? kernels::PaddedStride(hidden) : hidden));
  ASSIGN_OR_RETURN(w.qkv, allocate(shape.attention.qkv_columns()));
  ASSIGN_OR_RETURN(w.attended,
                   allocate(int64_t{shape.attention.num_heads} * shape.attention.head_dim));
  ASSIGN_OR_RETURN(w.cos_sin, allocate(config.head_dim));
  const int64_t pairs = tokens * std::max(1, config.num_experts_per_token);
  ASSIGN_OR_RETURN(w.expert_ids, backend->Allocate(config.num_layers * pairs *
                                                   static_cast<int64_t>(sizeof(int32_t))));
  ASSIGN_OR_RETURN(w.expert_weights,
                   backend->Allocate(pairs * static_cast<int64_t>(sizeof(float))));

  const int64_t logit_rows = options.max_logit_rows;
  const int64_t rank_vocab = config.vocab_size / shape.world_size;
  ASSIGN_OR_RETURN(w.rank_logits,
                   Activations::Allocate(backend, logit_rows, rank_vocab, rank_vocab));
  if (shape.world_size == 1) return w;
  ASSIGN_OR_RETURN(w.gathered_logits, Activations::Allocate(backend, logit_rows * shape.world_size,
                                                            rank_vocab, rank_vocab));
  if (shape.rank == 0) {
    ASSIGN_OR_RETURN(
        w.logits, Activations::Allocate(backend, logit_rows, config.vocab_size, config.vocab_size));
  }
  return w;
}

class Ernie45 final : public Model {
 public:
  Ernie45(const ModelConfig& config, const RankShape& shape, Weights weights, Workspace workspace,
          uint64_t weights_digest, Backend* backend, Collective* collective,
          const Ernie45Options& options)
      : config_(config),
        shape_(shape),
        weights_(std::move(weights)),
        workspace_(std::move(workspace)),
        weights_digest_(weights_digest),
        backend_(backend),
        collective_(collective),
        options_(options) {}

  kernels::Backend* backend() const override { return backend_; }
  int vocab_size() const override { return config_.vocab_size; }
  int num_layers() const override { return config_.num_layers; }
  int max_position() const override { return config_.max_position_embeddings; }
  int max_batch_tokens() const override { return options_.max_batch_tokens; }
  int max_logit_rows() const override { return options_.max_logit_rows; }
  uint64_t weights_digest() const override { return weights_digest_; }
  int64_t workspace_bytes() const override { return workspace_.size_bytes(); }
  RoutedExperts routed_experts(int layer) const override {
    if (!weights_.layers[layer].is_moe()) return {};
    return {ExpertIds(layer), config_.num_experts, config_.num_experts_per_token};
  }
  int64_t kv_block_bytes() const override { return config_.num_layers * shape_.kv_layer_bytes; }

  uint64_t kv_layout_digest() const override {
    const std::string layout = fmt::format(
        "{} block_tokens={} layers={} kv_heads={} head_dim={} world_size={} theta={} "
        "compression={}",
        backend_->kv_layout(), kernels::kKvBlockTokens, config_.num_layers, config_.num_kv_heads,
        config_.head_dim, shape_.world_size, config_.rope_theta, config_.compression_ratio);
    return XXH3_64bits(layout.data(), layout.size());
  }

  absl::StatusOr<ConstRows> Forward(const DeviceBatch& batch, void* kv_pool) override {
    CHECK(batch.num_tokens() >= 1 && batch.num_tokens() <= options_.max_batch_tokens,
          "num_tokens={}", batch.num_tokens());
    CHECK(batch.num_logit_rows() <= options_.max_logit_rows, "num_logit_rows={}",
          batch.num_logit_rows());
    backend_->Embed(*weights_.embedding, batch, workspace_.residual.rows());
    backend_->RopeAngles(batch, config_.head_dim, config_.rope_theta, config_.compression_ratio,
                         workspace_.cos_sin.rows());
    ConstRows pending;  // what the next norm adds to the residual first
    for (int i = 0; i < config_.num_layers; ++i) {
      const Layer& layer = weights_.layers[i];
      AddNorm(pending, Floats(layer.input_norm), batch.num_tokens());
      RETURN_IF_ERROR(AttentionBlock(layer, KvOf(i, kv_pool), batch));
      AddNorm(Delta(), Floats(layer.post_attention_norm), batch.num_tokens());
      RETURN_IF_ERROR(MlpBlock(i, batch));
      pending = Delta();
    }
    num_tokens_ = batch.num_tokens();
    const int64_t num_rows = batch.num_logit_rows();
    if (num_rows == 0) return ConstRows();
    return Head(workspace_.residual.rows(), pending, batch.logit_tokens(), num_rows);
  }

  absl::StatusOr<ConstRows> TokenLogits(int64_t first_token, int64_t num_tokens) override {
    CHECK(num_tokens >= 1 && num_tokens <= options_.max_logit_rows && first_token >= 0 &&
              first_token + num_tokens <= num_tokens_,
          "first_token={} num_tokens={} of {}", first_token, num_tokens, num_tokens_);
    // What the last layer has added to the residual is still there: no operator since has written
    // to a row but for those that wanted logits.
    const auto from = [first_token](Rows rows) { return Rows{rows.row(first_token), rows.stride}; };
    return Head(from(workspace_.residual.rows()), from(Delta()), /*row_ids=*/nullptr, num_tokens);
  }

 private:
  KvLayer KvOf(int layer, void* kv_pool) const {
    return {kv_pool, kv_block_bytes(), layer * shape_.kv_layer_bytes};
  }
  Rows Normed() const { return workspace_.normed.rows(); }
  Rows Delta() const { return workspace_.delta.rows(); }

  void AddNorm(ConstRows delta, const float* gain, int64_t num_tokens) {
    backend_->AddRmsNorm(workspace_.residual.rows(), delta, /*row_ids=*/nullptr, num_tokens,
                         config_.hidden_size, gain, config_.rms_norm_eps, Normed());
  }

  absl::Status AttentionBlock(const Layer& layer, const KvLayer& kv, const DeviceBatch& batch) {
    const Rows qkv = workspace_.qkv.rows();
    const Rows attended = workspace_.attended.rows();
    backend_->Linear(Normed(), batch.num_tokens(), *layer.qkv, qkv);
    backend_->RopeAndAppendKv(shape_.attention, batch, workspace_.cos_sin.rows(), qkv, kv);
    backend_->Attention(shape_.attention, batch, qkv, kv, attended);
    backend_->Linear(attended, batch.num_tokens(), *layer.output, Delta());
    return SumDeltaOverRanks(batch.num_tokens());
  }

  int32_t* ExpertIds(int layer) const {
    return static_cast<int32_t*>(workspace_.expert_ids->data()) +
           int64_t{layer} * options_.max_batch_tokens * std::max(1, config_.num_experts_per_token);
  }

  absl::Status MlpBlock(int layer_index, const DeviceBatch& batch) {
    const Layer& layer = weights_.layers[layer_index];
    const int64_t num_tokens = batch.num_tokens();
    if (layer.is_moe()) {
      int32_t* expert_ids = ExpertIds(layer_index);
      auto* expert_weights = static_cast<float*>(workspace_.expert_weights->data());
      const kernels::RouterShape router = {config_.num_experts, config_.num_experts_per_token,
                                           config_.moe_norm_min};
      const MlpWeights shared = layer.shared.view();
      if (shared.gate_up != nullptr) backend_->BeginSharedExperts(Normed(), num_tokens, shared);
      backend_->Route(Normed(), num_tokens, *layer.router, Floats(layer.router_bias), router,
                      expert_ids, expert_weights, batch.route_as());
      backend_->MoeMlp(Normed(), num_tokens, *layer.expert_group, router.top_k, expert_ids,
                       expert_weights, shared.gate_up == nullptr ? nullptr : &shared, Delta());
    } else {
      backend_->SwiGluMlp(Normed(), num_tokens, layer.mlp.view(), Delta());
    }
    return SumDeltaOverRanks(num_tokens);
  }

  absl::Status SumDeltaOverRanks(int64_t num_tokens) {
    if (shape_.world_size == 1) return absl::OkStatus();
    return collective_->AllReduceSum(Delta().data, num_tokens * Delta().stride);
  }

  // Logits of these rows of the residual (see Backend::AddRmsNorm): full rows on rank 0, nothing
  // elsewhere.
  absl::StatusOr<ConstRows> Head(Rows residual, ConstRows delta, const int32_t* row_ids,
                                 int64_t num_rows) {
    backend_->AddRmsNorm(residual, delta, row_ids, num_rows, config_.hidden_size,
                         Floats(weights_.final_norm), config_.rms_norm_eps, Normed());
    const Rows rank_logits = workspace_.rank_logits.rows();
    backend_->Linear(Normed(), num_rows, *weights_.head, rank_logits);
    if (shape_.world_size == 1) return rank_logits;

    const int64_t rank_vocab = rank_logits.stride;
    const int64_t count = num_rows * rank_vocab;
    float* gathered = workspace_.gathered_logits.rows().data;
    RETURN_IF_ERROR(collective_->AllGather(rank_logits.data, count, gathered));
    if (shape_.rank != 0) return ConstRows();
    const Rows logits = workspace_.logits.rows();
    for (int rank = 0; rank < shape_.world_size; ++rank) {
      backend_->CopyRows({gathered + rank * count, rank_vocab}, num_rows, rank_vocab,
                         {logits.data + rank * rank_vocab, logits.stride});
    }
    return logits;
  }

  const ModelConfig config_;
  const RankShape shape_;
  const Weights weights_;
  const Workspace workspace_;
  const uint64_t weights_digest_;
  Backend* const backend_;
  Collective* const collective_;
  const Ernie45Options options_;
  int64_t num_tokens_ = 0;  // of the last Forward
};

}  // namespace

absl::StatusOr<std::unique_ptr<Model>> LoadErnie45(const ModelConfig& config, WeightSource* source,
                                                   Backend* backend, Collective* collective,
                                                   const Ernie45Options& options) {
  CHECK(options.max_batch_tokens >= 1 && options.max_logit_rows >= 1,
        "max_batch_tokens={} max_logit_rows={}", options.max_batch_tokens, options.max_logit_rows);
  RankShape shape;
  if (collective != nullptr) {
    shape.rank = collective->rank();
    shape.world_size = collective->world_size();
  }
  RETURN_IF_ERROR(CheckTensorParallel(config, shape.world_size));
  RETURN_IF_ERROR(backend->CheckModel(config.hidden_size, config.num_experts));
  shape.attention = {config.num_heads / shape.world_size,
                     std::max(1, config.num_kv_heads / shape.world_size), config.head_dim};
  ASSIGN_OR_RETURN(shape.kv_layer_bytes, backend->KvLayerBytes(shape.attention));
  ASSIGN_OR_RETURN(Weights weights, Loader(config, source, backend).LoadAll());
  ASSIGN_OR_RETURN(Workspace workspace, AllocateWorkspace(backend, config, shape, options));
  const std::string identity = source->identity();
  return std::make_unique<Ernie45>(config, shape, std::move(weights), std::move(workspace),
                                   XXH3_64bits(identity.data(), identity.size()), backend,
                                   collective, options);
}

absl::StatusOr<std::unique_ptr<Model>> LoadErnie45(const ModelConfig& config,
                                                   const Checkpoint& checkpoint, Backend* backend,
                                                   Collective* collective,
                                                   const Ernie45Options& options) {
  const int rank = collective == nullptr ? 0 : collective->rank();
  const int world_size = collective == nullptr ? 1 : collective->world_size();
  const std::unique_ptr<WeightSource> source =
      MakeCheckpointSource(config, checkpoint, backend, rank, world_size, options.num_load_threads);
  return LoadErnie45(config, source.get(), backend, collective, options);
}

}  // namespace wintserve
