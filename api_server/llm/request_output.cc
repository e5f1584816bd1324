#include "api_server/llm/request_output.h"

#include <utility>

#include "common/check.h"

namespace wintserve {

RequestOutput::RequestOutput(const Tokenizer& tokenizer, const GenerationRequest& request,
                             std::function<void(GenerationUpdate)> on_update)
    : on_update_(std::move(on_update)),
      num_prompt_tokens_(static_cast<int>(request.prompt_ids.size())),
      num_unfinished_(request.num_choices) {
  choices_.reserve(request.num_choices);
  for (int i = 0; i < request.num_choices; ++i) {
    choices_.push_back({.detokenizer = Detokenizer(tokenizer),
                        .stop_matcher = StopMatcher(request.stop, request.include_stop_in_output)});
  }
}

bool RequestOutput::Append(const SequenceToken& news) {
  Choice& choice = choices_[news.sequence.choice];
  CHECK(!choice.finished, "request={} choice={}", news.sequence.request, news.sequence.choice);
  ++num_completion_tokens_;
  ChoiceDelta& delta = DeltaOf(news.sequence.choice);
  delta.token_ids.push_back(news.token);
  if (news.end == SequenceEnd::kStop) {
    FinishChoice(&choice, FinishReason::kStop, &delta);
    return false;
  }
  delta.text += choice.stop_matcher.Push(choice.detokenizer.Push(news.token));
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
  }
  delta->finish_reason = reason;
  choice->finished = true;
  --num_unfinished_;
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
