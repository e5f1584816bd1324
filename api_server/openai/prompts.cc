#include "api_server/openai/prompts.h"

#include <fmt/core.h>

#include <algorithm>
#include <limits>

#include "absl/strings/str_cat.h"
#include "api_server/openai/api_error.h"
#include "common/status_macros.h"

namespace wintserve {
namespace {

// "messages", "prompt" or "prompt[3]".
std::string PromptParam(const ApiRequest& request, size_t index) {
  if (request.endpoint == Endpoint::kChat) return "messages";
  return request.prompts.size() == 1 ? "prompt" : fmt::format("prompt[{}]", index);
}

absl::StatusOr<TokenIds> EncodePrompt(const PromptSource& source, const LLM& llm,
                                      const std::string& param) {
  if (const auto* ids = std::get_if<TokenIds>(&source)) return *ids;
  if (const auto* text = std::get_if<std::string>(&source)) return llm.Encode(*text);
  const absl::StatusOr<std::string> rendered =
      llm.RenderChat(std::get<ChatMessages>(source), /*add_generation_prompt=*/true);
  if (!rendered.ok()) return InvalidField(param, std::string(rendered.status().message()));
  return llm.Encode(*rendered);
}

absl::Status CheckPrompt(const TokenIds& ids, const LLM& llm, const std::string& param) {
  if (ids.empty()) return InvalidField(param, "must hold at least one token, got none");
  for (const int32_t id : ids) {
    if (id < 0 || id >= llm.vocab_size()) {
      return InvalidField(param, fmt::format("token id {} is outside the vocabulary, 0 to {}", id,
                                             llm.vocab_size() - 1));
    }
  }
  const int max_prompt_tokens = llm.max_model_len() - 1;
  if (ids.size() > static_cast<size_t>(max_prompt_tokens)) {
    return InvalidField(param,
                        fmt::format("Input text is too long: {} tokens, but at most {} are allowed "
                                    "(max_model_len {} less one token to generate)",
                                    ids.size(), max_prompt_tokens, llm.max_model_len()),
                        "context_length_exceeded");
  }
  return absl::OkStatus();
}

absl::Status CheckMinTokens(const ApiRequest& request, size_t num_prompt_tokens, const LLM& llm) {
  const int64_t room = llm.max_model_len() - static_cast<int64_t>(num_prompt_tokens);
  if (request.min_tokens <= room) return absl::OkStatus();
  return InvalidField(
      "min_tokens",
      fmt::format("must be at most {}, which a prompt of {} tokens leaves of max_model_len {}, "
                  "got {}",
                  room, num_prompt_tokens, llm.max_model_len(), request.min_tokens));
}

absl::Status CheckIds(const TokenIds& ids, const LLM& llm, const std::string& param) {
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] >= 0 && ids[i] < llm.vocab_size()) continue;
    return InvalidField(fmt::format("{}[{}]", param, i),
                        fmt::format("token id {} is outside the vocabulary, 0 to {}", ids[i],
                                    llm.vocab_size() - 1));
  }
  return absl::OkStatus();
}

// The tokens that are the word alone: at the beginning of a text, and after a space.
absl::StatusOr<TokenIds> IdsOfWord(const std::string& word, const LLM& llm,
                                   const std::string& param) {
  TokenIds ids;
  for (const std::string& text : {word, " " + word}) {
    const TokenIds encoded = llm.Encode(text);
    if (encoded.size() == 1) ids.push_back(encoded.front());
  }
  if (!ids.empty()) return ids;
  return InvalidField(param, fmt::format("must be one token, with or without a space before it, "
                                         "but \"{}\" is {} tokens",
                                         word.substr(0, 64), llm.Encode(word).size()));
}

absl::StatusOr<TokenIds> BannedIdsOf(const ApiRequest& request, const LLM& llm) {
  RETURN_IF_ERROR(CheckIds(request.bad_words_token_ids, llm, "bad_words_token_ids"));
  TokenIds banned = request.bad_words_token_ids;
  for (size_t i = 0; i < request.bad_words.size(); ++i) {
    ASSIGN_OR_RETURN(const TokenIds ids,
                     IdsOfWord(request.bad_words[i], llm, fmt::format("bad_words[{}]", i)));
    banned.insert(banned.end(), ids.begin(), ids.end());
  }
  std::sort(banned.begin(), banned.end());
  banned.erase(std::unique(banned.begin(), banned.end()), banned.end());
  return banned;
}

absl::Status CheckBiases(const ApiRequest& request, const TokenIds& banned, const LLM& llm) {
  size_t num_tokens = banned.size();
  for (const auto& [id, bias] : request.logit_bias) {
    if (id >= llm.vocab_size()) {
      return InvalidField(
          fmt::format("logit_bias.{}", id),
          fmt::format("token id {} is outside the vocabulary, 0 to {}", id, llm.vocab_size() - 1));
    }
    num_tokens += std::binary_search(banned.begin(), banned.end(), id) ? 0 : 1;
  }
  if (num_tokens <= kMaxLogitBiases) return absl::OkStatus();
  return InvalidField("logit_bias", fmt::format("must name at most {} tokens together with "
                                                "bad_words and bad_words_token_ids, got {}",
                                                kMaxLogitBiases, num_tokens));
}

// of_tokens: the field that asks for some; of_top: the one that says for how many of the top.
absl::Status CheckLogprobs(const std::optional<int>& count, const char* of_tokens,
                           const char* of_top, const LLM& llm) {
  if (!count.has_value()) return absl::OkStatus();
  if (llm.max_top_logprobs() < 0) {
    return InvalidField(of_tokens,
                        "log-probabilities are switched off on this server "
                        "(--no-enable-logprob)");
  }
  if (*count <= llm.max_top_logprobs()) return absl::OkStatus();
  return InvalidField(of_top,
                      fmt::format("must be at most {} on this server (--max-logprobs), got {}",
                                  llm.max_top_logprobs(), *count));
}

absl::Status CheckLogprobs(const ApiRequest& request, const LLM& llm) {
  RETURN_IF_ERROR(CheckLogprobs(request.num_top_logprobs, "logprobs",
                                request.endpoint == Endpoint::kChat ? "top_logprobs" : "logprobs",
                                llm));
  return CheckLogprobs(request.prompt_logprobs, "prompt_logprobs", "prompt_logprobs", llm);
}

// Everything but the prompt.
absl::StatusOr<GenerationRequest> SamplingOf(const ApiRequest& request, const LLM& llm) {
  const GenerationDefaults& defaults = llm.defaults();
  GenerationRequest generation;
  const auto number = [](const std::optional<double>& value, float default_value) {
    return value.has_value() ? static_cast<float>(*value) : default_value;
  };
  RETURN_IF_ERROR(CheckLogprobs(request, llm));
  RETURN_IF_ERROR(CheckIds(request.stop_token_ids, llm, "stop_token_ids"));
  ASSIGN_OR_RETURN(generation.banned_token_ids, BannedIdsOf(request, llm));
  RETURN_IF_ERROR(CheckBiases(request, generation.banned_token_ids, llm));
  generation.min_p = number(request.min_p, defaults.min_p);
  generation.repetition_penalty = number(request.repetition_penalty, defaults.repetition_penalty);
  generation.presence_penalty = number(request.presence_penalty, defaults.presence_penalty);
  generation.frequency_penalty = number(request.frequency_penalty, defaults.frequency_penalty);
  generation.logit_bias = request.logit_bias;
  generation.stop_token_ids = request.stop_token_ids;
  generation.num_top_logprobs = request.num_top_logprobs;
  generation.num_prompt_top_logprobs = request.prompt_logprobs;
  if (request.echoes_logprobs()) {
    // Who scores a text asks for a token more and takes the last column for it.
    generation.stop_token_has_logprobs = true;
    generation.num_prompt_top_logprobs =
        std::max(*request.num_top_logprobs, request.prompt_logprobs.value_or(0));
  }
  generation.temperature = static_cast<float>(request.temperature.value_or(defaults.temperature));
  generation.top_p = static_cast<float>(request.top_p.value_or(defaults.top_p));
  generation.top_k = static_cast<int32_t>(request.top_k.value_or(defaults.top_k));
  generation.seed = request.seed;
  generation.num_choices = request.num_choices_per_prompt;
  if (request.max_tokens.has_value()) {
    // Too large is clamped to what the model length leaves, by the LLM.
    generation.max_tokens =
        static_cast<int>(std::min<int64_t>(*request.max_tokens, std::numeric_limits<int>::max()));
  }
  generation.stop = request.stop;
  generation.include_stop_in_output = request.include_stop_in_output;
  // CheckMinTokens refuses what is too large.
  generation.min_tokens =
      static_cast<int>(std::min<int64_t>(request.min_tokens, std::numeric_limits<int>::max()));
  generation.ignore_eos = request.ignore_eos;
  generation.priority = request.priority;
  generation.tenant = request.user;
  generation.cache_salt = request.cache_salt;
  generation.timeout_ms = request.timeout_ms;
  return generation;
}

// Of the prompts' tokens, each with its most probable ones, in every choice.
absl::Status CheckNumPromptLogprobs(const ApiRequest& request,
                                    const std::vector<GenerationRequest>& generations) {
  int64_t num_of_token = 0;
  if (request.echoes_logprobs()) num_of_token += 1 + *request.num_top_logprobs;
  if (request.prompt_logprobs.has_value()) num_of_token += 1 + *request.prompt_logprobs;
  int64_t num_tokens = 0;
  for (const GenerationRequest& generation : generations) {
    num_tokens += std::ssize(generation.prompt_ids);
  }
  const int64_t count = num_tokens * request.num_choices_per_prompt * num_of_token;
  if (count <= kMaxPromptLogprobs) return absl::OkStatus();
  return InvalidField(
      request.echoes_logprobs() ? "logprobs" : "prompt_logprobs",
      fmt::format("must be at most {} log-probabilities in one answer, got {}: {} for "
                  "each of {} prompt tokens in {} choices",
                  kMaxPromptLogprobs, count, num_of_token, num_tokens,
                  request.num_choices_per_prompt));
}

}  // namespace

absl::Status CheckModelName(std::string_view model, const LLM& llm, const ModelNames& names) {
  const bool is_known =
      model.empty() || model == "default" || model == "null" || model == llm.model_name() ||
      model == llm.model_path() ||
      std::find(names.aliases.begin(), names.aliases.end(), model) != names.aliases.end();
  if (is_known || !names.strict) return absl::OkStatus();
  return StatusWithCode(absl::StatusCode::kNotFound, "model_not_found",
                        fmt::format("model: \"{}\" does not exist; this server serves \"{}\"",
                                    model.substr(0, 256), llm.model_name()),
                        "model");
}

absl::StatusOr<std::vector<GenerationRequest>> MakeGenerationRequests(const ApiRequest& request,
                                                                      const LLM& llm,
                                                                      const std::string& id) {
  ASSIGN_OR_RETURN(const GenerationRequest sampling, SamplingOf(request, llm));
  std::vector<GenerationRequest> generations;
  for (size_t i = 0; i < request.prompts.size(); ++i) {
    const std::string param = PromptParam(request, i);
    GenerationRequest& generation = generations.emplace_back(sampling);
    generation.id = request.prompts.size() == 1 ? id : absl::StrCat(id, "-", i);
    ASSIGN_OR_RETURN(generation.prompt_ids, EncodePrompt(request.prompts[i], llm, param));
    RETURN_IF_ERROR(CheckPrompt(generation.prompt_ids, llm, param));
    RETURN_IF_ERROR(CheckMinTokens(request, generation.prompt_ids.size(), llm));
  }
  RETURN_IF_ERROR(CheckNumPromptLogprobs(request, generations));
  return generations;
}

std::vector<std::string> EchoTexts(const ApiRequest& request,
                                   const std::vector<GenerationRequest>& generations,
                                   const LLM& llm) {
  std::vector<std::string> texts;
  if (!request.echo) return texts;
  for (size_t i = 0; i < generations.size(); ++i) {
    const auto* const text = std::get_if<std::string>(&request.prompts[i]);
    const bool as_sent = text != nullptr && !request.echoes_logprobs();
    texts.push_back(as_sent ? *text : llm.Decode(generations[i].prompt_ids));
  }
  return texts;
}

}  // namespace wintserve
