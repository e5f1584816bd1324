#include "api_server/llm/request_check.h"

#include <fmt/core.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <random>
#include <string>
#include <utility>

#include "common/status_macros.h"

namespace wintserve {
namespace {

constexpr size_t kMaxSaltBytes = 128;

int64_t RandomSeed() {
  std::random_device random;
  return static_cast<int64_t>(uint64_t{random()} << 32 | random());
}

absl::Status CheckPrompt(const std::vector<int32_t>& ids, const RequestLimits& limits) {
  if (ids.empty()) return absl::InvalidArgumentError("the prompt has no tokens");
  if (ids.size() > static_cast<size_t>(limits.max_model_len - 1)) {
    return absl::InvalidArgumentError(
        fmt::format("Input text is too long: {} tokens, at most {} (max_model_len {} leaves room "
                    "for one output token)",
                    ids.size(), limits.max_model_len - 1, limits.max_model_len));
  }
  for (const int32_t id : ids) {
    if (id >= 0 && id < limits.vocab_size) continue;
    return absl::InvalidArgumentError(fmt::format(
        "the prompt holds token id {}, must be from 0 to {}", id, limits.vocab_size - 1));
  }
  return absl::OkStatus();
}

absl::Status CheckSampling(const GenerationRequest& request) {
  // Written so that NaN fails too.
  if (!(request.temperature >= 0) || !std::isfinite(request.temperature)) {
    return absl::InvalidArgumentError(
        fmt::format("temperature is {}, must be at least 0", request.temperature));
  }
  if (!(request.top_p >= 0 && request.top_p <= 1)) {
    return absl::InvalidArgumentError(
        fmt::format("top_p is {}, must be from 0 to 1", request.top_p));
  }
  if (request.top_k < -1) {
    return absl::InvalidArgumentError(
        fmt::format("top_k is {}, must be -1 or more", request.top_k));
  }
  if (!(request.min_p >= 0 && request.min_p <= 1)) {
    return absl::InvalidArgumentError(
        fmt::format("min_p is {}, must be from 0 to 1", request.min_p));
  }
  if (request.num_choices < 1) {
    return absl::InvalidArgumentError(
        fmt::format("n is {}, must be at least 1", request.num_choices));
  }
  return absl::OkStatus();
}

absl::Status CheckWithin(const char* name, float value, float bound) {
  if (std::fabs(value) <= bound) return absl::OkStatus();
  return absl::InvalidArgumentError(
      fmt::format("{} is {}, must be from {} to {}", name, value, -bound, bound));
}

absl::Status CheckPenalties(const GenerationRequest& request) {
  if (!(request.repetition_penalty > 0) || !std::isfinite(request.repetition_penalty)) {
    return absl::InvalidArgumentError(
        fmt::format("repetition_penalty is {}, must be above 0", request.repetition_penalty));
  }
  RETURN_IF_ERROR(CheckWithin("presence_penalty", request.presence_penalty, kMaxAbsPenalty));
  return CheckWithin("frequency_penalty", request.frequency_penalty, kMaxAbsPenalty);
}

absl::Status CheckTokenId(const char* name, int32_t id, const RequestLimits& limits) {
  if (id >= 0 && id < limits.vocab_size) return absl::OkStatus();
  return absl::InvalidArgumentError(
      fmt::format("{} holds token id {}, must be from 0 to {}", name, id, limits.vocab_size - 1));
}

// What becomes of a request's biases and bans, in rising order.
std::vector<TokenBias> BiasesOf(const GenerationRequest& request) {
  std::map<int32_t, float> biases = request.logit_bias;
  for (const int32_t id : request.banned_token_ids) biases[id] = TokenBias::kBanned;
  std::vector<TokenBias> list;
  list.reserve(biases.size());
  for (const auto& [id, bias] : biases) list.push_back({id, bias});
  return list;
}

absl::Status CheckTokens(const GenerationRequest& request, const RequestLimits& limits) {
  for (const auto& [id, bias] : request.logit_bias) {
    RETURN_IF_ERROR(CheckTokenId("logit_bias", id, limits));
    RETURN_IF_ERROR(CheckWithin("logit_bias", bias, kMaxAbsLogitBias));
  }
  for (const int32_t id : request.banned_token_ids) {
    RETURN_IF_ERROR(CheckTokenId("banned_token_ids", id, limits));
  }
  for (const int32_t id : request.stop_token_ids) {
    RETURN_IF_ERROR(CheckTokenId("stop_token_ids", id, limits));
  }
  if (const size_t count = BiasesOf(request).size(); count > kMaxLogitBiases) {
    return absl::InvalidArgumentError(
        fmt::format("{} tokens have a bias or are banned, at most {} may", count, kMaxLogitBiases));
  }
  return absl::OkStatus();
}

absl::Status CheckLogprobs(const GenerationRequest& request, const RequestLimits& limits) {
  for (const std::optional<int>& count :
       {request.num_top_logprobs, request.num_prompt_top_logprobs}) {
    if (!count.has_value()) continue;
    if (limits.max_top_logprobs < 0) {
      return absl::InvalidArgumentError("log-probabilities are switched off on this server");
    }
    if (*count >= 0 && *count <= limits.max_top_logprobs) continue;
    return absl::InvalidArgumentError(fmt::format("{} top log-probabilities, must be from 0 to {}",
                                                  *count, limits.max_top_logprobs));
  }
  return absl::OkStatus();
}

// min_tokens and max_tokens.
absl::Status CheckLength(const GenerationRequest& request, const RequestLimits& limits) {
  if (request.max_tokens.has_value() && *request.max_tokens < 0) {
    return absl::InvalidArgumentError(
        fmt::format("max_tokens is {}, must be at least 0", *request.max_tokens));
  }
  const int room = limits.max_model_len - static_cast<int>(request.prompt_ids.size());
  if (request.max_tokens.has_value()) {
    if (request.min_tokens < 0 || request.min_tokens > *request.max_tokens) {
      return absl::InvalidArgumentError(
          fmt::format("min_tokens is {}, must be from 0 to max_tokens ({})", request.min_tokens,
                      *request.max_tokens));
    }
  }
  if (request.min_tokens < 0 || request.min_tokens > room) {
    return absl::InvalidArgumentError(fmt::format(
        "min_tokens is {}, must be from 0 to {} (max_model_len {} less {} prompt tokens)",
        request.min_tokens, room, limits.max_model_len, request.prompt_ids.size()));
  }
  return absl::OkStatus();
}

absl::Status CheckSalt(const std::string& salt) {
  if (salt.size() > kMaxSaltBytes) {
    return absl::InvalidArgumentError(
        fmt::format("cache_salt has {} bytes, must have at most {}", salt.size(), kMaxSaltBytes));
  }
  for (size_t i = 0; i < salt.size(); ++i) {
    if (salt[i] >= ' ' && salt[i] <= '~') continue;
    return absl::InvalidArgumentError(
        fmt::format("cache_salt holds the byte 0x{:02x} at {}, must be printable ASCII",
                    static_cast<uint8_t>(salt[i]), i));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status CheckRequest(const GenerationRequest& request, const RequestLimits& limits) {
  RETURN_IF_ERROR(CheckPrompt(request.prompt_ids, limits));
  RETURN_IF_ERROR(CheckSampling(request));
  RETURN_IF_ERROR(CheckPenalties(request));
  RETURN_IF_ERROR(CheckTokens(request, limits));
  RETURN_IF_ERROR(CheckLogprobs(request, limits));
  RETURN_IF_ERROR(CheckLength(request, limits));
  RETURN_IF_ERROR(CheckSalt(request.cache_salt));
  if (request.timeout_ms.has_value() && *request.timeout_ms < 1) {
    return absl::InvalidArgumentError(
        fmt::format("timeout is {} ms, must be at least 1", *request.timeout_ms));
  }
  return absl::OkStatus();
}

ScheduledRequest ToScheduled(GenerationRequest request, uint64_t id, const RequestLimits& limits,
                             int64_t now_us) {
  const int room = limits.max_model_len - static_cast<int>(request.prompt_ids.size());
  const bool greedy = request.temperature == 0 || request.top_p == 0;
  ScheduledRequest scheduled{.id = id,
                             .prompt_ids = std::move(request.prompt_ids),
                             .num_choices = request.num_choices,
                             // Of none, one is computed and not told: it shows that the prompt is.
                             .max_tokens = std::clamp(request.max_tokens.value_or(room), 1, room),
                             .min_tokens = request.min_tokens,
                             .ignore_eos = request.ignore_eos,
                             .stop_tokens = std::move(request.stop_token_ids),
                             .priority = request.priority,
                             .tenant = std::move(request.tenant),
                             .cache_salt = std::move(request.cache_salt)};
  scheduled.sampling = {.temperature = greedy ? 0.0f : request.temperature,
                        .top_p = greedy ? 1.0f : request.top_p,
                        .top_k = std::max(0, request.top_k),
                        .seed = request.seed.has_value() ? *request.seed : RandomSeed(),
                        .min_p = greedy ? 0.0f : request.min_p,
                        .repetition_penalty = request.repetition_penalty,
                        .presence_penalty = request.presence_penalty,
                        .frequency_penalty = request.frequency_penalty,
                        .logit_biases = BiasesOf(request),
                        .num_top_logprobs = request.num_top_logprobs.value_or(-1),
                        .num_prompt_top_logprobs = request.num_prompt_top_logprobs.value_or(-1)};
  constexpr int64_t kLongestMs = int64_t{1} << 40;  // 35 years; its microseconds fit
  int64_t timeout_ms = request.timeout_ms.value_or(kLongestMs);
  if (limits.max_timeout_ms > 0) timeout_ms = std::min(timeout_ms, limits.max_timeout_ms);
  if (timeout_ms < kLongestMs) {
    scheduled.deadline_us = now_us + timeout_ms * 1000;
    scheduled.timeout_ms = timeout_ms;
  }
  return scheduled;
}

}  // namespace wintserve
