// Schemes of quantisation: which matrix of a model is stored in which format, and what config.json
// says about that.
#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "engine_worker/config/model_config.h"

namespace wintserve::quantizer {

// kWint2   experts wint2, those of the first MoE layers wint4; everything dense wint8
// kWint4   experts wint4; everything dense wint8
// kWint8   everything wint8
// Dense are attention, the dense layers' MLP and shared experts. Embedding, head, norms, router and
// routing bias are never quantised.
enum class Scheme { kWint2, kWint4, kWint8 };

// "wint2"
std::string_view SchemeName(Scheme scheme);

struct SchemeOptions {
  Scheme scheme = Scheme::kWint2;
  // kWint2: of how many of the first MoE layers the experts are wint4, or the last layer of which
  // they are, counted from 0 over all layers. At most one of the two; neither: DefaultWint4Layers.
  std::optional<int> wint4_layers = {};
  std::optional<int> wint4_end_layer = {};
  // Left in bf16, to measure or serve the rest of the scheme alone. FastDeploy does not load that.
  bool plain_dense = false;
  bool plain_first_experts = false;  // kWint2: those that would be wint4
};

// In the published 300B checkpoint the experts of the first 4 of 51 MoE layers are wint4, as errors
// of early layers go through all others. The same share, rounded, but at least one layer; none of a
// single layer.
int DefaultWint4Layers(int num_moe_layers);

// The configuration of a quantised model with the weights of `source`.
// INVALID_ARGUMENT: the options do not fit the model, or each other; the text names the option.
// REQUIRES: `source` is not quantised.
absl::StatusOr<ModelConfig> QuantizedConfig(const ModelConfig& source,
                                            const SchemeOptions& options);

// config.json of the quantised model: the source's own with what has to differ: quantization_config
// in the published form, Paddle's key for the type, whether the head is tied and whether routers
// have a bias said where the source leaves that to the tensors, and no multi-token prediction. What
// FastDeploy would take for something else is said as it expects it.
// REQUIRES: source_json is a JSON object; `target` is a result of QuantizedConfig, its
// tie_word_embeddings and has_router_bias true to the tensors.
std::string QuantizedConfigJson(const std::string& source_json, const ModelConfig& target);

}  // namespace wintserve::quantizer
