// Log-probabilities as JSON: OpenAI's two forms, and vLLM's of a prompt.
#pragma once

#include <nlohmann/json.hpp>
#include <vector>

#include "api_server/llm/llm.h"
#include "api_server/openai/request.h"

namespace wintserve {

// The "logprobs" of sampled tokens. first_offset: characters of the choice's text before the ones
// that text_offset counts from (completions), those of the echo.
nlohmann::ordered_json LogprobsJson(Endpoint endpoint, const std::vector<TokenLogprobs>& tokens,
                                    int first_offset = 0);

// A prompt that is echoed with log-probabilities.
struct EchoJson {
  nlohmann::ordered_json logprobs;  // columns, as those of completions; null for the first token
  int num_characters = 0;           // of the echoed text
};
// num_top: of the most probable tokens, beside the prompt's own.
EchoJson EchoLogprobsJson(const PromptLogprobs& prompt, int num_top, const LLM& llm);

// columns[name] += more[name], for each name of `more`.
void AppendColumns(const nlohmann::ordered_json& more, nlohmann::ordered_json* columns);

// [null, {id: {"logprob", "rank", "decoded_token"}, ...}, ...], an object a token of the prompt
// with the token itself first.
nlohmann::ordered_json PromptLogprobsJson(const PromptLogprobs& prompt, int num_top,
                                          const LLM& llm);

}  // namespace wintserve
