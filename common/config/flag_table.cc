// Every flag that FastDeploy's server documents, and the few of our own. Three kinds: built (it
// sets an option), unbuilt (accepted; one warning when the value asks for something), and refused
// (ignoring it would serve something else than was asked for).
#include <arpa/inet.h>
#include <fmt/format.h>

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"
#include "common/config/flag.h"
#include "common/status_macros.h"

namespace wintserve {
namespace {

constexpr char kModel[] = "Model";
constexpr char kListening[] = "Listening";
constexpr char kParallelism[] = "Device and parallelism";
constexpr char kLimits[] = "Limits";
constexpr char kFeatures[] = "Features";
constexpr char kOperation[] = "Operation";
constexpr char kGeneration[] = "Generation";
constexpr char kUnbuilt[] = "Accepted for compatibility, not in this version (a warning says so)";
constexpr char kRefused[] = "Known, but only the default is served";

constexpr double kNoLimit = std::numeric_limits<int64_t>::max();
constexpr int kMaxModelLen = 1 << 20;

ServeOptions& Options(Draft& draft) { return draft.command->options; }

// ---- The three kinds.

Flag Text(const char* name, const char* group, std::string ServeOptions::*field, const char* help,
          std::vector<std::string> choices = {}) {
  Flag flag;
  flag.name = name;
  flag.group = group;
  flag.default_text = ServeOptions().*field;
  flag.help = help;
  flag.choices = std::move(choices);
  flag.apply = [field](const FlagValue& value, Draft& draft) {
    Options(draft).*field = value.text;
    return absl::OkStatus();
  };
  return flag;
}

Flag Integer(const char* name, const char* group, int min, int max, int ServeOptions::*field,
             const char* help) {
  Flag flag;
  flag.name = name;
  flag.group = group;
  flag.type = FlagType::kInteger;
  flag.default_text = fmt::format("{}", ServeOptions().*field);
  flag.help = help;
  flag.min = min;
  flag.max = max;
  flag.apply = [field](const FlagValue& value, Draft& draft) {
    Options(draft).*field = static_cast<int>(value.integer);
    return absl::OkStatus();
  };
  return flag;
}

Flag Switch(const char* name, const char* group, bool ServeOptions::*field, const char* help) {
  Flag flag;
  flag.name = name;
  flag.group = group;
  flag.type = FlagType::kSwitch;
  flag.default_text = ServeOptions().*field ? "true" : "false";
  flag.help = help;
  flag.apply = [field](const FlagValue& value, Draft& draft) {
    Options(draft).*field = value.on;
    return absl::OkStatus();
  };
  return flag;
}

Flag Custom(const char* name, const char* group, FlagType type, std::string default_text,
            const char* help, std::function<absl::Status(const FlagValue&, Draft&)> apply) {
  Flag flag;
  flag.name = name;
  flag.group = group;
  flag.type = type;
  flag.default_text = std::move(default_text);
  flag.help = help;
  flag.apply = std::move(apply);
  return flag;
}

// A value equal to the default asks for nothing.
bool AsksForNothing(const Flag& flag, const FlagValue& value) {
  const absl::StatusOr<FlagValue> standard = ParseFlagValue(flag, flag.default_text);
  if (!standard.ok()) return value.text == flag.default_text;
  switch (flag.type) {
    case FlagType::kSwitch:
      return value.on == standard->on;
    case FlagType::kInteger:
    case FlagType::kNumber:
      return value.number == standard->number;
    default:
      return value.text == standard->text;
  }
}

Flag Unbuilt(const char* name, FlagType type, const char* default_text, const char* why,
             double min = -kNoLimit, double max = kNoLimit, std::vector<std::string> choices = {}) {
  Flag flag;
  flag.name = name;
  flag.group = kUnbuilt;
  flag.type = type;
  flag.default_text = type == FlagType::kSwitch ? "false" : default_text;
  flag.help = why;
  flag.min = min;
  flag.max = max;
  flag.choices = std::move(choices);
  Flag bare = flag;
  flag.apply = [bare, why](const FlagValue& value, Draft& draft) {
    if (!AsksForNothing(bare, value)) draft.Note(bare.name, fmt::format("{}; ignored", why));
    return absl::OkStatus();
  };
  return flag;
}

Flag Refused(const char* name, FlagType type, const char* default_text, const char* why,
             double min = -kNoLimit, double max = kNoLimit, std::vector<std::string> choices = {}) {
  Flag flag = Unbuilt(name, type, default_text, why, min, max, std::move(choices));
  flag.group = kRefused;
  Flag bare = flag;
  flag.apply = [bare, why](const FlagValue& value, Draft&) {
    if (AsksForNothing(bare, value)) return absl::OkStatus();
    return absl::InvalidArgumentError(
        fmt::format("{}{} (got {})", why,
                    bare.default_text.empty() ? "" : fmt::format("; must be {}", bare.default_text),
                    ForErrorLine(value.text)));
  };
  return flag;
}

Flag ServeOnly(Flag flag) {
  flag.serve_only = true;
  return flag;
}
Flag Repeatable(Flag flag) {
  flag.accumulates = true;
  return flag;
}
Flag Bounded(double min, double max, Flag flag) {
  flag.min = min;
  flag.max = max;
  return flag;
}

// ---- What single flags do beyond setting a field.

absl::Status ApplyHost(const FlagValue& value, Draft& draft) {
  const std::string host = value.text == "localhost" ? "127.0.0.1" : value.text;
  in_addr address;
  if (::inet_pton(AF_INET, host.c_str(), &address) != 1) {
    return absl::InvalidArgumentError(
        fmt::format("must be an IPv4 address or localhost (got {})", ForErrorLine(value.text)));
  }
  Options(draft).host = host;
  return absl::OkStatus();
}

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

absl::Status ApplyDrainTimeout(const FlagValue& value, Draft& draft) {
  Options(draft).drain_timeout_ms = std::llround(value.number * 1000);
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
    } else {
      draft.Note("graph-optimization-config",
                 fmt::format("{} has no effect in this version; ignored", ForErrorLine(key)));
    }
  }
  return absl::OkStatus();
}

absl::Status ApplyIps(const FlagValue& value, Draft& draft) {
  const std::vector<std::string> ips = absl::StrSplit(value.text, ',', absl::SkipEmpty());
  if (ips.size() > 1) {
    return absl::InvalidArgumentError(fmt::format(
        "an instance runs on one host; must be one address (got {})", ForErrorLine(value.text)));
  }
  if (!ips.empty()) draft.Note("ips", "an instance runs on one host; ignored");
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
  flags->push_back(ServeOnly(Custom("host", kListening, Type::kText, ServeOptions().host,
                                    "IPv4 address to listen on", ApplyHost)));
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
      "Port of the queue to the engine workers, on 127.0.0.1; 0: a free one")));
  flags->push_back(
      ServeOnly(Integer("cache-queue-port", kListening, 0, 65535, &ServeOptions::cache_queue_port,
                        "Port of the cache manager, on 127.0.0.1; 0: a free one")));
  flags->push_back(ServeOnly(Repeatable(
      Custom("api-key", kListening, Type::kText, "",
             "Key that requests must carry; repeatable; default: FD_API_KEY (comma separated)",
             [](const FlagValue& value, Draft& draft) {
               if (!value.text.empty()) Options(draft).api_keys.push_back(value.text);
               return absl::OkStatus();
             }))));
}

void AddEngineFlags(std::vector<Flag>* flags) {
  flags->push_back(
      Text("device", kParallelism, &ServeOptions::device, "cpu or cuda", {"cpu", "cuda"}));
  flags->push_back(Custom("tensor-parallel-size", kParallelism, Type::kInteger, "1",
                          "Engine workers that share the model: 1, 2 or 4 (also -tp)",
                          [](const FlagValue& value, Draft& draft) {
                            if (value.integer != 1 && value.integer != 2 && value.integer != 4) {
                              return absl::InvalidArgumentError(
                                  fmt::format("must be 1, 2 or 4 (got {})", value.integer));
                            }
                            Options(draft).tensor_parallel_size = static_cast<int>(value.integer);
                            return absl::OkStatus();
                          }));
  flags->back().min = -kNoLimit;
  flags->back().max = kNoLimit;
  flags->push_back(Integer("cpu-threads", kParallelism, 0, 1024, &ServeOptions::cpu_threads,
                           "Threads of one engine worker; 0: cores / workers"));

  flags->push_back(Integer("max-model-len", kLimits, 16, kMaxModelLen, &ServeOptions::max_model_len,
                           "Prompt and output tokens of a request"));
  flags->push_back(Integer("max-num-seqs", kLimits, 1, 256, &ServeOptions::max_num_seqs,
                           "Sequences in one step"));
  flags->push_back(Integer(
      "max-num-batched-tokens", kLimits, 1, kMaxModelLen, &ServeOptions::max_num_batched_tokens,
      "Tokens in one step (one longer prompt runs alone); at least --max-num-seqs"));
  flags->push_back(
      ServeOnly(Integer("max-concurrency", kLimits, 1, 1'000'000, &ServeOptions::max_concurrency,
                        "Open generation requests; beyond: 429")));

  flags->push_back(
      Switch("use-cudagraph", kFeatures, &ServeOptions::use_cudagraph, "CUDA graphs (cuda only)"));
  flags->push_back(Custom("graph-optimization-config", kFeatures, Type::kJson, "",
                          R"(FastDeploy's spelling: {"use_cudagraph": true})",
                          ApplyGraphOptimization));
  flags->push_back(
      Custom("block-size", kFeatures, Type::kInteger, "64",
             "Tokens of a KV block; 64 is the only size", [](const FlagValue& value, Draft&) {
               if (value.integer == 64) return absl::OkStatus();
               return absl::InvalidArgumentError(fmt::format("must be 64 (got {})", value.integer));
             }));
  flags->back().min = -kNoLimit;
  flags->back().max = kNoLimit;
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
  flags->push_back(Text("log-level", kOperation, &ServeOptions::log_level,
                        "debug, info, warning or error; debug shows prompts",
                        {"debug", "info", "warning", "error"}));
  // Before --drain-timeout, which wins when both are given.
  flags->push_back(
      ServeOnly(Bounded(0, 86'400,
                        Custom("timeout-graceful-shutdown", kOperation, Type::kInteger, "0",
                               "FastDeploy's name of --drain-timeout; 0: leaves it as it is",
                               [](const FlagValue& value, Draft& draft) {
                                 if (value.integer == 0) return absl::OkStatus();
                                 return ApplyDrainTimeout(value, draft);
                               }))));
  flags->push_back(ServeOnly(Bounded(
      0, 86'400,
      Custom("drain-timeout", kOperation, Type::kNumber,
             fmt::format("{}", ServeOptions().drain_timeout_ms / 1000),
             "Seconds that open requests may take to finish on SIGTERM", ApplyDrainTimeout))));
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

void AddUnbuiltFlags(std::vector<Flag>* flags) {
  const Flag unbuilt[] = {
      Unbuilt("enable-prefix-caching", Type::kSwitch, "", "prefix caching is not in this version"),
      Unbuilt("enable-chunked-prefill", Type::kSwitch, "",
              "a prompt runs whole in one step in this version"),
      Unbuilt("swap-space", Type::kNumber, "0", "the host cache tier is not in this version", 0,
              1 << 20),
      Unbuilt("workers", Type::kInteger, "1", "one API server process serves every connection", 1,
              1024),
      Unbuilt("max-waiting-time", Type::kInteger, "-1", "a request waits until it is served", -1),
      Unbuilt("timeout", Type::kInteger, "0", "there are no HTTP worker processes to time out", 0),
      Unbuilt("revision", Type::kText, "master", "downloading from a hub is not in this version"),
      Unbuilt("gpu-memory-utilization", Type::kNumber, "0.9", "there is no GPU on --device cpu", 0,
              1),
      Unbuilt("kv-cache-ratio", Type::kNumber, "0.75", "prefill and decode share all KV blocks", 0,
              1),
      Unbuilt("max-num-partial-prefills", Type::kInteger, "1",
              "a limit of its own for prefills is not in this version", 1),
      Unbuilt("max-long-partial-prefills", Type::kInteger, "1",
              "a limit of its own for long prefills is not in this version", 1),
      Unbuilt("long-prefill-token-threshold", Type::kInteger, "0",
              "a limit of its own for long prefills is not in this version", 0),
      Unbuilt("static-decode-blocks", Type::kInteger, "2", "KV blocks are allocated when needed",
              0),
      Unbuilt("prealloc-dec-block-slot-num-threshold", Type::kInteger, "12",
              "KV blocks are allocated when needed", 0),
      Unbuilt("guided-decoding-backend", Type::kText, "off",
              "guided decoding is not in this version", 0, 0,
              {"off", "auto", "xgrammar", "guidance"}),
      Unbuilt("guided-decoding-disable-any-whitespace", Type::kText, "False",
              "guided decoding is not in this version"),
      Unbuilt("reasoning-parser", Type::kText, "", "reasoning stays in the content"),
      Unbuilt("tool-call-parser", Type::kText, "", "tool calls stay in the content"),
      Unbuilt("tool-parser-plugin", Type::kText, "", "tool calls stay in the content"),
      Unbuilt("enable-logprob", Type::kSwitch, "", "log-probabilities are not in this version"),
      Unbuilt("max-logprobs", Type::kInteger, "20", "log-probabilities are not in this version",
              -1),
      Unbuilt("logprobs-mode", Type::kText, "raw_logprobs",
              "log-probabilities are not in this version", 0, 0,
              {"raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits"}),
      Unbuilt("load-choices", Type::kText, "default_v1", "there is one loader"),
      Unbuilt("load-strategy", Type::kText, "normal", "there is one loader"),
      Unbuilt("use-warmup", Type::kInteger, "0", "a warm-up pass is not in this version", 0, 1),
      Unbuilt("disable-custom-all-reduce", Type::kSwitch, "", "there is one all-reduce"),
      Unbuilt("enable-early-stop", Type::kSwitch, "", "repetition stop is not in this version"),
      Unbuilt("early-stop-config", Type::kJson, "", "repetition stop is not in this version"),
      Unbuilt("logits-processors", Type::kText, "", "logits processors are not in this version"),
      Unbuilt("lm-head-fp32", Type::kSwitch, "", "logits are always float32"),
      Unbuilt("speculative-config", Type::kJson, "", "speculative decoding is not in this version"),
      Unbuilt("scheduler-max-size", Type::kInteger, "-1", "--max-concurrency bounds the queue"),
      Unbuilt("scheduler-ttl", Type::kInteger, "900", "a request waits until it is served"),
      Unbuilt("controller-port", Type::kInteger, "-1", "there is no control listener", -1, 65535),
      Unbuilt("enable-output-caching", Type::kSwitch, "",
              "a cache of outputs is not in this version"),
      Unbuilt("enable-mm", Type::kSwitch, "", "multimodal input is not in this version"),
      Unbuilt("limit-mm-per-prompt", Type::kJson, "", "multimodal input is not in this version"),
      Unbuilt("mm-processor-kwargs", Type::kJson, "", "multimodal input is not in this version"),
      Unbuilt("max-encoder-cache", Type::kInteger, "-1", "multimodal input is not in this version"),
      Unbuilt("max-processor-cache", Type::kNumber, "-1",
              "multimodal input is not in this version"),
      Unbuilt("disable-chunked-mm-input", Type::kSwitch, "",
              "multimodal input is not in this version"),
      Unbuilt("tokenizer-base-url", Type::kText, "", "the tokenizer is part of the API server"),
      Unbuilt("enable-eplb", Type::kSwitch, "", "expert parallelism is not in this version"),
      Unbuilt("eplb-config", Type::kJson, "", "expert parallelism is not in this version"),
      Unbuilt("use-internode-ll-two-stage", Type::kSwitch, "",
              "expert parallelism is not in this version"),
      Unbuilt("disable-sequence-parallel-moe", Type::kSwitch, "",
              "sequence parallelism is not in this version"),
      Unbuilt("dynamic-load-weight", Type::kSwitch, "", "weights are loaded once"),
      Unbuilt("cache-transfer-protocol", Type::kText, "ipc",
              "prefill and decode run in one instance"),
      Unbuilt("pd-comm-port", Type::kText, "", "prefill and decode run in one instance"),
      Unbuilt("rdma-comm-ports", Type::kText, "", "prefill and decode run in one instance"),
      Unbuilt("router", Type::kText, "", "registering at a router is not in this version"),
      Unbuilt("scheduler-host", Type::kText, "127.0.0.1", "the scheduler is local"),
      Unbuilt("scheduler-port", Type::kInteger, "6379", "the scheduler is local", 0, 65535),
      Unbuilt("scheduler-db", Type::kInteger, "0", "the scheduler is local"),
      Unbuilt("scheduler-password", Type::kText, "", "the scheduler is local"),
      Unbuilt("scheduler-topic", Type::kText, "default", "the scheduler is local"),
      Unbuilt("scheduler-min-load-score", Type::kNumber, "3", "the scheduler is local"),
      Unbuilt("scheduler-load-shards-num", Type::kInteger, "1", "the scheduler is local"),
      Unbuilt("scheduler-sync-period", Type::kInteger, "5", "the scheduler is local"),
      Unbuilt("scheduler-expire-period", Type::kInteger, "3000", "the scheduler is local"),
      Unbuilt("scheduler-release-load-expire-period", Type::kInteger, "600",
              "the scheduler is local"),
      Unbuilt("scheduler-reader-parallel", Type::kInteger, "4", "the scheduler is local"),
      Unbuilt("scheduler-writer-parallel", Type::kInteger, "4", "the scheduler is local"),
      Unbuilt("scheduler-reader-batch-size", Type::kInteger, "200", "the scheduler is local"),
      Unbuilt("scheduler-writer-batch-size", Type::kInteger, "200", "the scheduler is local"),
      ServeOnly(Unbuilt("seed", Type::kInteger, "0", "each request brings its own seed")),
  };
  flags->insert(flags->end(), std::begin(unbuilt), std::end(unbuilt));
  flags->push_back(
      Custom("ips", kUnbuilt, Type::kText, "", "an instance runs on one host", ApplyIps));
}

void AddRefusedFlags(std::vector<Flag>* flags) {
  const Flag refused[] = {
      Refused("chat-template", Type::kText, "", "templates of your own are not in this version"),
      Refused("scheduler-name", Type::kText, "local", "the scheduler is local"),
      Refused("data-parallel-size", Type::kInteger, "1",
              "data parallelism is not in this version: start several instances", 1),
      Refused("local-data-parallel-id", Type::kInteger, "0",
              "data parallelism is not in this version: start several instances", 0),
      Refused("enable-expert-parallel", Type::kSwitch, "",
              "expert parallelism is not in this version"),
      Refused("splitwise-role", Type::kText, "mixed", "prefill and decode run in one instance", 0,
              0, {"mixed", "prefill", "decode"}),
      Refused("enable-mm-output", Type::kSwitch, "", "multimodal output is not in this version"),
      Refused("model-config-name", Type::kText, "config.json",
              "another configuration file is not in this version"),
      Refused("task", Type::kText, "generate", "models generate text only"),
      Refused("runner", Type::kText, "auto", "models generate text only"),
      Refused("convert", Type::kText, "auto", "models generate text only"),
      Refused("override-pooler-config", Type::kJson, "", "models generate text only"),
      Refused("plas-attention-config", Type::kJson, "", "attention is exact"),
  };
  flags->insert(flags->end(), std::begin(refused), std::end(refused));
}

std::vector<Flag> BuildTable() {
  std::vector<Flag> flags;
  AddGenerationFlags(&flags);
  AddModelFlags(&flags);
  AddListeningFlags(&flags);
  AddEngineFlags(&flags);
  AddOperationFlags(&flags);
  AddRefusedFlags(&flags);
  AddUnbuiltFlags(&flags);
  return flags;
}

}  // namespace

const std::vector<Flag>& FlagTable() {
  static const auto* const kTable = new std::vector<Flag>(BuildTable());
  return *kTable;
}

}  // namespace wintserve
