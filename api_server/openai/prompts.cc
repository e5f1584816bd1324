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

// Everything but the prompt.
GenerationRequest SamplingOf(const ApiRequest& request, const GenerationDefaults& defaults) {
  GenerationRequest generation;
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
  const GenerationRequest sampling = SamplingOf(request, llm.defaults());
  std::vector<GenerationRequest> generations;
  for (size_t i = 0; i < request.prompts.size(); ++i) {
    const std::string param = PromptParam(request, i);
    GenerationRequest& generation = generations.emplace_back(sampling);
    generation.id = request.prompts.size() == 1 ? id : absl::StrCat(id, "-", i);
    ASSIGN_OR_RETURN(generation.prompt_ids, EncodePrompt(request.prompts[i], llm, param));
    RETURN_IF_ERROR(CheckPrompt(generation.prompt_ids, llm, param));
    RETURN_IF_ERROR(CheckMinTokens(request, generation.prompt_ids.size(), llm));
  }
  return generations;
}

}  // namespace wintserve
