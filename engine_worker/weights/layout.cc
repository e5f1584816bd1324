#include "engine_worker/weights/layout.h"

#include <fmt/format.h>

#include <algorithm>
#include <string_view>

#include "common/check.h"

namespace wintserve {
namespace {

constexpr char kHeadTensor[] = "lm_head.weight";
constexpr char kRouterBiasSuffix[] = ".mlp.moe_statics.e_score_correction_bias";

bool IsQuantized(const ModelConfig& config) {
  return config.dense_is_wint8 || config.expert_quantization != ExpertQuantization::kNone;
}

// Whether the tensor of a matrix [k, n] lies as [n, k]. nullopt: it is square, which tells nothing,
// of neither shape, or not there.
std::optional<bool> IsOutIn(const TensorSet& set, const std::string& name, int64_t k, int64_t n) {
  const TensorSet::Entry* entry = set.Find(name);
  if (entry == nullptr || k == n) return std::nullopt;
  if (entry->view->shape == std::vector<int64_t>{k, n}) return false;
  if (entry->view->shape == std::vector<int64_t>{n, k}) return true;
  return std::nullopt;
}

StoredFormat DenseFormat(const ModelConfig& config) {
  return config.dense_is_wint8 ? StoredFormat::kWint8 : StoredFormat::kPlain;
}

StoredFormat MlpFormat(const ModelConfig& config, const MatrixRef& ref) {
  if (ref.expert < 0) return DenseFormat(config);
  switch (config.expert_quantization) {
    case ExpertQuantization::kNone:
      return StoredFormat::kPlain;
    case ExpertQuantization::kWint8:
      return StoredFormat::kWint8;
    case ExpertQuantization::kWint4:
      return StoredFormat::kWint4;
    case ExpertQuantization::kW4W2:
      if (ref.layer > config.last_wint4_layer) return StoredFormat::kWint2;
      return config.first_experts_are_plain ? StoredFormat::kPlain : StoredFormat::kWint4;
  }
  return StoredFormat::kPlain;
}

int64_t MlpWidth(const ModelConfig& config, const MatrixRef& ref) {
  if (ref.expert == kDenseMlp) return config.intermediate_size;
  const int64_t expert_width = config.moe_intermediate_size;
  return ref.expert == kSharedExperts ? config.num_shared_experts * expert_width : expert_width;
}

std::string LayerName(const Layout& layout, int layer) {
  return fmt::format("{}.layers.{}", layout.prefix, layer);
}

std::string MlpName(const Layout& layout, const MatrixRef& ref) {
  std::string mlp = LayerName(layout, ref.layer) + ".mlp";
  if (ref.expert == kDenseMlp) return mlp;
  if (ref.expert == kSharedExperts) return mlp + ".shared_experts";
  return fmt::format("{}.experts.{}", mlp, ref.expert);
}

// A column block: `num_units` blocks of `unit_columns`, under the name it has alone.
struct Block {
  const char* name;
  int64_t num_units;
  int64_t unit_columns;
};

// The blocks as parts of one fused matrix, or each as a matrix of its own.
LogicalMatrix FromBlocks(const StoredMatrix& pattern, const std::string& parent,
                         const char* fused_name, bool is_fused, const std::vector<Block>& blocks) {
  LogicalMatrix matrix;
  matrix.split = Split::kColumns;
  int64_t num_columns = 0;
  for (const Block& block : blocks) {
    MatrixPart part{pattern, is_fused ? num_columns : 0, block.num_units, block.unit_columns};
    part.stored.name = parent + "." + (is_fused ? fused_name : block.name);
    part.stored.n = block.num_units * block.unit_columns;
    num_columns += part.stored.n;
    matrix.parts.push_back(std::move(part));
  }
  if (is_fused) {
    for (MatrixPart& part : matrix.parts) part.stored.n = num_columns;
  }
  return matrix;
}

LogicalMatrix Single(StoredMatrix stored, Split split) {
  const int64_t n = stored.n;
  return {{MatrixPart{std::move(stored), 0, n, 1}}, split};
}

// Of the first matrix of the layers that is not square; qkv_proj and o_proj are never both. What no
// shape tells is as in the releases: Paddle's prefix and quantised matrices are Paddle's way.
void DetectOrientation(const TensorSet& set, const ModelConfig& config, Layout& layout) {
  layout.is_out_in = layout.prefix == "model" && !IsQuantized(config);
  std::optional<bool> linear, router;
  for (const MatrixRef& ref : AllMatrices(config)) {
    if (ref.role == MatrixRole::kEmbedding || ref.role == MatrixRole::kHead) continue;
    std::optional<bool>& found = ref.role == MatrixRole::kRouter ? router : linear;
    for (const MatrixPart& part : DescribeMatrix(layout, config, ref).parts) {
      if (found || part.stored.format != StoredFormat::kPlain) continue;
      found = IsOutIn(set, part.stored.name + ".weight", part.stored.k, part.stored.n);
    }
    if (linear && router) break;
  }
  layout.is_out_in = linear.value_or(layout.is_out_in);
  layout.router_is_out_in = router.value_or(layout.is_out_in);
  layout.head_is_out_in =
      IsOutIn(set, kHeadTensor, config.hidden_size, config.vocab_size).value_or(layout.is_out_in);
}

}  // namespace

absl::StatusOr<Layout> DetectLayout(const TensorSet& set, const ModelConfig& config) {
  const auto any = [&](std::string_view prefix, std::string_view part) {
    return std::any_of(set.tensors().begin(), set.tensors().end(), [&](const auto& entry) {
      return entry.first.starts_with(prefix) && entry.first.find(part) != std::string::npos;
    });
  };
  Layout layout;
  if (any("ernie.", "")) {
    layout.prefix = "ernie";
  } else if (any("model.", "")) {
    layout.prefix = "model";
  } else {
    return absl::DataLossError(fmt::format("{}: found {} tensors but none named ernie.* or model.*",
                                           set.dir().string(), set.tensors().size()));
  }
  const std::string layers = layout.prefix + ".layers.";  // not those of multi-token prediction
  layout.has_fused_qkv = !any(layers, ".self_attn.q_proj.");
  layout.has_fused_gate_up = !any(layers, ".gate_proj.");
  if (IsQuantized(config) && !(layout.has_fused_qkv && layout.has_fused_gate_up)) {
    return absl::DataLossError(
        fmt::format("{}: found separate q_proj or gate_proj tensors, expected the fused qkv_proj "
                    "and up_gate_proj of a quantised checkpoint",
                    set.dir().string()));
  }
  const bool has_head = set.Find(kHeadTensor) != nullptr;
  layout.head_is_tied = config.tie_word_embeddings_is_set ? config.tie_word_embeddings : !has_head;
  // transformers does not write the key, and every model of its has the biases.
  layout.has_router_bias =
      config.has_router_bias_is_set ? config.has_router_bias : any(layers, kRouterBiasSuffix);
  DetectOrientation(set, config, layout);
  return layout;
}

std::optional<formats::WeightFormat> QuantizedFormat(StoredFormat stored) {
  switch (stored) {
    case StoredFormat::kPlain:
      return std::nullopt;
    case StoredFormat::kWint8:
      return formats::WeightFormat::kWint8;
    case StoredFormat::kWint4:
      return formats::WeightFormat::kWint4;
    case StoredFormat::kWint2:
      return formats::WeightFormat::kWint2;
  }
  CHECK(false, "stored={}", static_cast<int>(stored));
}

formats::MatrixSlice SliceOf(const MatrixPart& part, Split split, int rank, int world_size) {
  formats::MatrixSlice slice{0, part.stored.k, part.n_begin,
                             part.n_begin + part.num_units * part.unit_columns};
  if (split == Split::kColumns) {
    const int64_t units = std::max<int64_t>(1, part.num_units / world_size);
    slice.n_begin += rank * part.num_units / world_size * part.unit_columns;
    slice.n_end = slice.n_begin + units * part.unit_columns;
  } else if (split == Split::kRows) {
    slice.k_begin = part.stored.k / world_size * rank;
    slice.k_end = slice.k_begin + part.stored.k / world_size;
  }
  return slice;
}

Layout CanonicalLayout(const ModelConfig& config) {
  Layout layout;
  layout.prefix = "ernie";
  layout.head_is_tied = config.tie_word_embeddings;
  layout.has_router_bias = config.has_router_bias;
  return layout;
}

ModelConfig ConfigOfShard(const ModelConfig& config, int num_shards) {
  ModelConfig shard = config;
  shard.vocab_size /= num_shards;
  shard.num_heads /= num_shards;
  shard.num_kv_heads = std::max(1, config.num_kv_heads / num_shards);
  shard.intermediate_size /= num_shards;
  shard.moe_intermediate_size /= num_shards;
  return shard;
}

LogicalMatrix DescribeMatrix(const Layout& layout, const ModelConfig& config,
                             const MatrixRef& ref) {
  const int64_t hidden = config.hidden_size;
  const int64_t vocab = config.vocab_size;
  const std::string attention = LayerName(layout, ref.layer) + ".self_attn";
  StoredMatrix pattern;
  pattern.k = hidden;
  pattern.n = hidden;
  pattern.is_out_in = layout.is_out_in;
  switch (ref.role) {
    case MatrixRole::kEmbedding:
      return Single({layout.prefix + ".embed_tokens", StoredFormat::kPlain, vocab, hidden, false},
                    Split::kNone);
    case MatrixRole::kHead:
      if (layout.head_is_tied) {
        return Single({layout.prefix + ".embed_tokens", StoredFormat::kPlain, hidden, vocab, true},
                      Split::kColumns);
      }
      return Single({"lm_head", StoredFormat::kPlain, hidden, vocab, layout.head_is_out_in},
                    Split::kColumns);
    case MatrixRole::kQkv:
      pattern.format = DenseFormat(config);
      return FromBlocks(pattern, attention, "qkv_proj", layout.has_fused_qkv,
                        {{"q_proj", config.num_heads, config.head_dim},
                         {"k_proj", config.num_kv_heads, config.head_dim},
                         {"v_proj", config.num_kv_heads, config.head_dim}});
    case MatrixRole::kOutput:
      pattern.name = attention + ".o_proj";
      pattern.format = DenseFormat(config);
      pattern.k = int64_t{config.num_heads} * config.head_dim;
      return Single(std::move(pattern), Split::kRows);
    case MatrixRole::kGateUp: {
      pattern.format = MlpFormat(config, ref);
      const int64_t width = MlpWidth(config, ref);
      return FromBlocks(pattern, MlpName(layout, ref), "up_gate_proj", layout.has_fused_gate_up,
                        {{"gate_proj", width, 1}, {"up_proj", width, 1}});
    }
    case MatrixRole::kDown:
      pattern.name = MlpName(layout, ref) + ".down_proj";
      pattern.format = MlpFormat(config, ref);
      pattern.k = MlpWidth(config, ref);
      return Single(std::move(pattern), Split::kRows);
    case MatrixRole::kRouter:
      pattern.name = LayerName(layout, ref.layer) + ".mlp.gate";
      pattern.n = config.num_experts;
      pattern.is_out_in = layout.router_is_out_in;
      return Single(std::move(pattern), Split::kNone);
  }
  CHECK(false, "role={}", static_cast<int>(ref.role));
}

std::string VectorTensorName(const Layout& layout, VectorRole role, int layer) {
  const std::string parent = LayerName(layout, layer);
  switch (role) {
    case VectorRole::kInputNorm:
      return parent + ".input_layernorm.weight";
    case VectorRole::kPostAttentionNorm:
      return parent + ".post_attention_layernorm.weight";
    case VectorRole::kFinalNorm:
      return layout.prefix + ".norm.weight";
    case VectorRole::kRouterBias:
      return parent + kRouterBiasSuffix;
  }
  CHECK(false, "role={}", static_cast<int>(role));
}

std::string_view SkipReasonName(SkipReason reason) {
  switch (reason) {
    case SkipReason::kMultiTokenPrediction:
      return "multi-token prediction";
    case SkipReason::kKvCacheScale:
      return "scales of a quantised KV cache";
    case SkipReason::kOtherScheme:
      return "statistics of other quantisation schemes";
    case SkipReason::kTiedHead:
      return "a head that is tied to the embedding";
  }
  CHECK(false, "reason={}", static_cast<int>(reason));
}

std::optional<SkipReason> WhySkipped(const Layout& layout, std::string_view name) {
  if (name == kHeadTensor && layout.head_is_tied) return SkipReason::kTiedHead;
  const auto has = [&](std::string_view part) { return name.find(part) != name.npos; };
  if (has(".mtp_")) return SkipReason::kMultiTokenPrediction;
  if (has("cachek_matmul.") || has("cachev_matmul.")) return SkipReason::kKvCacheScale;
  for (std::string_view suffix :
       {".activation_scale", ".shift_bias", ".smooth_weight", ".out_scale"}) {
    if (name.ends_with(suffix)) return SkipReason::kOtherScheme;
  }
  return std::nullopt;
}

bool IsOfAnotherModality(std::string_view name) {
  // The last is the router of the experts for images.
  for (std::string_view part :
       {"vision_", "resampler_model.", "visual.", "audio_", ".mlp.gate.weight_1"}) {
    if (name.find(part) != name.npos) return true;
  }
  return false;
}

}  // namespace wintserve
