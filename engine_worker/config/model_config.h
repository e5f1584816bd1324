// config.json of an ERNIE-4.5 checkpoint, parsed and checked. A leaf: knows no weights.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>

#include "absl/status/statusor.h"

namespace wintserve {

enum class ExpertQuantization { kNone, kWint8, kWint4, kW4W2 };

// Names follow config.json. Source: the published ERNIE-4.5 configurations.
struct ModelConfig {
  std::string architecture;  // "Ernie4_5_MoeForCausalLM" or "Ernie4_5ForCausalLM"
  int vocab_size = 0;
  int hidden_size = 0;
  int num_layers = 0;
  int num_heads = 0;
  int num_kv_heads = 0;
  int head_dim = 0;           // may differ from hidden_size / num_heads
  int intermediate_size = 0;  // of the dense MLP
  int max_position_embeddings = 0;
  float rms_norm_eps = 1e-5f;
  float rope_theta = 0;
  float compression_ratio = 1;
  bool tie_word_embeddings = false;
  bool tie_word_embeddings_is_set = false;  // absent: decided by whether lm_head.weight exists

  int num_experts = 0;            // 0: a dense model
  int num_experts_per_token = 0;  // moe_k
  int moe_intermediate_size = 0;
  int num_shared_experts = 0;  // one SwiGLU of this many times moe_intermediate_size
  int moe_layer_start = 0;
  int moe_layer_end = -1;  // inclusive
  int moe_layer_interval = 1;
  bool has_router_bias = false;         // moe_use_aux_free
  bool has_router_bias_is_set = false;  // absent: decided by whether the biases' tensors exist
  float moe_norm_min = 1e-12f;

  bool dense_is_wint8 = false;  // attention, dense MLP, shared experts
  ExpertQuantization expert_quantization = ExpertQuantization::kNone;
  int last_wint4_layer = -1;             // kW4W2: MoE layers up to and including it are wint4
  bool first_experts_are_plain = false;  // kW4W2: those layers' experts are not quantised instead

  bool IsMoeLayer(int layer) const {
    return num_experts > 0 && layer >= moe_layer_start && layer <= moe_layer_end &&
           (layer + 1) % moe_layer_interval == 0;
  }
};

// Reads dir/config.json. Errors name the file, the key, the value and what is allowed:
// NOT_FOUND no such file; DATA_LOSS it cannot be read; INVALID_ARGUMENT malformed, missing or
// inconsistent.
absl::StatusOr<ModelConfig> LoadModelConfig(const std::filesystem::path& dir);

// OK if every matrix divides over world_size ranks (heads, vocabulary, expert width in 64-groups).
absl::Status CheckTensorParallel(const ModelConfig& config, int world_size);

}  // namespace wintserve
