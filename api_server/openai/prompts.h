// From a validated request to what class LLM takes: model name, rendering, encoding, length.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "api_server/llm/llm.h"
#include "api_server/openai/request.h"

namespace wintserve {

// The names under which the one model answers, beside LLM::model_name() and model_path().
struct ModelNames {
  std::vector<std::string> aliases;
  bool strict = false;  // refuse unknown names instead of serving them
};

// NOT_FOUND (model_not_found) when names.strict and nobody knows `model`. The public name, an
// alias, the model's path, "", "default" and "null" are known.
absl::Status CheckModelName(std::string_view model, const LLM& llm, const ModelNames& names);

// One GenerationRequest a prompt, in order; `id` names them in the log; the tenant is `user`.
// Renders and encodes, so it runs on a pool thread. INVALID_ARGUMENT (context_length_exceeded):
// longer than max_model_len - 1 tokens; or an unknown token id, an empty prompt, a message that the
// template cannot render, more min_tokens than the prompt leaves room for, a bad word that is not
// one token, log-probabilities beyond what the server gives.
absl::StatusOr<std::vector<GenerationRequest>> MakeGenerationRequests(const ApiRequest& request,
                                                                      const LLM& llm,
                                                                      const std::string& id);

// The prompts of a request with "echo" as text, without empty. `generations`: of the request. Text
// is as it was sent; with log-probabilities as its tokens have it, since a tokenizer may have
// normalised it and their text_offset has to fit.
std::vector<std::string> EchoTexts(const ApiRequest& request,
                                   const std::vector<GenerationRequest>& generations,
                                   const LLM& llm);

}  // namespace wintserve
