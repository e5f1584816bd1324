#include "engine_worker/config/model_config.h"

#include <fmt/format.h>

#include <algorithm>

#include "common/status_macros.h"
#include "engine_worker/config/json_object.h"
#include "engine_worker/config/model_files.h"

namespace wintserve {
namespace {

constexpr int kMaxSize = 1 << 24;  // of a dimension or a vocabulary: products fit 64 bits easily
constexpr int kMaxLayers = 1 << 12;
constexpr int kMaxExperts = 1 << 12;
// A few tensors each, which a text of a few bytes must not make us list by the million.
constexpr int kMaxExpertsOfAllLayers = 1 << 17;
constexpr int kDefaultLastWint4Layer = 6;
constexpr int kWint2GroupRows = 64;

// In the place of a quantised type: not quantised. Not in published files; `wintserve quantize`
// writes it.
constexpr char kBfloat16[] = "bfloat16";

constexpr char kMoe[] = "Ernie4_5_MoeForCausalLM";
constexpr char kDense[] = "Ernie4_5ForCausalLM";
constexpr char kDenseFirstRelease[] = "Ernie4_5_ForCausalLM";  // of the same model

absl::Status ReadAttention(const JsonObject& json, ModelConfig& config) {
  ASSIGN_OR_RETURN(config.num_heads, json.Int("num_attention_heads", 1, kMaxSize));
  ASSIGN_OR_RETURN(config.num_kv_heads,
                   json.IntOr("num_key_value_heads", 1, kMaxSize, config.num_heads));
  if (config.num_heads % config.num_kv_heads != 0) {
    return json.Refuse("num_key_value_heads",
                       fmt::format("a divisor of num_attention_heads {}", config.num_heads));
  }
  if (!json.Has("head_dim") && config.hidden_size % config.num_heads != 0) {
    return json.Refuse("head_dim", fmt::format("required, as hidden_size {} is no multiple of "
                                               "num_attention_heads {}",
                                               config.hidden_size, config.num_heads));
  }
  ASSIGN_OR_RETURN(config.head_dim,
                   json.IntOr("head_dim", 1, kMaxSize, config.hidden_size / config.num_heads));
  if (config.head_dim % 2 != 0) {
    return json.Refuse("head_dim", fmt::format("an even number (rotary embedding turns pairs), "
                                               "but it is {}",
                                               config.head_dim));
  }
  return absl::OkStatus();
}

absl::Status ReadRope(const JsonObject& json, ModelConfig& config) {
  ASSIGN_OR_RETURN(const JsonObject scaling, json.ObjectOrEmpty("rope_scaling"));
  if (!scaling.empty()) return json.Refuse("rope_scaling", "null");
  ASSIGN_OR_RETURN(const JsonObject parameters, json.ObjectOrEmpty("rope_parameters"));
  RETURN_IF_ERROR(parameters.ChoiceOr("rope_type", {"default"}, "default").status());
  if (json.Has("rope_theta") || !parameters.Has("rope_theta")) {
    ASSIGN_OR_RETURN(config.rope_theta, json.PositiveFloat("rope_theta"));
  } else {
    ASSIGN_OR_RETURN(config.rope_theta, parameters.PositiveFloat("rope_theta"));
  }
  ASSIGN_OR_RETURN(config.compression_ratio, json.PositiveFloatOr("compression_ratio", 1));
  return absl::OkStatus();
}

// What the forward pass does not do is refused by name, not silently computed wrongly.
absl::Status RefuseUnsupported(const JsonObject& json) {
  ASSIGN_OR_RETURN(const bool use_bias, json.BoolOr("use_bias", false));
  if (use_bias) return json.Refuse("use_bias", "false");
  RETURN_IF_ERROR(json.ChoiceOr("hidden_act", {"silu"}, "silu").status());
  RETURN_IF_ERROR(json.ChoiceOr("moe_gate_act", {"softmax"}, "softmax").status());
  ASSIGN_OR_RETURN(const bool norm_gate, json.BoolOr("moe_norm_gate_logits", true));
  if (!norm_gate) return json.Refuse("moe_norm_gate_logits", "true");
  return absl::OkStatus();
}

// Vision-language configurations give lists: [text, vision] for experts and widths, one entry a
// modality for the layer range.
absl::Status ReadExperts(const JsonObject& json, ModelConfig& config) {
  ASSIGN_OR_RETURN(const std::vector<int> experts,
                   json.IntOrList("moe_num_experts", 1, kMaxExperts));
  ASSIGN_OR_RETURN(const std::vector<int> widths,
                   json.IntOrList("moe_intermediate_size", 1, kMaxSize));
  ASSIGN_OR_RETURN(std::vector<int> starts,
                   json.IntOrList("moe_layer_start_index", 0, config.num_layers - 1));
  std::vector<int> ends = {-1};
  if (json.Has("moe_layer_end_index")) {
    ASSIGN_OR_RETURN(ends, json.IntOrList("moe_layer_end_index", -1, kMaxLayers));
  }
  config.num_experts = experts.front();
  if (int64_t{config.num_experts} * config.num_layers > kMaxExpertsOfAllLayers) {
    return json.Refuse("moe_num_experts", fmt::format("at most {} together in {} layers",
                                                      kMaxExpertsOfAllLayers, config.num_layers));
  }
  config.moe_intermediate_size = widths.front();
  config.moe_layer_start = *std::min_element(starts.begin(), starts.end());
  const int last_layer = config.num_layers - 1;
  // The published vision-language files name an end beyond the last layer.
  const bool open_end = std::find(ends.begin(), ends.end(), -1) != ends.end();
  config.moe_layer_end =
      open_end ? last_layer : std::min(last_layer, *std::max_element(ends.begin(), ends.end()));
  if (config.moe_layer_end < config.moe_layer_start) {
    return json.Refuse("moe_layer_end_index", fmt::format("-1 or at least moe_layer_start_index {}",
                                                          config.moe_layer_start));
  }
  ASSIGN_OR_RETURN(config.moe_layer_interval, json.IntOr("moe_layer_interval", 1, kMaxLayers, 1));
  ASSIGN_OR_RETURN(config.num_experts_per_token, json.Int("moe_k", 1, config.num_experts));
  ASSIGN_OR_RETURN(config.num_shared_experts,
                   json.IntOr("moe_num_shared_experts", 0, kMaxExperts, 0));
  config.has_router_bias_is_set = json.Has("moe_use_aux_free");
  ASSIGN_OR_RETURN(config.has_router_bias, json.BoolOr("moe_use_aux_free", false));
  ASSIGN_OR_RETURN(config.moe_norm_min, json.PositiveFloatOr("moe_norm_min", 1e-12f));
  return absl::OkStatus();
}

// "remove_tail_layer", as training writes it, says how many of the layers the file does not have:
// true or a number.
absl::Status ReadNumLayers(const JsonObject& json, ModelConfig& config) {
  ASSIGN_OR_RETURN(config.num_layers, json.Int("num_hidden_layers", 1, kMaxLayers));
  const absl::StatusOr<bool> is_one = json.BoolOr("remove_tail_layer", false);
  const int num_removed =
      is_one.ok() ? int{*is_one}
                  : json.Int("remove_tail_layer", 0, kMaxLayers).value_or(config.num_layers);
  if (num_removed >= config.num_layers) {
    return json.Refuse(
        "remove_tail_layer",
        fmt::format("false, true or a number less than num_hidden_layers {}", config.num_layers));
  }
  config.num_layers -= num_removed;
  return absl::OkStatus();
}

absl::Status ReadWint2(const JsonObject& quantization, ModelConfig& config) {
  ASSIGN_OR_RETURN(const JsonObject moe, quantization.ObjectOrEmpty("moe_quant_config"));
  // Nested wins; the top-level key of the documented example means the same.
  const bool nested = moe.Has("quant_type");
  RETURN_IF_ERROR((nested ? moe.ChoiceOr("quant_type", {"w4w2"}, "")
                          : quantization.ChoiceOr("moe_quant_type", {"w4w2"}, "w4w2"))
                      .status());
  ASSIGN_OR_RETURN(const JsonObject wint4, moe.ObjectOrEmpty("moe_w4_quant_config"));
  ASSIGN_OR_RETURN(const std::string first_type,
                   wint4.ChoiceOr("quant_type", {"wint4", "wint8", kBfloat16}, "wint4"));
  config.first_experts_are_plain = first_type == kBfloat16;
  const bool first_are_wint8 = first_type == "wint8";
  RETURN_IF_ERROR(wint4.ChoiceOr("quant_granularity", {"per_channel"}, "per_channel").status());
  ASSIGN_OR_RETURN(config.last_wint4_layer,
                   wint4.IntOr("quant_end_layer", -1, kMaxLayers, kDefaultLastWint4Layer));
  const bool is_for_all_layers = config.last_wint4_layer >= config.moe_layer_end;
  if (first_are_wint8 && !is_for_all_layers) {
    return wint4.Refuse("quant_type",
                        fmt::format("\"wint4\", as quant_end_layer {} leaves layers to wint2",
                                    config.last_wint4_layer));
  }
  ASSIGN_OR_RETURN(const JsonObject wint2, moe.ObjectOrEmpty("moe_w2_quant_config"));
  RETURN_IF_ERROR(wint2.ChoiceOr("quant_type", {"wint2"}, "wint2").status());
  RETURN_IF_ERROR(wint2.ChoiceOr("quant_granularity", {"pp_acc"}, "pp_acc").status());
  const int first_wint2_layer = config.last_wint4_layer + 1;
  RETURN_IF_ERROR(
      wint2.IntOr("quant_start_layer", first_wint2_layer, first_wint2_layer, first_wint2_layer)
          .status());
  ASSIGN_OR_RETURN(const int group_size,
                   wint2.IntOr("quant_group_size", 0, kMaxSize, kWint2GroupRows));
  if (group_size != 0 && group_size != kWint2GroupRows) {
    return wint2.Refuse("quant_group_size", "64");
  }
  config.expert_quantization = !is_for_all_layers || config.first_experts_are_plain
                                   ? ExpertQuantization::kW4W2
                               : first_are_wint8 ? ExpertQuantization::kWint8
                                                 : ExpertQuantization::kWint4;
  return absl::OkStatus();
}

// Nothing is quantised while loading, so the files must hold quantised weights already.
absl::Status CheckPrequantized(const JsonObject& json, const JsonObject& quantization,
                               bool is_moe) {
  ASSIGN_OR_RETURN(const bool whole_model, json.BoolOr("is_quantized", false));
  if (whole_model) return absl::OkStatus();
  for (const char* key : {"is_quantized", "is_moe_quantized"}) {
    if (!quantization.Has(key)) continue;
    if (key == std::string_view("is_moe_quantized") && !is_moe) continue;
    ASSIGN_OR_RETURN(const bool quantized, quantization.BoolOr(key, false));
    return quantized ? absl::OkStatus()
                     : quantization.Refuse(key, "true (the checkpoint must be quantised already)");
  }
  if (quantization.Has("kv_cache_quant_type")) {
    return quantization.Refuse("is_quantized",
                               "true, when kv_cache_quant_type is given (the checkpoint must be "
                               "quantised already)");
  }
  return absl::OkStatus();
}

absl::Status ReadQuantization(const JsonObject& json, ModelConfig& config) {
  if (!json.Has("quantization_config")) return absl::OkStatus();
  ASSIGN_OR_RETURN(const JsonObject quantization, json.ObjectOrEmpty("quantization_config"));
  ASSIGN_OR_RETURN(
      const std::string scheme,
      quantization.ChoiceOr("quantization", {"wint2", "mix_quant", "wint4", "wint8"}, ""));
  if (scheme.empty()) {
    return quantization.Refuse("quantization", "\"wint2\", \"mix_quant\", \"wint4\", \"wint8\"");
  }
  const bool is_moe = config.num_experts > 0;
  RETURN_IF_ERROR(CheckPrequantized(json, quantization, is_moe));
  ASSIGN_OR_RETURN(const std::string dense_type,
                   quantization.ChoiceOr("dense_quant_type", {"wint8", kBfloat16}, "wint8"));
  RETURN_IF_ERROR(
      quantization.ChoiceOr("dense_quant_granularity", {"per_channel"}, "per_channel").status());
  config.dense_is_wint8 = dense_type == "wint8";
  if (!is_moe) return absl::OkStatus();
  if (scheme == "wint2") return ReadWint2(quantization, config);
  const std::string by_scheme = scheme == "mix_quant" ? "" : scheme;
  ASSIGN_OR_RETURN(const std::string expert_type,
                   quantization.ChoiceOr("moe_quant_type", {"wint4", "wint8"}, by_scheme));
  if (expert_type.empty()) return quantization.Refuse("moe_quant_type", "\"wint4\", \"wint8\"");
  config.expert_quantization =
      expert_type == "wint4" ? ExpertQuantization::kWint4 : ExpertQuantization::kWint8;
  return absl::OkStatus();
}

// The packed layouts come in whole tiles along K: 64 rows, for WINT2 128.
absl::Status CheckTiles(const std::string& file, const ModelConfig& config) {
  const bool has_wint2 = config.expert_quantization == ExpertQuantization::kW4W2;
  struct Rule {
    const char* name;
    int64_t value;
    int multiple;
    bool applies;
  };
  const bool has_experts = config.expert_quantization != ExpertQuantization::kNone;
  const int expert_rows = has_wint2 ? 2 * kWint2GroupRows : 64;
  const Rule rules[] = {
      {"hidden_size", config.hidden_size, 64, config.dense_is_wint8},
      {"num_attention_heads * head_dim", int64_t{config.num_heads} * config.head_dim, 64,
       config.dense_is_wint8},
      {"intermediate_size", config.intermediate_size, 64, config.dense_is_wint8},
      {"hidden_size", config.hidden_size, expert_rows, has_experts},
      {"moe_intermediate_size", config.moe_intermediate_size, expert_rows, has_experts},
  };
  for (const Rule& rule : rules) {
    if (!rule.applies || rule.value % rule.multiple == 0) continue;
    return absl::InvalidArgumentError(
        fmt::format("{}: {} is {}; allowed: a multiple of {} in a quantised checkpoint", file,
                    rule.name, rule.value, rule.multiple));
  }
  return absl::OkStatus();
}

absl::StatusOr<ModelConfig> Parse(const std::string& text, const std::string& file) {
  const absl::StatusOr<nlohmann::json> root = ParseJsonObject(text);
  if (!root.ok()) {
    return absl::InvalidArgumentError(fmt::format("{}: {}; allowed: one JSON object", file,
                                                  std::string(root.status().message())));
  }
  const JsonObject json(*root, file, "");
  ModelConfig config;
  ASSIGN_OR_RETURN(config.architecture, json.FirstString("architectures"));
  if (config.architecture == kDenseFirstRelease) config.architecture = kDense;
  if (config.architecture != kMoe && config.architecture != kDense) {
    return json.Refuse("architectures", fmt::format("[\"{}\"], [\"{}\"], [\"{}\"]", kMoe, kDense,
                                                    kDenseFirstRelease));
  }
  ASSIGN_OR_RETURN(config.vocab_size, json.Int("vocab_size", 1, kMaxSize));
  ASSIGN_OR_RETURN(config.hidden_size, json.Int("hidden_size", 1, kMaxSize));
  RETURN_IF_ERROR(ReadNumLayers(json, config));
  RETURN_IF_ERROR(ReadAttention(json, config));
  ASSIGN_OR_RETURN(config.intermediate_size, json.Int("intermediate_size", 1, kMaxSize));
  ASSIGN_OR_RETURN(config.max_position_embeddings,
                   json.Int("max_position_embeddings", 1, INT32_MAX));
  ASSIGN_OR_RETURN(config.rms_norm_eps, json.PositiveFloatOr("rms_norm_eps", 1e-5f));
  RETURN_IF_ERROR(ReadRope(json, config));
  config.tie_word_embeddings_is_set = json.Has("tie_word_embeddings");
  ASSIGN_OR_RETURN(config.tie_word_embeddings, json.BoolOr("tie_word_embeddings", false));
  RETURN_IF_ERROR(RefuseUnsupported(json));
  if (config.architecture == kMoe) RETURN_IF_ERROR(ReadExperts(json, config));
  RETURN_IF_ERROR(ReadQuantization(json, config));
  RETURN_IF_ERROR(CheckTiles(file, config));
  return config;
}

}  // namespace

absl::StatusOr<ModelConfig> LoadModelConfig(const std::filesystem::path& dir) {
  const std::filesystem::path path = dir / "config.json";
  ASSIGN_OR_RETURN(const std::string text, ReadModelText(path));
  return Parse(text, path.string());
}

absl::Status CheckTensorParallel(const ModelConfig& config, int world_size) {
  const auto refuse = [world_size](const char* name, int64_t value, const std::string& allowed) {
    return absl::InvalidArgumentError(
        fmt::format("tensor parallel size {} does not fit this model: {} is {}; allowed: {}",
                    world_size, name, value, allowed));
  };
  if (world_size < 1) {
    return absl::InvalidArgumentError(
        fmt::format("tensor parallel size is {}; allowed: 1 or more", world_size));
  }
  const std::string multiple = fmt::format("a multiple of {}", world_size);
  if (config.num_heads % world_size != 0) {
    return refuse("num_attention_heads", config.num_heads, multiple);
  }
  if (config.num_kv_heads % world_size != 0 && world_size % config.num_kv_heads != 0) {
    return refuse("num_key_value_heads", config.num_kv_heads,
                  fmt::format("a multiple or a divisor of {}", world_size));
  }
  if (config.vocab_size % world_size != 0) {
    return refuse("vocab_size", config.vocab_size, multiple);
  }
  if (config.intermediate_size % world_size != 0) {
    return refuse("intermediate_size", config.intermediate_size, multiple);
  }
  // A WINT2 local scale covers 64 rows of down_proj and cannot be shared by two ranks.
  const bool has_wint2 = config.expert_quantization == ExpertQuantization::kW4W2;
  const int64_t unit = has_wint2 ? int64_t{kWint2GroupRows} * world_size : world_size;
  if (config.num_experts > 0 && config.moe_intermediate_size % unit != 0) {
    return refuse("moe_intermediate_size", config.moe_intermediate_size,
                  fmt::format("a multiple of {}", unit));
  }
  return absl::OkStatus();
}

}  // namespace wintserve
