#include <nlohmann/json.hpp>

#include "tools/inspect/report.h"

namespace wintserve::inspect {
namespace {

using Json = nlohmann::ordered_json;

Json SizeJson(const Size& size, bool has_cuda) {
  Json json = {{"parameters", size.num_parameters},
               {"disk_bytes", size.on_disk},
               {"cpu_bytes", size.on_cpu}};
  json["cuda_bytes"] = has_cuda ? Json(size.on_cuda) : Json(nullptr);
  return json;
}

Json SizesJson(const ModelSizes& sizes) {
  Json parts = Json::object();
  for (const auto& [part, size] : sizes.parts) {
    parts[std::string(PartName(part))] = SizeJson(size, !sizes.has_float32_matrices);
  }
  return {{"parts", parts}, {"total", SizeJson(sizes.total(), !sizes.has_float32_matrices)}};
}

Json ShapeJson(const ModelConfig& c) {
  return {{"layers", c.num_layers},
          {"hidden_size", c.hidden_size},
          {"heads", c.num_heads},
          {"kv_heads", c.num_kv_heads},
          {"head_dim", c.head_dim},
          {"vocab_size", c.vocab_size},
          {"max_position_embeddings", c.max_position_embeddings},
          {"experts", c.num_experts},
          {"experts_per_token", c.num_experts_per_token},
          {"shared_experts", c.num_shared_experts}};
}

Json LayersJson(const std::vector<LayerRange>& ranges) {
  Json layers = Json::array();
  for (const LayerRange& range : ranges) {
    layers.push_back({{"first", range.first},
                      {"last", range.last},
                      {"attention", range.attention},
                      {"mlp", range.mlp},
                      {"experts", range.num_experts}});
    if (!range.shared_experts.empty()) layers.back()["shared_experts"] = range.shared_experts;
  }
  return layers;
}

Json FilesJson(const Report& report) {
  const Layout& layout = report.opened->layout;
  Json files = Json::array();
  for (const FileFacts& file : report.files) {
    files.push_back(
        {{"path", file.path}, {"bytes", file.num_bytes}, {"tensors", file.num_tensors}});
  }
  Json skipped = Json::array();
  for (const SkippedTensors::Count& count : report.skipped.counts) {
    skipped.push_back({{"reason", SkipReasonName(count.reason)},
                       {"tensors", count.num_tensors},
                       {"bytes", count.num_bytes}});
  }
  const Json orientation = report.all_matrices_are_quantized() ? Json(nullptr)
                           : layout.is_out_in                  ? Json("out_in")
                                                               : Json("in_out");
  return {{"files", files},
          {"presharded_for", report.opened->is_presharded() ? report.opened->sets.size() : 0},
          {"prefix", layout.prefix},
          {"fused_qkv", layout.has_fused_qkv},
          {"fused_gate_up", layout.has_fused_gate_up},
          {"orientation", orientation},
          {"skipped", skipped}};
}

Json CorrelationsJson(const KOrderCorrelations& c) {
  return {{"mma64", c.mma64}, {"natural", c.natural}, {"values", c.num_values}};
}

Json KOrderJson(const KOrderEvidence& k) {
  return {{"verdict", k.Decide() == formats::KOrder::kMma64 ? "mma64" : "natural"},
          {"neurons", CorrelationsJson(k.neurons)},
          {"hidden_dimensions", CorrelationsJson(k.hidden)},
          {"experts", k.num_experts},
          {"layers", k.num_layers},
          {"conclusive", k.is_conclusive()},
          {"contradictory", k.contradicts_itself()}};
}

Json FitJson(const FitOptions& options, const Fit& fit) {
  return {{"device", options.on_cpu ? "cpu" : "cuda"},
          {"allowed_bytes", fit.allowed},
          {"weight_bytes", fit.weights},
          {"step_bytes", fit.activations},
          {"kv_bytes", fit.kv_bytes},
          {"kv_bytes_per_token", fit.kv_bytes_per_token},
          {"kv_tokens", fit.kv_tokens},
          {"max_model_len", options.max_model_len},
          {"fits", fit.fits},
          {"smallest_fitting_tensor_parallel_size", fit.smallest_fitting_tp}};
}

}  // namespace

std::string ToJson(const Report& report) {
  Json json = {{"model", report.dir},
               {"architecture", report.config.architecture},
               {"shape", ShapeJson(report.config)},
               {"head_is_tied", report.head_is_tied},
               {"active_parameters", report.active_parameters},
               {"layers", LayersJson(report.layers)},
               {"sizes", SizesJson(report.sizes)}};
  json["checkpoint"] = report.opened ? FilesJson(report) : Json(nullptr);
  json["k_order"] = report.k_order ? KOrderJson(*report.k_order) : Json(nullptr);
  json["rank"] = SizesJson(report.rank_sizes);
  json["rank"]["tensor_parallel_size"] = report.tensor_parallel_size;
  json["memory"] = report.fit ? FitJson(*report.fit_options, *report.fit) : Json(nullptr);
  json["problems"] = report.problems;
  json["verified"] = nullptr;
  if (report.verified) {
    json["verified"] = {{"tensors", report.verified->num_tensors},
                        {"bytes", report.verified->num_bytes},
                        {"problems", report.verified->problems}};
  }
  json["whole"] = report.is_whole();
  // Names in a file may be any bytes.
  return json.dump(2, ' ', false, Json::error_handler_t::replace) + "\n";
}

}  // namespace wintserve::inspect
