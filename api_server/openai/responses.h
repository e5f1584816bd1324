// Answers as JSON text: whole bodies, stream chunks and the model list.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "api_server/llm/llm.h"
#include "api_server/openai/prompts.h"
#include "api_server/openai/request.h"

namespace wintserve {

// What every body of one answer repeats.
struct ResponseIdentity {
  Endpoint endpoint = Endpoint::kChat;
  std::string id;               // "chatcmpl-<uuid>" or "cmpl-<uuid>"
  int64_t created_seconds = 0;  // Unix time
  std::string model;            // public name
};

// A fresh id for an answer of `model`, created now.
ResponseIdentity NewResponseIdentity(Endpoint endpoint, const std::string& model);

// Token counts over the prompts of one request; each prompt has a generation of its own.
class UsageCounter {
 public:
  explicit UsageCounter(size_t num_prompts) : per_prompt_(num_prompts) {}
  void Update(size_t prompt_index, const GenerationUpdate& update);
  int64_t prompt_tokens() const;
  int64_t completion_tokens() const;
  int64_t cached_tokens() const;
  bool all_finished() const;

 private:
  struct Counts {
    int64_t prompt = 0;
    int64_t completion = 0;
    int64_t cached = 0;
    bool finished = false;
  };
  int64_t Sum(int64_t Counts::*member) const;
  std::vector<Counts> per_prompt_;
};

// Collects updates into the one body of a request without "stream". Thread-compatible.
class ResponseAssembler {
 public:
  // The LLM outlives it.
  ResponseAssembler(ResponseIdentity identity, const ApiRequest& request, const LLM& llm);
  void Add(size_t prompt_index, const GenerationUpdate& update);
  bool finished() const { return usage_.all_finished(); }
  // Takes up to a second where a long prompt's log-probabilities are asked for.
  std::string Body() const;

 private:
  void AddChoicesOf(size_t prompt_index, nlohmann::ordered_json* choices) const;

  struct Choice {
    std::string text;
    std::optional<FinishReason> finish_reason;
    std::vector<TokenLogprobs> logprobs;
  };
  const ResponseIdentity identity_;
  const LLM& llm_;
  const int num_choices_per_prompt_;
  const std::optional<int> num_top_logprobs_;
  const bool echoes_logprobs_;
  const std::optional<int> num_prompt_top_logprobs_;
  std::vector<Choice> choices_;                  // prompt-major
  std::vector<PromptLogprobs> prompt_logprobs_;  // by prompt
  UsageCounter usage_;
};

// Turns updates into the JSON payloads of a stream, in OpenAI's order: a role chunk (chat), text
// chunks, an empty delta with the finish_reason; once all choices have finished and if asked, the
// usage chunk. The caller frames them as events and adds [DONE]. Thread-compatible.
class StreamAssembler {
 public:
  // The LLM outlives it.
  StreamAssembler(ResponseIdentity identity, const ApiRequest& request, const LLM& llm);
  // Appends the payloads that `update` of one prompt causes.
  void Add(size_t prompt_index, const GenerationUpdate& update, std::vector<std::string>* payloads);
  bool finished() const { return usage_.all_finished(); }

 private:
  struct Echo {
    std::string text;
    nlohmann::ordered_json logprobs = nullptr;
    int num_characters = 0;  // of the text; with log-probabilities
  };

  void AddChoice(int index, const ChoiceDelta& delta, std::vector<std::string>* payloads);
  // content: the delta (chat) or the text (completions).
  std::string ChoiceChunk(int index, nlohmann::ordered_json content,
                          std::optional<FinishReason> finish_reason,
                          nlohmann::ordered_json logprobs) const;
  std::string UsageChunk() const;

  const ResponseIdentity identity_;
  const LLM& llm_;
  const int num_choices_per_prompt_;
  const StreamOptions options_;
  const std::optional<int> echoed_top_logprobs_;
  std::vector<Echo> echoes_;  // by prompt; empty: none
  std::vector<bool> began_;   // by choice: its role chunk, or its echo, was sent
  UsageCounter usage_;
};

// GET /v1/models: the public name and its aliases.
std::string ModelListBody(const LLM& llm, const ModelNames& names, int64_t created_seconds);
// GET /v1/models/{id}. NOT_FOUND: neither the public name, an alias nor the path.
absl::StatusOr<std::string> ModelBody(const std::string& id, const LLM& llm,
                                      const ModelNames& names, int64_t created_seconds);

}  // namespace wintserve
