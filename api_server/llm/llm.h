// class LLM: submit, stream, cancel. What the OpenAI front end, the offline command and the Python
// binding share; it composes text, scheduler, work queue and cache client.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "api_server/scheduler/plan.h"
#include "api_server/text/chat_template.h"

namespace wintserve {

inline constexpr int kMaxTopLogprobs = 20;
// Tokens with a bias and banned tokens of one request.
inline constexpr int kMaxLogitBiases = 1024;
inline constexpr float kMaxAbsLogitBias = 100;
inline constexpr float kMaxAbsPenalty = 2;  // presence and frequency

// Defaults of generation_config.json where a request names none.
struct GenerationDefaults {
  float temperature = 1.0f;
  float top_p = 1.0f;
  int32_t top_k = 0;
  float min_p = 0.0f;
  float repetition_penalty = 1.0f;
  float presence_penalty = 0.0f;
  float frequency_penalty = 0.0f;
};

struct GenerationRequest {
  std::string id;  // for the log
  std::vector<int32_t> prompt_ids = {};
  float temperature = 1.0f;         // [0, 2]; 0 is greedy
  float top_p = 1.0f;               // [0, 1]; 0 is greedy
  int32_t top_k = 0;                // 0 or -1: off
  float min_p = 0.0f;               // [0, 1]; 0 keeps all
  float repetition_penalty = 1.0f;  // above 0; of tokens in prompt and answer; 1: none
  float presence_penalty = 0.0f;    // kMaxAbsPenalty either way; of tokens in the answer
  float frequency_penalty = 0.0f;
  std::map<int32_t, float> logit_bias = {};    // by token id; kMaxAbsLogitBias either way
  std::vector<int32_t> banned_token_ids = {};  // never sampled, while there is another token
  std::vector<int32_t> stop_token_ids = {};    // end a choice, beside the model's own
  std::optional<int> num_top_logprobs = {};    // absent: no log-probabilities
  // Of the prompt's tokens; absent: none. With them no token of the prompt comes from the cache.
  std::optional<int> num_prompt_top_logprobs = {};
  // The stop token that ends a choice has log-probabilities as its other tokens do, behind the
  // text.
  bool stop_token_has_logprobs = false;
  std::optional<int64_t> seed = {};  // absent: a random one
  int num_choices = 1;               // n
  // Absent or too large: what the model length leaves. 0: every choice ends with kLength and
  // nothing.
  std::optional<int> max_tokens = {};
  std::vector<std::string> stop = {};
  bool include_stop_in_output = false;
  int min_tokens = 0;  // no stop token before; stop strings count at any time
  bool ignore_eos = false;
  int priority = 0;                        // lower comes first
  std::string tenant = {};                 // API key or user
  std::string cache_salt = {};             // prompts share KV only under the same salt
  std::optional<int64_t> timeout_ms = {};  // from Submit to the last token
};

enum class FinishReason { kStop, kLength };

struct LogprobEntry {
  int32_t token_id = 0;
  std::string text = {};   // its bytes, or "bytes:\\xe6\\x98" where they are no whole characters
  std::string bytes = {};  // exactly
  float logprob = 0;
};

// Of one sampled token: of the logits as the model gave them, before penalties, bias, temperature.
struct TokenLogprobs {
  LogprobEntry token = {};
  int rank = 0;                        // among all tokens, from 1
  std::vector<LogprobEntry> top = {};  // the most probable ones, best first
  int text_offset = 0;                 // characters of the choice's text before it
};

// Of a prompt, in ids: it may be long, so whoever shows it makes text of it (LLM::TokenText).
struct PromptLogprobs {
  std::vector<int32_t> token_ids = {};           // of the prompt, all
  std::vector<PositionLogprobs> positions = {};  // of token_ids[1…]
};

// News of one choice. `text` is whole UTF-8 characters that cannot be the beginning of a stop
// string.
struct ChoiceDelta {
  int index = 0;
  std::string text = {};
  std::vector<int32_t> token_ids = {};  // sampled since the last delta, the stop token included
  std::optional<FinishReason> finish_reason = {};
  // If asked for: of the tokens whose text begins in `text`. A token that is no part of the text (a
  // stop token, what a stop string covers) has none, but see stop_token_has_logprobs.
  std::vector<TokenLogprobs> logprobs = {};
};

struct GenerationUpdate {
  std::vector<ChoiceDelta> choices = {};
  int num_prompt_tokens = 0;
  int num_completion_tokens = 0;  // so far, over all choices
  int num_cached_tokens = 0;
  // If asked for: once, with the first choice's first token or before.
  std::optional<PromptLogprobs> prompt_logprobs = {};
  bool finished = false;  // last update: every choice has finished, or `error` is set
  absl::Status error = {};
};

// Why the instance cannot serve yet, for a while, or any more. Empty reason: it can.
struct ReadinessReport {
  bool ready = false;
  std::string reason = {};  // "waiting for engine worker 1 of 2"
  // Not ready, but it will be again: open requests go on then, and new ones are taken and wait.
  bool is_recovering = false;
};

using RequestHandle = uint64_t;

// Threading: every method may be called from any thread; none blocks on the engine.
class LLM {
 public:
  virtual ~LLM() = default;

  // INVALID_ARGUMENT: the prompt is longer than max_model_len - 1, or holds an unknown id.
  // UNAVAILABLE: neither ready nor recovering, or shutting down.
  // The first update has no choices: the request is in the queue. Or it has an error:
  // RESOURCE_EXHAUSTED when the queue is full (RetryAfterSeconds says when to come again),
  // DEADLINE_EXCEEDED (also later) when its time is up; UNAVAILABLE when recovery takes too long;
  // INTERNAL: the engine workers failed whenever it ran. `on_update` is called from the engine's
  // thread, in order, until one has finished == true; it must not block. One call may still be
  // under way when Cancel returns, none starts afterwards.
  virtual absl::StatusOr<RequestHandle> Submit(GenerationRequest request,
                                               std::function<void(GenerationUpdate)> on_update) = 0;

  // The request leaves the next plan; its blocks return. Unknown or finished handles are ignored.
  virtual void Cancel(RequestHandle handle) = 0;

  // Every open request fails with UNAVAILABLE, and so does what is submitted from now on. The
  // updates may come after it has returned.
  virtual void Stop() = 0;

  // Drops what the prefix cache holds, of one salt or all. Blocks for a round trip. Returns the
  // number of cached blocks that match no more. UNAVAILABLE: no cache manager.
  virtual absl::StatusOr<uint64_t> ResetPrefixCache(const std::optional<std::string>& salt) = 0;

  virtual ReadinessReport Readiness() const = 0;

  // Text. Pure functions of the loaded tokenizer; safe to call from a pool thread.
  virtual std::vector<int32_t> Encode(const std::string& text) const = 0;
  virtual std::string Decode(const std::vector<int32_t>& ids) const = 0;
  // A token as log-probabilities spell it: LogprobEntry::text.
  virtual std::string TokenText(int32_t id) const = 0;
  // [ids.size() + 1]: characters of Decode(ids) that are complete before each of the ids, and all
  // of them.
  virtual std::vector<int> TextOffsets(const std::vector<int32_t>& ids) const = 0;
  // INVALID_ARGUMENT names the message that the template cannot render.
  virtual absl::StatusOr<std::string> RenderChat(const std::vector<ChatMessage>& messages,
                                                 bool add_generation_prompt) const = 0;

  virtual const GenerationDefaults& defaults() const = 0;
  virtual int max_model_len() const = 0;
  virtual int vocab_size() const = 0;
  // What num_top_logprobs may be; -1: log-probabilities are switched off.
  virtual int max_top_logprobs() const = 0;
  virtual const std::string& model_name() const = 0;  // public name, as in responses
  virtual const std::string& model_path() const = 0;
};

// Of a RESOURCE_EXHAUSTED from an LLM: whole seconds, at least 1. Comes with the scheduler, which
// knows how fast its queue moves; declared here for those who see the LLM alone.
int RetryAfterSeconds(const absl::Status& status);

}  // namespace wintserve
