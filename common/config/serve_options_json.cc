#include "common/config/serve_options_json.h"

#include <fmt/format.h>

#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

namespace wintserve {
namespace {

// The one list of fields; both directions walk it.
template <typename Options, typename Visit>
void VisitFields(Options& options, Visit&& visit) {
  visit("model", options.model);
  visit("tokenizer", options.tokenizer);
  visit("served_model_name", options.served_model_name);
  visit("strict_model_name", options.strict_model_name);
  visit("k_order", options.k_order);
  visit("load_format", options.load_format);
  visit("dummy_router_skew", options.dummy_router_skew);
  visit("host", options.host);
  visit("port", options.port);
  visit("metrics_port", options.metrics_port);
  visit("engine_worker_queue_port", options.engine_worker_queue_port);
  visit("cache_queue_port", options.cache_queue_port);
  visit("queue_host", options.queue_host);
  visit("queue_tls_cert", options.queue_tls_cert);
  visit("queue_tls_key", options.queue_tls_key);
  visit("queue_tls_ca", options.queue_tls_ca);
  visit("queue_token_file", options.queue_token_file);
  visit("insecure_bind", options.insecure_bind);
  visit("api_keys", options.api_keys);
  visit("device", options.device);
  visit("tensor_parallel_size", options.tensor_parallel_size);
  visit("cpu_threads", options.cpu_threads);
  visit("max_model_len", options.max_model_len);
  visit("max_num_seqs", options.max_num_seqs);
  visit("max_num_batched_tokens", options.max_num_batched_tokens);
  visit("max_concurrency", options.max_concurrency);
  visit("max_queue_requests", options.max_queue_requests);
  visit("max_queue_tokens", options.max_queue_tokens);
  visit("max_num_seqs_per_user", options.max_num_seqs_per_user);
  visit("max_num_partial_prefills", options.max_num_partial_prefills);
  visit("max_long_partial_prefills", options.max_long_partial_prefills);
  visit("long_prefill_token_threshold", options.long_prefill_token_threshold);
  visit("request_timeout_ms", options.request_timeout_ms);
  visit("enable_prefix_caching", options.enable_prefix_caching);
  visit("enable_chunked_prefill", options.enable_chunked_prefill);
  visit("enable_logprob", options.enable_logprob);
  visit("max_logprobs", options.max_logprobs);
  visit("async_depth", options.async_depth);
  visit("cache_isolation", options.cache_isolation);
  visit("client_stall_timeout_ms", options.client_stall_timeout_ms);
  visit("use_cudagraph", options.use_cudagraph);
  visit("block_size", options.block_size);
  visit("kv_cache_dtype", options.kv_cache_dtype);
  visit("gpu_memory_utilization", options.gpu_memory_utilization);
  visit("num_gpu_blocks_override", options.num_gpu_blocks_override);
  visit("swap_space_gib", options.swap_space_gib);
  visit("role", options.role);
  visit("runtime_dir", options.runtime_dir);
  visit("log_level", options.log_level);
  visit("log_dir", options.log_dir);
  visit("drain_timeout_ms", options.drain_timeout_ms);
  visit("orphan_timeout_ms", options.orphan_timeout_ms);
  visit("stall_timeout_ms", options.stall_timeout_ms);
  visit("fault_hold_ms", options.fault_hold_ms);
}

template <typename T>
nlohmann::json FieldToJson(const T& value) {
  return value;
}
template <typename T>
nlohmann::json FieldToJson(const std::optional<T>& value) {
  return value.has_value() ? nlohmann::json(*value) : nlohmann::json(nullptr);
}

bool HasTypeOf(const nlohmann::json& json, const std::string&) { return json.is_string(); }
bool HasTypeOf(const nlohmann::json& json, bool) { return json.is_boolean(); }
bool HasTypeOf(const nlohmann::json& json, int) { return json.is_number_integer(); }
bool HasTypeOf(const nlohmann::json& json, int64_t) { return json.is_number_integer(); }
bool HasTypeOf(const nlohmann::json& json, double) { return json.is_number(); }
bool HasTypeOf(const nlohmann::json& json, const std::vector<std::string>&) {
  if (!json.is_array()) return false;
  for (const auto& element : json) {
    if (!element.is_string()) return false;
  }
  return true;
}

template <typename T>
bool FieldFromJson(const nlohmann::json& json, T& value) {
  if (!HasTypeOf(json, value)) return false;
  value = json.get<T>();
  return true;
}
template <typename T>
bool FieldFromJson(const nlohmann::json& json, std::optional<T>& value) {
  if (json.is_null()) {
    value.reset();
    return true;
  }
  return FieldFromJson(json, value.emplace());
}

}  // namespace

nlohmann::json ServeOptionsToJson(const ServeOptions& options) {
  nlohmann::json json = nlohmann::json::object();
  VisitFields(options,
              [&](const char* name, const auto& value) { json[name] = FieldToJson(value); });
  return json;
}

absl::StatusOr<ServeOptions> ServeOptionsFromJson(const nlohmann::json& json) {
  if (!json.is_object()) return absl::InvalidArgumentError("options: not a JSON object");
  ServeOptions options;
  size_t num_fields = 0;
  std::string problem;
  VisitFields(options, [&](const char* name, auto& value) {
    ++num_fields;
    const auto field = json.find(name);
    if (field == json.end()) {
      problem = fmt::format("options.{}: missing", name);
    } else if (!FieldFromJson(*field, value)) {
      problem = fmt::format("options.{}: wrong type", name);
    }
  });
  if (problem.empty() && json.size() != num_fields) {
    problem = fmt::format("options: {} fields, expected {}", json.size(), num_fields);
  }
  if (!problem.empty()) return absl::InvalidArgumentError(problem);
  return options;
}

std::string EffectiveConfig(const ServeOptions& options) {
  std::string line;
  VisitFields(options, [&](const std::string& name, const auto& value) {
    if (name == "api_keys") {
      line += fmt::format(" api_keys={}", options.api_keys.size());
      return;
    }
    // Only a log line: bytes that are not UTF-8 may be replaced.
    line += fmt::format(
        " {}={}", name,
        FieldToJson(value).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace));
  });
  return line.substr(1);
}

}  // namespace wintserve
