#include "tools/quantizer/output/scheme.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <utility>
#include <vector>

#include "common/check.h"
#include "common/status_macros.h"

namespace wintserve::quantizer {
namespace {

using nlohmann::ordered_json;

std::vector<int> MoeLayers(const ModelConfig& config) {
  std::vector<int> layers;
  for (int layer = 0; layer < config.num_layers; ++layer) {
    if (config.IsMoeLayer(layer)) layers.push_back(layer);
  }
  return layers;
}

absl::Status CheckApplies(const ModelConfig& source, const SchemeOptions& options) {
  const auto refuse = [](const char* option, std::string_view reason) {
    return absl::InvalidArgumentError(fmt::format("--{}: {}", option, reason));
  };
  const bool has_experts = source.num_experts > 0;
  if (!has_experts && options.scheme != Scheme::kWint8) {
    return refuse("scheme", fmt::format("{} is for experts, and the model has none; allowed: wint8",
                                        SchemeName(options.scheme)));
  }
  if (!has_experts && options.plain_dense) {
    return refuse("dense", "bf16 would leave nothing to quantise: the model has no experts");
  }
  if (options.scheme == Scheme::kWint2) return absl::OkStatus();
  const char* ours = options.wint4_layers.has_value()      ? "wint4-layers"
                     : options.wint4_end_layer.has_value() ? "wint4-end-layer"
                     : options.plain_first_experts         ? "first-experts"
                                                           : nullptr;
  if (ours == nullptr) return absl::OkStatus();
  return refuse(ours, fmt::format("means something to --scheme wint2 only, not to {}",
                                  SchemeName(options.scheme)));
}

// The last layer whose experts are wint4: before the first MoE layer if there is none.
absl::StatusOr<int> LastWint4Layer(const ModelConfig& source, const SchemeOptions& options) {
  const std::vector<int> moe_layers = MoeLayers(source);
  const int num_layers = static_cast<int>(moe_layers.size());
  if (options.wint4_end_layer.has_value()) {
    if (options.wint4_layers.has_value()) {
      return absl::InvalidArgumentError("--wint4-end-layer: excludes --wint4-layers");
    }
    const int first = moe_layers.front() - 1;
    const int last = moe_layers.back() - 1;
    if (*options.wint4_end_layer < first || *options.wint4_end_layer > last) {
      return absl::InvalidArgumentError(
          fmt::format("--wint4-end-layer: is {}; allowed: {} (no wint4 layer) to {} (one wint2 "
                      "layer is left)",
                      *options.wint4_end_layer, first, last));
    }
    return *options.wint4_end_layer;
  }
  const int count = options.wint4_layers.value_or(DefaultWint4Layers(num_layers));
  if (count < 0 || count >= num_layers) {
    return absl::InvalidArgumentError(
        fmt::format("--wint4-layers: is {}; allowed: 0 to {}, as the model has {} layers with "
                    "experts (--scheme wint4 is for all)",
                    count, num_layers - 1, num_layers));
  }
  return count == 0 ? moe_layers.front() - 1 : moe_layers[count - 1];
}

// The form of the published 2-bit release, for all schemes: the only one in which FastDeploy knows
// experts that are quantised already. Those of its "wint4" layers may as well be wint8, and all
// layers may be such layers.
ordered_json QuantizationJson(const ModelConfig& target) {
  ordered_json json = {{"quantization", "wint2"},
                       {"dense_quant_type", target.dense_is_wint8 ? "wint8" : "bfloat16"}};
  if (target.num_experts == 0) return json;
  const bool has_wint2 = target.expert_quantization == ExpertQuantization::kW4W2;
  const char* first_type = target.first_experts_are_plain                             ? "bfloat16"
                           : target.expert_quantization == ExpertQuantization::kWint8 ? "wint8"
                                                                                      : "wint4";
  const int last_layer = target.num_layers - 1;
  json["moe_quant_type"] = "w4w2";
  json["moe_quant_config"]["moe_w4_quant_config"] = {
      {"quant_type", first_type},
      {"quant_granularity", "per_channel"},
      {"quant_start_layer", 0},
      {"quant_end_layer", has_wint2 ? target.last_wint4_layer : last_layer}};
  if (has_wint2) {
    json["moe_quant_config"]["moe_w2_quant_config"] = {
        {"quant_type", "wint2"},
        {"quant_granularity", "pp_acc"},
        {"quant_group_size", 64},
        {"quant_start_layer", target.last_wint4_layer + 1},
        {"quant_end_layer", last_layer}};
  }
  return json;
}

// What FastDeploy needs to find, or of which it assumes something else than the model's own code
// does: names as they were before transformers 5, and a number where there is a list of one a
// modality.
void SpellOut(const ModelConfig& target, ordered_json* config) {
  (*config)["hidden_act"] = "silu";
  (*config)["num_key_value_heads"] = target.num_kv_heads;
  if (!config->contains("rope_theta") || (*config)["rope_theta"].is_null()) {
    (*config)["rope_theta"] = target.rope_theta;
  }
  if (target.num_experts == 0) return;
  const std::pair<const char*, int> numbers[] = {
      {"moe_num_experts", target.num_experts},
      {"moe_intermediate_size", target.moe_intermediate_size},
      {"moe_layer_start_index", target.moe_layer_start},
      {"moe_layer_end_index", target.moe_layer_end}};
  for (const auto& [key, value] : numbers) {
    if (config->contains(key) && (*config)[key].is_array()) (*config)[key] = value;
  }
}

}  // namespace

std::string_view SchemeName(Scheme scheme) {
  switch (scheme) {
    case Scheme::kWint2:
      return "wint2";
    case Scheme::kWint4:
      return "wint4";
    case Scheme::kWint8:
      return "wint8";
  }
  CHECK(false, "scheme={}", static_cast<int>(scheme));
}

int DefaultWint4Layers(int num_moe_layers) {
  constexpr int kPublishedWint4Layers = 4;
  constexpr int kPublishedMoeLayers = 51;
  if (num_moe_layers <= 1) return 0;
  const double share = static_cast<double>(kPublishedWint4Layers) / kPublishedMoeLayers;
  return std::max(1, static_cast<int>(std::lround(num_moe_layers * share)));
}

absl::StatusOr<ModelConfig> QuantizedConfig(const ModelConfig& source,
                                            const SchemeOptions& options) {
  CHECK(!source.dense_is_wint8 && source.expert_quantization == ExpertQuantization::kNone);
  RETURN_IF_ERROR(CheckApplies(source, options));
  ModelConfig target = source;
  target.dense_is_wint8 = !options.plain_dense;
  if (MoeLayers(source).empty()) return target;
  switch (options.scheme) {
    case Scheme::kWint2: {
      target.expert_quantization = ExpertQuantization::kW4W2;
      target.first_experts_are_plain = options.plain_first_experts;
      ASSIGN_OR_RETURN(target.last_wint4_layer, LastWint4Layer(source, options));
      break;
    }
    case Scheme::kWint4:
      target.expert_quantization = ExpertQuantization::kWint4;
      break;
    case Scheme::kWint8:
      target.expert_quantization = ExpertQuantization::kWint8;
      break;
  }
  return target;
}

std::string QuantizedConfigJson(const std::string& source_json, const ModelConfig& target) {
  ordered_json config = ordered_json::parse(source_json);
  CHECK(config.is_object());
  // Paddle's loaders tell its own format by this key, and PyTorch's by the other, or by this one
  // and the version of transformers that wrote it.
  config.erase("torch_dtype");
  config.erase("transformers_version");
  config["dtype"] = "bfloat16";
  SpellOut(target, &config);
  config["tie_word_embeddings"] = target.tie_word_embeddings;
  if (target.num_experts > 0) config["moe_use_aux_free"] = target.has_router_bias;
  config.erase("num_nextn_predict_layers");
  config["quantization_config"] = QuantizationJson(target);
  return config.dump(2) + "\n";
}

}  // namespace wintserve::quantizer
