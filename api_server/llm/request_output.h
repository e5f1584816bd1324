// The text side of one open request: ids in, GenerationUpdates out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "api_server/llm/llm.h"
#include "api_server/scheduler/scheduler.h"
#include "api_server/text/detokenizer.h"
#include "api_server/text/stop_matcher.h"

namespace wintserve {

// Threading: thread-compatible; the engine's thread owns it once the request is submitted.
class RequestOutput {
 public:
  RequestOutput(const Tokenizer& tokenizer, const GenerationRequest& request,
                std::function<void(GenerationUpdate)> on_update);

  // The first update: the request is in the queue.
  void Accept();
  // Of the first choice; in every later update.
  void set_num_cached_tokens(int count) { num_cached_tokens_ = count; }

  // Takes one sampled token. True: it completed a stop string, so the choice has finished although
  // the token is not the sequence's last. A stop token counts but has no text, and
  // log-probabilities only with stop_token_has_logprobs. With a max_tokens of 0 the token ends its
  // choice and is nothing more.
  bool Append(SequenceToken news);

  // Hands what has been appended since the last call to on_update; nothing when there is none.
  void Deliver();
  // The last update: `error` ends the request. REQUIRES: !finished().
  void Fail(const absl::Status& error);

  bool finished() const { return num_unfinished_ == 0; }
  int num_prompt_tokens() const { return num_prompt_tokens_; }
  int num_completion_tokens() const { return num_completion_tokens_; }

 private:
  // A token whose log-probabilities wait for its text to be shown, from this byte of it on.
  struct HeldLogprobs {
    size_t text_begin = 0;
    TokenLogprobs logprobs = {};
  };
  struct Choice {
    Detokenizer detokenizer;
    StopMatcher stop_matcher;
    bool finished = false;
    int delta = -1;  // its place in the update that is being made; -1: none yet
    // With log-probabilities only. `text` is all that the tokens have completed.
    size_t num_text_bytes = 0;
    int num_text_characters = 0;
    size_t num_shown_bytes = 0;
    std::deque<HeldLogprobs> held = {};
  };

  GenerationUpdate Update() const;  // without news
  ChoiceDelta& DeltaOf(uint32_t choice);
  TokenLogprobs LogprobsOf(const SequenceToken& news, int text_offset) const;
  void HoldLogprobs(const SequenceToken& news, Choice* choice) const;
  // Of the tokens whose text is shown by now.
  static void ReleaseLogprobs(Choice* choice, ChoiceDelta* delta);
  LogprobEntry EntryOf(int32_t token, float logprob) const;
  void FinishChoice(Choice* choice, FinishReason reason, ChoiceDelta* delta);

  const Tokenizer& tokenizer_;
  const std::function<void(GenerationUpdate)> on_update_;
  const int num_prompt_tokens_;
  const bool generates_nothing_;
  const bool stop_token_has_logprobs_;
  std::optional<PromptLogprobs> prompt_logprobs_;  // if asked for, until they are delivered
  bool knows_prompt_logprobs_ = false;
  std::vector<Choice> choices_;
  int num_unfinished_;
  int num_completion_tokens_ = 0;
  int num_cached_tokens_ = 0;
  std::vector<ChoiceDelta> deltas_;
};

}  // namespace wintserve
