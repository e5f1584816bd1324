#include "api_server/llm/request_output.h"

#include <utility>

#include "api_server/llm/token_text.h"
#include "common/check.h"

namespace wintserve {

RequestOutput::RequestOutput(const Tokenizer& tokenizer, const GenerationRequest& request,
                             std::function<void(GenerationUpdate)> on_update)
    : tokenizer_(tokenizer),
      on_update_(std::move(on_update)),
      num_prompt_tokens_(static_cast<int>(request.prompt_ids.size())),
      generates_nothing_(request.max_tokens == 0),
      stop_token_has_logprobs_(request.stop_token_has_logprobs),
      num_unfinished_(request.num_choices) {
  if (request.num_prompt_top_logprobs.has_value()) {
    prompt_logprobs_ = PromptLogprobs{.token_ids = request.prompt_ids};
  }
  choices_.reserve(request.num_choices);
  for (int i = 0; i < request.num_choices; ++i) {
    choices_.push_back({.detokenizer = Detokenizer(tokenizer),
                        .stop_matcher = StopMatcher(request.stop, request.include_stop_in_output)});
  }
}

bool RequestOutput::Append(SequenceToken news) {
  Choice& choice = choices_[news.sequence.choice];
  CHECK(!choice.finished, "request={} choice={}", news.sequence.request, news.sequence.choice);
  ChoiceDelta& delta = DeltaOf(news.sequence.choice);
  if (prompt_logprobs_.has_value() && !knows_prompt_logprobs_ && news.sequence.choice == 0) {
    prompt_logprobs_->positions = std::move(news.prompt_logprobs);
    knows_prompt_logprobs_ = true;
  }
  if (generates_nothing_) {
    FinishChoice(&choice, FinishReason::kLength, &delta);
    return !news.end.has_value();
  }
  ++num_completion_tokens_;
  delta.token_ids.push_back(news.token);
  if (news.end == SequenceEnd::kStop) {
    FinishChoice(&choice, FinishReason::kStop, &delta);
    if (stop_token_has_logprobs_ && news.logprobs.has_value()) {
      delta.logprobs.push_back(LogprobsOf(news, choice.num_text_characters));
    }
    return false;
  }
  if (news.logprobs.has_value()) HoldLogprobs(news, &choice);
  const std::string text = choice.detokenizer.Push(news.token);
  const std::string shown = choice.stop_matcher.Push(text);
  delta.text += shown;
  if (news.logprobs.has_value()) {
    choice.num_text_bytes += text.size();
    choice.num_text_characters += NumCharacters(text);
    choice.num_shown_bytes += shown.size();
    ReleaseLogprobs(&choice, &delta);
  }
  if (choice.stop_matcher.stopped()) {
    FinishChoice(&choice, FinishReason::kStop, &delta);
    return !news.end.has_value();
  }
  if (news.end == SequenceEnd::kLength) FinishChoice(&choice, FinishReason::kLength, &delta);
  return false;
}

void RequestOutput::FinishChoice(Choice* choice, FinishReason reason, ChoiceDelta* delta) {
  if (!choice->stop_matcher.stopped()) {
    delta->text += choice->stop_matcher.Push(choice->detokenizer.Flush());
    delta->text += choice->stop_matcher.Flush();
    // All text is shown now, unless its last character made a stop string complete.
    if (!choice->stop_matcher.stopped()) choice->num_shown_bytes = choice->num_text_bytes + 1;
    ReleaseLogprobs(choice, delta);
  }
  choice->held.clear();
  delta->finish_reason = reason;
  choice->finished = true;
  --num_unfinished_;
}

TokenLogprobs RequestOutput::LogprobsOf(const SequenceToken& news, int text_offset) const {
  TokenLogprobs logprobs = {.token = EntryOf(news.token, news.logprobs->logprob),
                            .rank = news.logprobs->rank,
                            .text_offset = text_offset};
  logprobs.top.reserve(news.logprobs->top.size());
  for (const TokenLogprob& top : news.logprobs->top) {
    logprobs.top.push_back(EntryOf(top.token, top.logprob));
  }
  return logprobs;
}

void RequestOutput::HoldLogprobs(const SequenceToken& news, Choice* choice) const {
  choice->held.push_back({choice->num_text_bytes, LogprobsOf(news, choice->num_text_characters)});
}

void RequestOutput::ReleaseLogprobs(Choice* choice, ChoiceDelta* delta) {
  while (!choice->held.empty() && choice->held.front().text_begin < choice->num_shown_bytes) {
    delta->logprobs.push_back(std::move(choice->held.front().logprobs));
    choice->held.pop_front();
  }
}

LogprobEntry RequestOutput::EntryOf(int32_t token, float logprob) const {
  LogprobEntry entry = {.token_id = token, .bytes = tokenizer_.Bytes(token), .logprob = logprob};
  entry.text = SpellingOf(entry.bytes);
  return entry;
}

GenerationUpdate RequestOutput::Update() const {
  return {.num_prompt_tokens = num_prompt_tokens_,
          .num_completion_tokens = num_completion_tokens_,
          .num_cached_tokens = num_cached_tokens_};
}

void RequestOutput::Accept() { on_update_(Update()); }

void RequestOutput::Deliver() {
  if (deltas_.empty()) return;
  for (const ChoiceDelta& delta : deltas_) choices_[delta.index].delta = -1;
  GenerationUpdate update = Update();
  update.choices = std::exchange(deltas_, {});
  if (knows_prompt_logprobs_) update.prompt_logprobs = std::exchange(prompt_logprobs_, {});
  update.finished = finished();
  on_update_(std::move(update));
}

void RequestOutput::Fail(const absl::Status& error) {
  num_unfinished_ = 0;
  GenerationUpdate update = Update();
  update.choices = std::exchange(deltas_, {});
  update.finished = true;
  update.error = error;
  on_update_(std::move(update));
}

ChoiceDelta& RequestOutput::DeltaOf(uint32_t choice) {
  int& place = choices_[choice].delta;
  if (place < 0) {
    place = static_cast<int>(deltas_.size());
    deltas_.push_back({.index = static_cast<int>(choice)});
  }
  return deltas_[place];
}

}  // namespace wintserve
