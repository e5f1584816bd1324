// The flags that set something, by group. Those of FastDeploy that set nothing here are in
// compatibility_flags.cc.
#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"
#include "common/config/flag_builders.h"

namespace wintserve {
namespace {

constexpr char kModel[] = "Model";
constexpr char kListening[] = "Listening";
constexpr char kParallelism[] = "Device and parallelism";
constexpr char kLimits[] = "Limits";
constexpr char kFeatures[] = "Features";
constexpr char kOperation[] = "Operation";
constexpr char kGeneration[] = "Generation";

constexpr int kMaxModelLen = 1 << 20;
constexpr int kMaxNumSeqs = 256;
constexpr double kMaxTimeoutSeconds = 86'400;

// ---- What single flags do beyond setting a field.

absl::Status ApplyServedModelName(const FlagValue& value, Draft& draft) {
  std::vector<std::string> names;
  for (const absl::string_view name : absl::StrSplit(value.text, ',')) {
    names.emplace_back(absl::StripAsciiWhitespace(name));
    if (names.back().empty()) {
      return absl::InvalidArgumentError(fmt::format(
          "must be a name, or names separated by commas (got {})", ForErrorLine(value.text)));
    }
  }
  Options(draft).served_model_name = std::move(names);
  return absl::OkStatus();
}

absl::Status ApplyQuantization(const FlagValue& value, Draft&) {
  std::string wanted = value.text;
  const auto json = nlohmann::json::parse(value.text, nullptr, /*allow_exceptions=*/false);
  if (json.is_object() && json.size() == 1 && json.contains("quantization") &&
      json["quantization"].is_string()) {
    wanted = json["quantization"].get<std::string>();
  }
  if (wanted == "wint2") return absl::OkStatus();
  return absl::InvalidArgumentError(fmt::format(
      "the checkpoint decides; must be wint2 or not given (got {})", ForErrorLine(value.text)));
}

absl::Status ApplyGraphOptimization(const FlagValue& value, Draft& draft) {
  const nlohmann::json json = nlohmann::json::parse(value.text);
  for (const auto& [key, setting] : json.items()) {
    if (key == "use_cudagraph") {
      if (!setting.is_boolean()) {
        return absl::InvalidArgumentError("use_cudagraph: must be true or false");
      }
      Options(draft).use_cudagraph = setting.get<bool>();
      draft.given.insert("use-cudagraph");
    } else {
      draft.Note("graph-optimization-config",
                 fmt::format("{} has no effect in this version; ignored", ForErrorLine(key)));
    }
  }
  return absl::OkStatus();
}

// ---- The table, by group.

using Type = FlagType;

void AddModelFlags(std::vector<Flag>* flags) {
  flags->push_back(Text("model", kModel, &ServeOptions::model, "Directory of the checkpoint"));
  flags->push_back(Text("tokenizer", kModel, &ServeOptions::tokenizer,
                        "Directory of the tokenizer; default: the model's"));
  flags->push_back(Text("k-order", kModel, &ServeOptions::k_order,
                        "Row order of the 2-bit tensors: auto, mma64 or natural",
                        {"auto", "mma64", "natural"}));
  flags->push_back(
      Text("load-format", kModel, &ServeOptions::load_format,
           "auto: the checkpoint's files; dummy: weights made from the config alone, to "
           "measure speed and memory",
           {"auto", "dummy"}));
  flags->push_back(
      Number("dummy-router-skew", kModel, 0, 1000, &ServeOptions::dummy_router_skew,
             "Of dummy weights: 0 spreads tokens over all experts, above 10 nearly all take "
             "the same few"));
  flags->push_back(Custom("quantization", kModel, Type::kText, "",
                          "wint2: the only one served, whatever the checkpoint holds",
                          ApplyQuantization));
  flags->push_back(ServeOnly(Custom("served-model-name", kModel, Type::kText, "",
                                    "NAME[,ALIAS...] of the model in the API; default: --model",
                                    ApplyServedModelName)));
  flags->push_back(ServeOnly(Switch("strict-model-name", kModel, &ServeOptions::strict_model_name,
                                    "404 for a request that names another model")));
}

void AddListeningFlags(std::vector<Flag>* flags) {
  flags->push_back(
      ServeOnly(Address("host", kListening, &ServeOptions::host, "IPv4 address to listen on")));
  flags->push_back(ServeOnly(
      Integer("port", kListening, 0, 65535, &ServeOptions::port, "HTTP port; 0: a free one")));
  flags->push_back(ServeOnly(Bounded(
      0, 65535,
      Custom("metrics-port", kListening, Type::kInteger, "", "Port of /metrics; default: on --port",
             [](const FlagValue& value, Draft& draft) {
               Options(draft).metrics_port = static_cast<int>(value.integer);
               return absl::OkStatus();
             }))));
  flags->push_back(ServeOnly(Integer(
      "engine-worker-queue-port", kListening, 0, 65535, &ServeOptions::engine_worker_queue_port,
      "Port of the queue to the engine workers, on --queue-host; 0: a free one")));
  flags->push_back(
      ServeOnly(Integer("cache-queue-port", kListening, 0, 65535, &ServeOptions::cache_queue_port,
                        "Port of the cache manager, on --queue-host; 0: a free one")));
  AddQueueFlags(kListening, flags);
  flags->push_back(ServeOnly(Repeatable(
      Custom("api-key", kListening, Type::kText, "",
             "Key that requests must carry; repeatable; default: FD_API_KEY (comma separated)",
             [](const FlagValue& value, Draft& draft) {
               // A variable that is not set would let everybody in.
               if (value.text.empty()) return absl::InvalidArgumentError("must not be empty");
               Options(draft).api_keys.push_back(value.text);
               return absl::OkStatus();
             }))));
}

void AddParallelismFlags(std::vector<Flag>* flags) {
  flags->push_back(
      Text("device", kParallelism, &ServeOptions::device, "cpu or cuda", {"cpu", "cuda"}));
  flags->push_back(
      Bounded(-kNoLimit, kNoLimit,
              Custom("tensor-parallel-size", kParallelism, Type::kInteger, "1",
                     "Engine workers that share the model: 1, 2 or 4 (also -tp)",
                     [](const FlagValue& value, Draft& draft) {
                       if (value.integer != 1 && value.integer != 2 && value.integer != 4) {
                         return absl::InvalidArgumentError(
                             fmt::format("must be 1, 2 or 4 (got {})", value.integer));
                       }
                       Options(draft).tensor_parallel_size = static_cast<int>(value.integer);
                       return absl::OkStatus();
                     })));
  flags->push_back(Integer("cpu-threads", kParallelism, 0, 1024, &ServeOptions::cpu_threads,
                           "Threads of one engine worker; 0: cores / workers"));
}

void AddLimitFlags(std::vector<Flag>* flags) {
  flags->push_back(Integer("max-model-len", kLimits, 16, kMaxModelLen, &ServeOptions::max_model_len,
                           "Prompt and output tokens of a request"));
  flags->push_back(Integer("max-num-seqs", kLimits, 1, kMaxNumSeqs, &ServeOptions::max_num_seqs,
                           "Sequences in one step"));
  flags->push_back(Integer("max-num-batched-tokens", kLimits, 1, kMaxModelLen,
                           &ServeOptions::max_num_batched_tokens,
                           "Tokens in one step; at least --max-num-seqs"));
  flags->push_back(Integer("max-num-partial-prefills", kLimits, 1, kMaxNumSeqs,
                           &ServeOptions::max_num_partial_prefills,
                           "Prompts that are computed in chunks at the same time"));
  flags->push_back(Integer("max-long-partial-prefills", kLimits, 1, kMaxNumSeqs,
                           &ServeOptions::max_long_partial_prefills,
                           "Long ones among them; at most --max-num-partial-prefills"));
  flags->push_back(Integer("long-prefill-token-threshold", kLimits, 0, kMaxModelLen,
                           &ServeOptions::long_prefill_token_threshold,
                           "Tokens from which a prompt is long; 0: 4% of --max-model-len"));
}

// Limits of what clients may do.
void AddServingLimitFlags(std::vector<Flag>* flags) {
  const size_t first = flags->size();
  flags->push_back(Integer("max-concurrency", kLimits, 1, 1'000'000, &ServeOptions::max_concurrency,
                           "Open generation requests; beyond: 429"));
  // Before --max-queue-requests, which wins when both are given.
  flags->push_back(Bounded(-kNoLimit, 1'000'000,
                           Custom("scheduler-max-size", kLimits, Type::kInteger, "-1",
                                  "FastDeploy's name of --max-queue-requests; 0 or less: no limit",
                                  [](const FlagValue& value, Draft& draft) {
                                    Options(draft).max_queue_requests =
                                        static_cast<int>(std::max<int64_t>(0, value.integer));
                                    return absl::OkStatus();
                                  })));
  flags->push_back(Integer("max-queue-requests", kLimits, 0, 1'000'000,
                           &ServeOptions::max_queue_requests,
                           "Choices of requests that may wait; beyond: 429; 0: no limit"));
  flags->push_back(Integer("max-queue-tokens", kLimits, 0, int64_t{1} << 40,
                           &ServeOptions::max_queue_tokens,
                           "Prompt tokens of waiting requests; beyond: 429; 0: no limit"));
  flags->push_back(Integer(
      "max-num-seqs-per-user", kLimits, 0, kMaxNumSeqs, &ServeOptions::max_num_seqs_per_user,
      "Sequences in one step of one API key (no keys: of one \"user\"); 0: no limit"));
  flags->push_back(Seconds("request-timeout", kLimits, 0, kMaxTimeoutSeconds,
                           &ServeOptions::request_timeout_ms,
                           "Seconds: longest \"timeout\" of a request, and its default; 0: none"));
  flags->push_back(Seconds("client-stall-timeout", kLimits, 0.1, kMaxTimeoutSeconds,
                           &ServeOptions::client_stall_timeout_ms,
                           "Seconds after which an answer that nobody reads is given up"));
  for (size_t i = first; i < flags->size(); ++i) (*flags)[i].serve_only = true;
}

absl::Status ApplyMaxLogprobs(const FlagValue& value, Draft& draft) {
  constexpr int kMost = 20;
  if (value.integer > kMost) {
    draft.Note("max-logprobs", fmt::format("at most {} are given; taken as {}", kMost, kMost));
  }
  const bool is_less = value.integer >= 0 && value.integer < kMost;
  Options(draft).max_logprobs = is_less ? static_cast<int>(value.integer) : kMost;
  return absl::OkStatus();
}

void AddFeatureFlags(std::vector<Flag>* flags) {
  flags->push_back(Switch("enable-prefix-caching", kFeatures, &ServeOptions::enable_prefix_caching,
                          "Prompts that begin alike share the KV blocks of that"));
  flags->push_back(ServeOnly(Text("cache-isolation", kFeatures, &ServeOptions::cache_isolation,
                                  "none, or key: prompts of different API keys share nothing",
                                  {"none", "key"})));
  flags->push_back(
      Number("swap-space", kFeatures, 0, 1 << 20, &ServeOptions::swap_space_gib,
             "GiB of host memory for cached KV blocks; of use when larger than the pool"));
  flags->push_back(Switch("enable-chunked-prefill", kFeatures,
                          &ServeOptions::enable_chunked_prefill,
                          "Long prompts run in pieces beside the decodes"));
  flags->push_back(ServeOnly(Switch("enable-logprob", kFeatures, &ServeOptions::enable_logprob,
                                    "Requests may ask for log-probabilities")));
  flags->push_back(ServeOnly(Bounded(
      -1, 1 << 24,
      Custom("max-logprobs", kFeatures, Type::kInteger, "20",
             "Most log-probabilities for a token that a request may ask for, at most 20; -1: 20",
             ApplyMaxLogprobs))));
  flags->push_back(Integer("async-depth", kFeatures, 0, 1, &ServeOptions::async_depth,
                           "Steps planned ahead of the one that runs; 0: strictly one by one"));
  flags->push_back(
      Switch("use-cudagraph", kFeatures, &ServeOptions::use_cudagraph,
             "Decode steps as CUDA graphs; --device cuda only, where it is the default"));
  flags->push_back(Custom("graph-optimization-config", kFeatures, Type::kJson, "",
                          R"(FastDeploy's spelling: {"use_cudagraph": true})",
                          ApplyGraphOptimization));
  flags->push_back(Bounded(
      -kNoLimit, kNoLimit,
      Custom("block-size", kFeatures, Type::kInteger, "64",
             "Tokens of a KV block; 64 is the only size", [](const FlagValue& value, Draft&) {
               if (value.integer == 64) return absl::OkStatus();
               return absl::InvalidArgumentError(fmt::format("must be 64 (got {})", value.integer));
             })));
  flags->push_back(Text("kv-cache-dtype", kFeatures, &ServeOptions::kv_cache_dtype,
                        "Keys and values on a GPU: bfloat16 (auto), or int8 with a scale a token",
                        {"auto", "bfloat16", "int8"}));
  flags->push_back(
      Number("gpu-memory-utilization", kFeatures, 0, 1, &ServeOptions::gpu_memory_utilization,
             "Share of a GPU's memory that weights, activations and KV blocks may take"));
  flags->push_back(Bounded(1, 1 << 24,
                           Custom("num-gpu-blocks-override", kFeatures, Type::kInteger, "",
                                  "KV blocks of the pool; default: sized from the memory",
                                  [](const FlagValue& value, Draft& draft) {
                                    Options(draft).num_gpu_blocks_override =
                                        static_cast<int>(value.integer);
                                    return absl::OkStatus();
                                  })));
}

void AddOperationFlags(std::vector<Flag>* flags) {
  flags->push_back(ServeOnly(
      Text("role", kOperation, &ServeOptions::role,
           "all; or of an instance in two containers: api (the API server), engine (the others)",
           {"all", "api", "engine"})));
  flags->push_back(
      ServeOnly(Text("runtime-dir", kOperation, &ServeOptions::runtime_dir,
                     "Directory that the launchers of --role api and --role engine share")));
  flags->push_back(Text("log-level", kOperation, &ServeOptions::log_level,
                        "debug, info, warning or error; debug shows prompts",
                        {"debug", "info", "warning", "error"}));
  flags->push_back(ServeOnly(
      Text("log-dir", kOperation, &ServeOptions::log_dir,
           "Directory of a log file for each process; default: FD_LOG_DIR; none: stderr only")));
  // Before --drain-timeout, which wins when both are given.
  flags->push_back(
      ServeOnly(Bounded(0, kMaxTimeoutSeconds,
                        Custom("timeout-graceful-shutdown", kOperation, Type::kInteger, "0",
                               "FastDeploy's name of --drain-timeout; 0: leaves it as it is",
                               [](const FlagValue& value, Draft& draft) {
                                 if (value.integer != 0)
                                   Options(draft).drain_timeout_ms = value.integer * 1000;
                                 return absl::OkStatus();
                               }))));
  flags->push_back(ServeOnly(Seconds("drain-timeout", kOperation, 0, kMaxTimeoutSeconds,
                                     &ServeOptions::drain_timeout_ms,
                                     "Seconds that open requests may take to finish on SIGTERM")));
  flags->push_back(ServeOnly(
      Seconds("orphan-timeout", kOperation, 1, kMaxTimeoutSeconds, &ServeOptions::orphan_timeout_ms,
              "Seconds that engine workers keep their weights without an API server")));
  flags->push_back(Seconds("stall-timeout", kOperation, 0, kMaxTimeoutSeconds,
                           &ServeOptions::stall_timeout_ms,
                           "Seconds without progress after which an engine worker that loads or "
                           "warms up is replaced; 0: never"));
  flags->push_back(ServeOnly(
      Seconds("fault-hold", kOperation, 0, kMaxTimeoutSeconds, &ServeOptions::fault_hold_ms,
              "Seconds that requests wait for a lost engine worker; then 503")));
}

void AddGenerationFlags(std::vector<Flag>* flags) {
  const size_t first = flags->size();
  auto add = [&](const char* name, Type type, const char* help, auto set) {
    flags->push_back(Custom(name, kGeneration, type, type == Type::kSwitch ? "false" : "", help,
                            [set](const FlagValue& value, Draft& draft) {
                              set(value, draft.command->generate);
                              return absl::OkStatus();
                            }));
    return &flags->back();
  };
  using Value = const FlagValue&;
  using Generate = GenerateOptions&;
  add("prompt", Type::kText, "The text to answer; taken as one user message unless --raw",
      [](Value value, Generate generate) { generate.prompt = value.text; });
  add("raw", Type::kSwitch, "Continue --prompt as it is, without the chat template",
      [](Value value, Generate generate) { generate.raw = value.on; });
  Flag* flag = add("temperature", Type::kNumber, "0: greedy; default: the model's",
                   [](Value value, Generate generate) { generate.temperature = value.number; });
  flag->max = 2;
  flag = add("top-p", Type::kNumber, "0: greedy; default: the model's",
             [](Value value, Generate generate) { generate.top_p = value.number; });
  flag->max = 1;
  flag = add(
      "top-k", Type::kInteger, "Sample among the k likeliest tokens; 0 or -1: off",
      [](Value value, Generate generate) { generate.top_k = std::max<int64_t>(0, value.integer); });
  flag->min = -1;
  flag->max = 1 << 24;
  flag =
      add("max-tokens", Type::kInteger, "Tokens to generate; default: what the model length leaves",
          [](Value value, Generate generate) { generate.max_tokens = value.integer; });
  flag->min = 1;
  flag->max = kMaxModelLen;
  flag = add("seed", Type::kInteger, "Same seed, same text; default: a random one",
             [](Value value, Generate generate) { generate.seed = value.integer; });
  flag->min = -kNoLimit;
  flag->max = kNoLimit;
  flag = add("stop", Type::kText, "Text that ends the answer and is not shown; repeatable",
             [](Value value, Generate generate) { generate.stop.push_back(value.text); });
  flag->accumulates = true;
  add("print-ids", Type::kSwitch, "Print token ids instead of text",
      [](Value value, Generate generate) { generate.print_ids = value.on; });
  for (size_t i = first; i < flags->size(); ++i) (*flags)[i].generate_only = true;
}

std::vector<Flag> BuildTable() {
  std::vector<Flag> flags;
  AddGenerationFlags(&flags);
  AddModelFlags(&flags);
  AddListeningFlags(&flags);
  AddParallelismFlags(&flags);
  AddLimitFlags(&flags);
  AddServingLimitFlags(&flags);
  AddFeatureFlags(&flags);
  AddOperationFlags(&flags);
  AddCompatibilityFlags(&flags);
  return flags;
}

}  // namespace

const std::vector<Flag>& FlagTable() {
  static const auto* const kTable = new std::vector<Flag>(BuildTable());
  return *kTable;
}

}  // namespace wintserve
