#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>

#include "api_server/openai/api_error.h"
#include "api_server/openai/json_fields.h"
#include "api_server/openai/request.h"
#include "api_server/openai/unsupported_fields.h"
#include "common/status_macros.h"

namespace wintserve {
namespace {

using nlohmann::json;

constexpr int64_t kMinInt64 = std::numeric_limits<int64_t>::min();
constexpr int64_t kMaxInt64 = std::numeric_limits<int64_t>::max();
constexpr int64_t kMinInt32 = std::numeric_limits<int32_t>::min();
constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();

constexpr std::array<std::string_view, 5> kRoles = {"system", "developer", "user", "assistant",
                                                    "tool"};

absl::StatusOr<std::string> ParseTextPart(const json& part, const std::string& param) {
  if (!part.is_object()) {
    return InvalidField(param, fmt::format("must be an object, got {}", Quoted(part)));
  }
  const json* type = FindField(part, "type");
  if (type == nullptr) return MissingField(param + ".type");
  if (*type != "text") {
    return InvalidField(param + ".type", fmt::format("must be \"text\", got {}", Quoted(*type)));
  }
  const json* text = FindField(part, "text");
  if (text == nullptr) return MissingField(param + ".text");
  if (!text->is_string()) {
    return InvalidField(param + ".text", fmt::format("must be a string, got {}", Quoted(*text)));
  }
  return text->get<std::string>();
}

absl::StatusOr<std::string> ParseContent(const json& message, const std::string& message_param) {
  const std::string param = message_param + ".content";
  const json* content = FindField(message, "content");
  if (content == nullptr) {
    if (FindField(message, "tool_calls") != nullptr) return std::string();
    if (!message.contains("content")) return MissingField(param);
    return InvalidField(param,
                        "must be a string or a list of text parts; null is allowed only beside "
                        "tool_calls");
  }
  if (content->is_string()) return content->get<std::string>();
  if (!content->is_array()) {
    return InvalidField(
        param, fmt::format("must be a string or a list of text parts, got {}", Quoted(*content)));
  }
  std::string text;
  for (size_t i = 0; i < content->size(); ++i) {
    ASSIGN_OR_RETURN(const std::string part,
                     ParseTextPart((*content)[i], fmt::format("{}[{}]", param, i)));
    text += part;
  }
  return text;
}

absl::StatusOr<std::string> ParseRole(const json& message, const std::string& message_param) {
  const std::string param = message_param + ".role";
  const json* role = FindField(message, "role");
  if (role == nullptr) return MissingField(param);
  for (const std::string_view known : kRoles) {
    if (*role == known) return std::string(known == "developer" ? "system" : known);
  }
  return InvalidField(
      param, fmt::format("must be one of {}, got {}", fmt::join(kRoles, ", "), Quoted(*role)));
}

absl::StatusOr<ChatMessages> ParseMessages(const json& body) {
  const json* messages = FindField(body, "messages");
  if (messages == nullptr) return MissingField("messages");
  if (!messages->is_array() || messages->empty()) {
    return InvalidField("messages",
                        fmt::format("must be a non-empty list, got {}", Quoted(*messages)));
  }
  ChatMessages parsed;
  for (size_t i = 0; i < messages->size(); ++i) {
    const json& message = (*messages)[i];
    const std::string param = fmt::format("messages[{}]", i);
    if (!message.is_object()) {
      return InvalidField(param, fmt::format("must be an object, got {}", Quoted(message)));
    }
    ChatMessage& chat_message = parsed.emplace_back();
    ASSIGN_OR_RETURN(chat_message.role, ParseRole(message, param));
    ASSIGN_OR_RETURN(chat_message.content, ParseContent(message, param));
  }
  return parsed;
}

absl::StatusOr<TokenIds> ParseTokenIds(const json& list, const std::string& param) {
  TokenIds ids;
  ids.reserve(list.size());
  for (size_t i = 0; i < list.size(); ++i) {
    const std::optional<int64_t> id = AsInteger(list[i]);
    if (!id.has_value() || *id < 0 || *id > kMaxInt32) {
      return InvalidField(
          fmt::format("{}[{}]", param, i),
          fmt::format("must be a token id (all elements of one type), got {}", Quoted(list[i])));
    }
    ids.push_back(static_cast<int32_t>(*id));
  }
  return ids;
}

absl::StatusOr<PromptSource> ParseBatchElement(const json& element, bool expect_text,
                                               const std::string& param) {
  if (expect_text && element.is_string()) return element.get<std::string>();
  if (!expect_text && element.is_array()) return ParseTokenIds(element, param);
  return InvalidField(
      param, fmt::format("must be {} like the first element, got {}",
                         expect_text ? "a string" : "a list of token ids", Quoted(element)));
}

// A string, a list of strings, a list of token ids, or a list of lists of token ids.
absl::StatusOr<std::vector<PromptSource>> ParsePrompts(const json& body) {
  const json* prompt = FindField(body, "prompt");
  if (prompt == nullptr) return MissingField("prompt");
  std::vector<PromptSource> prompts;
  if (prompt->is_string()) {
    prompts.emplace_back(prompt->get<std::string>());
    return prompts;
  }
  if (!prompt->is_array() || prompt->empty()) {
    return InvalidField("prompt", fmt::format("must be a string or a non-empty list of strings, of "
                                              "token ids or of lists of token ids, got {}",
                                              Quoted(*prompt)));
  }
  const json& first = prompt->front();
  if (!first.is_string() && !first.is_array()) {
    ASSIGN_OR_RETURN(TokenIds ids, ParseTokenIds(*prompt, "prompt"));
    prompts.emplace_back(std::move(ids));
    return prompts;
  }
  for (size_t i = 0; i < prompt->size(); ++i) {
    ASSIGN_OR_RETURN(PromptSource source, ParseBatchElement((*prompt)[i], first.is_string(),
                                                            fmt::format("prompt[{}]", i)));
    prompts.push_back(std::move(source));
  }
  return prompts;
}

absl::StatusOr<std::vector<std::string>> ParseStop(const json& body) {
  std::vector<std::string> stops;
  const json* stop = FindField(body, "stop");
  if (stop == nullptr) return stops;
  const json list = stop->is_array() ? *stop : json::array({*stop});
  if (list.size() > kMaxStopStrings) {
    return InvalidField(
        "stop", fmt::format("must hold at most {} strings, got {}", kMaxStopStrings, list.size()));
  }
  for (size_t i = 0; i < list.size(); ++i) {
    const std::string param = stop->is_array() ? fmt::format("stop[{}]", i) : "stop";
    const bool is_valid = list[i].is_string() && !list[i].get_ref<const std::string&>().empty() &&
                          list[i].get_ref<const std::string&>().size() <= kMaxStopStringBytes;
    if (!is_valid) {
      return InvalidField(param, fmt::format("must be a string of 1 to {} bytes, got {}",
                                             kMaxStopStringBytes, Quoted(list[i])));
    }
    stops.push_back(list[i].get<std::string>());
  }
  return stops;
}

absl::StatusOr<StreamOptions> ParseStreamOptions(const json& body, bool stream) {
  StreamOptions options;
  const json* field = FindField(body, "stream_options");
  if (field == nullptr) return options;
  if (!field->is_object()) {
    return InvalidField("stream_options", fmt::format("must be an object, got {}", Quoted(*field)));
  }
  if (!stream) {
    return InvalidField("stream_options", "is allowed only together with \"stream\": true");
  }
  ASSIGN_OR_RETURN(options.include_usage, ReadBool(*field, "include_usage", "stream_options."));
  ASSIGN_OR_RETURN(options.continuous_usage_stats,
                   ReadBool(*field, "continuous_usage_stats", "stream_options."));
  if (options.continuous_usage_stats && !options.include_usage) {
    return InvalidField("stream_options.continuous_usage_stats",
                        "true is allowed only together with \"include_usage\": true");
  }
  return options;
}

absl::StatusOr<std::optional<int64_t>> ParseCompletionMaxTokens(const json& body, bool echo) {
  const json* field = FindField(body, "max_tokens");
  if (field != nullptr && AsInteger(*field) == 0 && !echo) {
    return InvalidField("max_tokens", "0 is allowed only together with \"echo\": true");
  }
  return ReadInteger(body, "max_tokens", echo ? 0 : 1, kMaxInt64);
}

absl::StatusOr<std::optional<int64_t>> ParseChatMaxTokens(const json& body) {
  ASSIGN_OR_RETURN(const std::optional<int64_t> max_tokens,
                   ReadInteger(body, "max_tokens", 1, kMaxInt64));
  ASSIGN_OR_RETURN(const std::optional<int64_t> max_completion_tokens,
                   ReadInteger(body, "max_completion_tokens", 1, kMaxInt64));
  return max_completion_tokens.has_value() ? max_completion_tokens : max_tokens;
}

absl::StatusOr<std::optional<double>> ParseRepetitionPenalty(const json& body) {
  const json* field = FindField(body, "repetition_penalty");
  if (field == nullptr) return std::optional<double>();
  // As the float32 that it becomes.
  const float value = field->is_number() ? field->get<float>() : 0.0f;
  if (value > 0 && std::isfinite(value)) return std::optional<double>(field->get<double>());
  return InvalidField("repetition_penalty",
                      fmt::format("must be a number above 0, got {}", Quoted(*field)));
}

// The key of a bias: a token id in decimal digits.
std::optional<int32_t> ParseTokenIdKey(const std::string& key) {
  int32_t id = 0;
  const auto [end, error] = std::from_chars(key.data(), key.data() + key.size(), id);
  if (error != std::errc() || end != key.data() + key.size() || id < 0) return std::nullopt;
  return id;
}

absl::StatusOr<std::map<int32_t, float>> ParseLogitBias(const json& body) {
  std::map<int32_t, float> biases;
  const json* field = FindField(body, "logit_bias");
  if (field == nullptr) return biases;
  if (!field->is_object()) {
    return InvalidField("logit_bias",
                        fmt::format("must be an object of token ids and numbers from {} to {}, "
                                    "got {}",
                                    -kMaxAbsLogitBias, kMaxAbsLogitBias, Quoted(*field)));
  }
  if (field->size() > kMaxLogitBiases) {
    return InvalidField("logit_bias", fmt::format("must hold at most {} tokens, got {}",
                                                  kMaxLogitBiases, field->size()));
  }
  for (const auto& [key, value] : field->items()) {
    const std::string param = fmt::format("logit_bias.{}", key.substr(0, 64));
    const std::optional<int32_t> id = ParseTokenIdKey(key);
    if (!id.has_value()) {
      return InvalidField(param, fmt::format("the key must be a token id, got {}", Quoted(key)));
    }
    const double bias = value.is_number() ? value.get<double>() : kMaxAbsLogitBias + 1;
    if (std::fabs(bias) > kMaxAbsLogitBias) {
      return InvalidField(param, fmt::format("must be a number from {} to {}, got {}",
                                             -kMaxAbsLogitBias, kMaxAbsLogitBias, Quoted(value)));
    }
    if (!biases.emplace(*id, static_cast<float>(bias)).second) {
      return InvalidField(param, fmt::format("names token {} a second time", *id));
    }
  }
  return biases;
}

// A list of token ids, such as "stop_token_ids".
absl::StatusOr<TokenIds> ParseIdList(const json& body, const char* name, size_t max_size) {
  const json* field = FindField(body, name);
  if (field == nullptr) return TokenIds();
  if (!field->is_array() || field->size() > max_size) {
    return InvalidField(name, fmt::format("must be a list of at most {} token ids, got {}",
                                          max_size, Quoted(*field)));
  }
  return ParseTokenIds(*field, name);
}

absl::StatusOr<std::vector<std::string>> ParseBadWords(const json& body) {
  std::vector<std::string> words;
  const json* field = FindField(body, "bad_words");
  if (field == nullptr) return words;
  if (!field->is_array() || field->size() > kMaxBadWords) {
    return InvalidField("bad_words", fmt::format("must be a list of at most {} strings, got {}",
                                                 kMaxBadWords, Quoted(*field)));
  }
  for (size_t i = 0; i < field->size(); ++i) {
    const json& word = (*field)[i];
    if (!word.is_string() || word.get_ref<const std::string&>().empty()) {
      return InvalidField(fmt::format("bad_words[{}]", i),
                          fmt::format("must be a string that is not empty, got {}", Quoted(word)));
    }
    words.push_back(word.get<std::string>());
  }
  return words;
}

// Penalties, and what tokens are favoured, banned or the last ones.
absl::Status ParseTokenRules(const json& body, ApiRequest* request) {
  ASSIGN_OR_RETURN(request->repetition_penalty, ParseRepetitionPenalty(body));
  ASSIGN_OR_RETURN(request->presence_penalty,
                   ReadNumber(body, "presence_penalty", -kMaxAbsPenalty, kMaxAbsPenalty));
  ASSIGN_OR_RETURN(request->frequency_penalty,
                   ReadNumber(body, "frequency_penalty", -kMaxAbsPenalty, kMaxAbsPenalty));
  ASSIGN_OR_RETURN(request->logit_bias, ParseLogitBias(body));
  ASSIGN_OR_RETURN(request->bad_words, ParseBadWords(body));
  ASSIGN_OR_RETURN(request->bad_words_token_ids,
                   ParseIdList(body, "bad_words_token_ids", kMaxLogitBiases));
  ASSIGN_OR_RETURN(request->stop_token_ids, ParseIdList(body, "stop_token_ids", kMaxStopTokenIds));
  return absl::OkStatus();
}

absl::StatusOr<std::optional<int>> ParseChatLogprobs(const json& body) {
  ASSIGN_OR_RETURN(const bool logprobs, ReadBool(body, "logprobs"));
  ASSIGN_OR_RETURN(const std::optional<int64_t> top,
                   ReadInteger(body, "top_logprobs", 0, kMaxTopLogprobs));
  if (logprobs) return std::optional<int>(static_cast<int>(top.value_or(0)));
  if (top.value_or(0) > 0) {
    return InvalidField("top_logprobs", fmt::format("is allowed only together with \"logprobs\": "
                                                    "true, got {}",
                                                    *top));
  }
  return std::optional<int>();
}

absl::StatusOr<std::optional<int>> ParseCompletionLogprobs(const json& body) {
  const json* field = FindField(body, "logprobs");
  if (field != nullptr && *field == false) return std::optional<int>();
  ASSIGN_OR_RETURN(const std::optional<int64_t> top,
                   ReadInteger(body, "logprobs", 0, kMaxTopLogprobs));
  if (!top.has_value()) return std::optional<int>();
  return std::optional<int>(static_cast<int>(*top));
}

absl::Status ParseLogprobs(const json& body, ApiRequest* request) {
  ASSIGN_OR_RETURN(const std::optional<int64_t> prompt_logprobs,
                   ReadInteger(body, "prompt_logprobs", 0, kMaxTopLogprobs));
  if (prompt_logprobs.has_value()) request->prompt_logprobs = static_cast<int>(*prompt_logprobs);
  if (request->prompt_logprobs.has_value() && request->stream) {
    return InvalidField("prompt_logprobs",
                        "is not available together with \"stream\": true; \"echo\": true with "
                        "logprobs is, for completions");
  }
  if (request->endpoint == Endpoint::kChat) {
    ASSIGN_OR_RETURN(request->num_top_logprobs, ParseChatLogprobs(body));
    return absl::OkStatus();
  }
  ASSIGN_OR_RETURN(request->num_top_logprobs, ParseCompletionLogprobs(body));
  return absl::OkStatus();
}

absl::Status ParseSampling(const json& body, ApiRequest* request) {
  ASSIGN_OR_RETURN(request->temperature, ReadNumber(body, "temperature", 0, 2));
  ASSIGN_OR_RETURN(request->top_p, ReadNumber(body, "top_p", 0, 1));
  ASSIGN_OR_RETURN(request->top_k, ReadInteger(body, "top_k", -1, kMaxInt32));
  ASSIGN_OR_RETURN(request->min_p, ReadNumber(body, "min_p", 0, 1));
  ASSIGN_OR_RETURN(request->seed, ReadInteger(body, "seed", kMinInt64, kMaxInt64));
  if (request->endpoint == Endpoint::kChat) {
    ASSIGN_OR_RETURN(request->max_tokens, ParseChatMaxTokens(body));
  } else {
    ASSIGN_OR_RETURN(request->echo, ReadBool(body, "echo"));
    ASSIGN_OR_RETURN(request->max_tokens, ParseCompletionMaxTokens(body, request->echo));
  }
  ASSIGN_OR_RETURN(request->stop, ParseStop(body));
  ASSIGN_OR_RETURN(request->include_stop_in_output, ReadBool(body, "include_stop_str_in_output"));
  RETURN_IF_ERROR(ParseTokenRules(body, request));
  return ParseLogprobs(body, request);
}

absl::StatusOr<int64_t> ParseMinTokens(const json& body, const std::optional<int64_t>& max_tokens) {
  ASSIGN_OR_RETURN(const std::optional<int64_t> min_tokens,
                   ReadInteger(body, "min_tokens", 0, kMaxInt64));
  if (max_tokens.has_value() && min_tokens.value_or(0) > *max_tokens) {
    return InvalidField("min_tokens", fmt::format("must be at most max_tokens, {}, got {}",
                                                  *max_tokens, *min_tokens));
  }
  return min_tokens.value_or(0);
}

absl::StatusOr<std::optional<int64_t>> ParseTimeout(const json& body) {
  const json* field = FindField(body, "timeout");
  if (field == nullptr) return std::optional<int64_t>();
  const double seconds = field->is_number() ? field->get<double>() : 0;
  if (seconds <= 0) {
    return InvalidField("timeout",
                        fmt::format("must be a number of seconds above 0, got {}", Quoted(*field)));
  }
  return static_cast<int64_t>(std::ceil(std::min(seconds, kMaxTimeoutSeconds) * 1000));
}

absl::StatusOr<std::string> ParseUser(const json& body) {
  ASSIGN_OR_RETURN(std::string user, ReadString(body, "user"));
  if (user.size() <= kMaxUserBytes) return user;
  return InvalidField("user", fmt::format("must be at most {} bytes, got {}: {}", kMaxUserBytes,
                                          user.size(), Quoted(body["user"])));
}

absl::Status ParseScheduling(const json& body, ApiRequest* request) {
  ASSIGN_OR_RETURN(request->min_tokens, ParseMinTokens(body, request->max_tokens));
  ASSIGN_OR_RETURN(request->ignore_eos, ReadBool(body, "ignore_eos"));
  ASSIGN_OR_RETURN(const std::optional<int64_t> priority,
                   ReadInteger(body, "priority", kMinInt32, kMaxInt32));
  request->priority = static_cast<int32_t>(priority.value_or(0));
  ASSIGN_OR_RETURN(request->cache_salt, ParseCacheSalt(body));
  ASSIGN_OR_RETURN(request->timeout_ms, ParseTimeout(body));
  return absl::OkStatus();
}

absl::Status ParseChoiceCount(const json& body, ApiRequest* request) {
  ASSIGN_OR_RETURN(const std::optional<int64_t> n, ReadInteger(body, "n", 1, kMaxChoicesPerPrompt));
  request->num_choices_per_prompt = static_cast<int>(n.value_or(1));
  const auto num_choices =
      static_cast<int64_t>(request->prompts.size()) * request->num_choices_per_prompt;
  if (num_choices <= kMaxChoicesPerRequest) return absl::OkStatus();
  return InvalidField(
      "prompt", fmt::format("{} prompts times n={} are {} choices; at most {} are allowed",
                            request->prompts.size(), request->num_choices_per_prompt, num_choices,
                            kMaxChoicesPerRequest));
}

absl::Status ParsePrompt(const json& body, ApiRequest* request) {
  if (request->endpoint == Endpoint::kChat) {
    ASSIGN_OR_RETURN(ChatMessages messages, ParseMessages(body));
    request->prompts.emplace_back(std::move(messages));
    return absl::OkStatus();
  }
  ASSIGN_OR_RETURN(request->prompts, ParsePrompts(body));
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::string> ParseCacheSalt(const json& body) {
  ASSIGN_OR_RETURN(std::string salt, ReadString(body, "cache_salt"));
  const bool is_printable =
      std::all_of(salt.begin(), salt.end(), [](char c) { return ' ' <= c && c <= '~'; });
  if (salt.size() <= kMaxCacheSaltBytes && is_printable) return salt;
  return InvalidField("cache_salt", fmt::format("must be at most {} printable ASCII characters, "
                                                "got {}",
                                                kMaxCacheSaltBytes, Quoted(body["cache_salt"])));
}

absl::StatusOr<ApiRequest> ParseRequest(Endpoint endpoint, std::string_view body_text) {
  ASSIGN_OR_RETURN(const json body, ParseJsonObject(body_text));
  ApiRequest request;
  request.endpoint = endpoint;
  ASSIGN_OR_RETURN(request.model, ReadString(body, "model"));
  RETURN_IF_ERROR(ParsePrompt(body, &request));
  ASSIGN_OR_RETURN(request.stream, ReadBool(body, "stream"));
  RETURN_IF_ERROR(ParseSampling(body, &request));
  RETURN_IF_ERROR(ParseScheduling(body, &request));
  RETURN_IF_ERROR(ParseChoiceCount(body, &request));
  ASSIGN_OR_RETURN(request.stream_options, ParseStreamOptions(body, request.stream));
  ASSIGN_OR_RETURN(request.user, ParseUser(body));
  RETURN_IF_ERROR(RefuseUnsupportedFields(body, endpoint));
  return request;
}

}  // namespace wintserve
