// A validated request of /v1/chat/completions or /v1/completions. Both are the same struct: they
// differ in where the prompt comes from and in the shape of the answer.
#pragma once

#include <cstdint>
#include <map>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "absl/status/statusor.h"
#include "api_server/llm/llm.h"

namespace wintserve {

enum class Endpoint { kChat, kCompletions };

using TokenIds = std::vector<int32_t>;
using ChatMessages = std::vector<ChatMessage>;
// What one prompt is made of: messages to render, text to encode, or ids to take as they are.
using PromptSource = std::variant<ChatMessages, std::string, TokenIds>;

inline constexpr int kMaxChoicesPerPrompt = 128;    // n
inline constexpr int kMaxChoicesPerRequest = 1024;  // prompts * n
// Log-probabilities of prompt tokens in one answer, which holds all of them at once: of a prompt of
// 49,932 tokens with 20 of the most probable ones each.
inline constexpr int64_t kMaxPromptLogprobs = int64_t{1} << 20;
inline constexpr int kMaxStopStrings = 16;
inline constexpr int kMaxStopStringBytes = 256;
inline constexpr int kMaxBadWords = 256;
inline constexpr int kMaxStopTokenIds = 256;
inline constexpr int kMaxUserBytes = 1024;  // it is kept once a prompt
inline constexpr int kMaxCacheSaltBytes = 128;
inline constexpr double kMaxTimeoutSeconds = 1e9;  // a longer one is as good as this

struct StreamOptions {
  bool include_usage = false;
  bool continuous_usage_stats = false;
};

struct ApiRequest {
  Endpoint endpoint = Endpoint::kChat;
  std::string model;                  // as sent; empty when absent
  std::vector<PromptSource> prompts;  // chat: exactly one
  // max_completion_tokens when both were sent. At least 1, or with `echo` 0: the prompt alone.
  std::optional<int64_t> max_tokens;
  std::optional<double> temperature;  // absent: the model's default
  std::optional<double> top_p;
  std::optional<int64_t> top_k;
  std::optional<int64_t> seed;
  std::optional<double> min_p;
  std::optional<double> repetition_penalty;  // above 0
  std::optional<double> presence_penalty;
  std::optional<double> frequency_penalty;
  std::map<int32_t, float> logit_bias;  // by token id
  std::vector<std::string> stop;
  bool include_stop_in_output = false;
  // Absent: no log-probabilities. Chat: top_logprobs, 0 with "logprobs": true alone; completions:
  // logprobs.
  std::optional<int> num_top_logprobs;
  std::optional<int> prompt_logprobs;   // most probable tokens for each of the prompt; absent: none
  bool echo = false;                    // completions: the prompt comes before the text
  std::vector<std::string> echo_texts;  // by prompt; see EchoTexts
  int num_choices_per_prompt = 1;       // n
  bool stream = false;
  StreamOptions stream_options;
  std::string user;

  // Echoed tokens have log-probabilities as the others do.
  bool echoes_logprobs() const { return echo && num_top_logprobs.has_value(); }
  bool wants_prompt_logprobs() const { return echoes_logprobs() || prompt_logprobs.has_value(); }

  // Beyond OpenAI's API.
  std::vector<std::string> bad_words;  // each is one token
  TokenIds bad_words_token_ids;
  TokenIds stop_token_ids;
  int64_t min_tokens = 0;  // at most max_tokens
  bool ignore_eos = false;
  int32_t priority = 0;                    // lower comes first
  std::string cache_salt;                  // printable ASCII; prompts share KV under the same one
  std::optional<int64_t> timeout_ms = {};  // at least 1
};

// The optional field "cache_salt" of any body; absent: empty. REQUIRES: body.is_object().
absl::StatusOr<std::string> ParseCacheSalt(const nlohmann::json& body);

// INVALID_ARGUMENT with param and code (api_error.h): see the table in parse_request_test.cc. Token
// ids are checked to be integers of 32 bits here and against the vocabulary in
// MakeGenerationRequests.
absl::StatusOr<ApiRequest> ParseRequest(Endpoint endpoint, std::string_view body);

}  // namespace wintserve
