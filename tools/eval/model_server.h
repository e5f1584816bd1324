// What eval asks of a server with the OpenAI interface: wintserve's own, vLLM's, FastDeploy's.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "tools/eval/http_client.h"

namespace wintserve::eval {

// How a server is asked for the log-probabilities of a prompt, with /v1/completions.
struct PromptForm {
  enum class Kind {
    kEcho,            // "echo" with "logprobs", as OpenAI had it: wintserve, vLLM
    kPromptLogprobs,  // "prompt_logprobs", an extension: FastDeploy, vLLM
  };
  Kind kind = Kind::kEcho;
  int max_tokens = 0;
  int logprobs = 0;  // candidates at each position beside the prompt's own token
};

// What is known of a server, the same for all connections.
struct ServedModel {
  std::string name;
  std::optional<int64_t> max_model_len;  // tokens, if the server says
  std::optional<PromptForm> form;        // after FindPromptForm
};

// Looks up the model: `wanted`, or if that is empty the only one that is no adapter of another.
// NOT_FOUND: the server has no such model, or several; the text lists them.
absl::StatusOr<ServedModel> FindModel(HttpClient& client, const std::string& wanted);

// Tries forms until the server answers one: some refuse max_tokens 0 or logprobs 0, fail at "echo"
// of token ids, or know only the extension. UNIMPLEMENTED with what the server said: it answers
// none.
absl::Status FindPromptForm(HttpClient& client, ServedModel* model);

// Log-probabilities (natural) of ids[1], ids[2], …, each given all ids before it; [ids.size()], the
// first is 0 and means nothing. REQUIRES: model.form; at least two ids. Errors: HttpClient's;
// INTERNAL: an answer that does not hold them, or a token of probability 0.
absl::StatusOr<std::vector<double>> PromptLogprobs(HttpClient& client, const ServedModel& model,
                                                   std::span<const int32_t> ids);

// The greedy answer to one message of a user, or (raw) continuation of the text itself. Errors:
// HttpClient's; INTERNAL: an answer without text, as of a model that was still thinking.
absl::StatusOr<std::string> GreedyAnswer(HttpClient& client, const ServedModel& model,
                                         const std::string& prompt, bool raw, int max_tokens);

}  // namespace wintserve::eval
