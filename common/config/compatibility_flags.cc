// FastDeploy's flags that set nothing here, in two kinds: unbuilt (accepted; one warning when the
// value asks for something) and refused (ignoring it would serve something else than was asked
// for).
#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "absl/strings/str_split.h"
#include "common/config/flag_builders.h"

namespace wintserve {
namespace {

using Type = FlagType;

constexpr char kUnbuilt[] = "Accepted for compatibility, not in this version (a warning says so)";
constexpr char kRefused[] = "Known, but only the default is served";

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

absl::Status ApplyIps(const FlagValue& value, Draft& draft) {
  const std::vector<std::string> ips = absl::StrSplit(value.text, ',', absl::SkipEmpty());
  if (ips.size() > 1) {
    return absl::InvalidArgumentError(fmt::format(
        "an instance runs on one host; must be one address (got {})", ForErrorLine(value.text)));
  }
  if (!ips.empty()) draft.Note("ips", "an instance runs on one host; ignored");
  return absl::OkStatus();
}

void AddUnbuiltFlags(std::vector<Flag>* flags) {
  const Flag unbuilt[] = {
      Unbuilt("workers", Type::kInteger, "1", "one API server process serves every connection", 1,
              1024),
      Unbuilt("max-waiting-time", Type::kInteger, "-1",
              "--request-timeout bounds the time of a request", -1),
      Unbuilt("timeout", Type::kInteger, "0", "there are no HTTP worker processes to time out", 0),
      Unbuilt("revision", Type::kText, "master", "downloading from a hub is not in this version"),
      Unbuilt("kv-cache-ratio", Type::kNumber, "0.75", "prefill and decode share all KV blocks", 0,
              1),
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
      Unbuilt("load-choices", Type::kText, "default_v1", "there is one loader"),
      Unbuilt("load-strategy", Type::kText, "normal", "there is one loader"),
      Unbuilt("use-warmup", Type::kInteger, "0", "a warm-up pass is not in this version", 0, 1),
      Unbuilt("disable-custom-all-reduce", Type::kSwitch, "", "there is one all-reduce"),
      Unbuilt("enable-early-stop", Type::kSwitch, "", "repetition stop is not in this version"),
      Unbuilt("early-stop-config", Type::kJson, "", "repetition stop is not in this version"),
      Unbuilt("logits-processors", Type::kText, "", "logits processors are not in this version"),
      Unbuilt("lm-head-fp32", Type::kSwitch, "", "logits are always float32"),
      Unbuilt("speculative-config", Type::kJson, "", "speculative decoding is not in this version"),
      Unbuilt("scheduler-ttl", Type::kInteger, "900",
              "--request-timeout bounds the time of a request"),
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
      Refused("logprobs-mode", Type::kText, "raw_logprobs",
              "log-probabilities are those of the model's logits", 0, 0,
              {"raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits"}),
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

}  // namespace

void AddCompatibilityFlags(std::vector<Flag>* flags) {
  AddRefusedFlags(flags);
  AddUnbuiltFlags(flags);
}

}  // namespace wintserve
