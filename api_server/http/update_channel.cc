#include "api_server/http/update_channel.h"

#include <algorithm>
#include <boost/asio/post.hpp>
#include <iterator>
#include <utility>

namespace wintserve {
namespace {

int64_t SizeOf(const TokenLogprobs& logprobs) {
  return static_cast<int64_t>(sizeof(TokenLogprobs) + logprobs.top.size() * sizeof(LogprobEntry));
}

int64_t SizeOf(const PromptLogprobs& prompt) {
  auto bytes = static_cast<int64_t>(prompt.token_ids.size() * sizeof(int32_t));
  for (const PositionLogprobs& position : prompt.positions) {
    bytes +=
        static_cast<int64_t>(sizeof(PositionLogprobs) + position.top.size() * sizeof(TokenLogprob));
  }
  return bytes;
}

int64_t SizeOf(const ChoiceDelta& delta) {
  auto bytes = static_cast<int64_t>(delta.text.size() + delta.token_ids.size() * sizeof(int32_t));
  for (const TokenLogprobs& logprobs : delta.logprobs) bytes += SizeOf(logprobs);
  return bytes;
}

// Appends the news of a choice to those that wait. Returns the bytes that this adds.
int64_t Merge(ChoiceDelta delta, std::vector<ChoiceDelta>* pending) {
  const int64_t bytes = SizeOf(delta);
  const auto same = std::find_if(pending->begin(), pending->end(), [&](const ChoiceDelta& other) {
    return other.index == delta.index;
  });
  if (same == pending->end()) {
    pending->push_back(std::move(delta));
    return bytes + static_cast<int64_t>(sizeof(ChoiceDelta));
  }
  same->text += delta.text;
  same->token_ids.insert(same->token_ids.end(), delta.token_ids.begin(), delta.token_ids.end());
  same->logprobs.insert(same->logprobs.end(), std::make_move_iterator(delta.logprobs.begin()),
                        std::make_move_iterator(delta.logprobs.end()));
  if (delta.finish_reason.has_value()) same->finish_reason = delta.finish_reason;
  return bytes;
}

// As if both had come at once.
int64_t Merge(GenerationUpdate update, GenerationUpdate* pending) {
  std::vector<ChoiceDelta> choices = std::move(pending->choices);
  int64_t bytes = 0;
  for (ChoiceDelta& delta : update.choices) bytes += Merge(std::move(delta), &choices);
  if (update.prompt_logprobs.has_value()) {
    bytes += SizeOf(*update.prompt_logprobs);
  } else {
    update.prompt_logprobs = std::move(pending->prompt_logprobs);
  }
  *pending = std::move(update);  // its counts and its end are the newer ones
  pending->choices = std::move(choices);
  return bytes;
}

}  // namespace

void UpdateChannel::Push(size_t prompt_index, GenerationUpdate update) {
  MutexLock lock(&mutex_);
  if (closed_) return;
  pending_bytes_ += Merge(std::move(update), &pending_[prompt_index]);
  if (notified_) return;
  notified_ = true;
  // Under the lock: Close cannot come between, so the executor is still alive.
  boost::asio::post(executor_, [self = shared_from_this()] { self->Notify(); });
}

void UpdateChannel::Notify() {
  {
    MutexLock lock(&mutex_);
    notified_ = false;
    if (closed_) return;
  }
  on_news_();
}

std::vector<PromptUpdate> UpdateChannel::Take() {
  MutexLock lock(&mutex_);
  std::vector<PromptUpdate> updates;
  for (auto& [prompt_index, update] : pending_)
    updates.push_back({prompt_index, std::move(update)});
  pending_.clear();
  pending_bytes_ = 0;
  return updates;
}

bool UpdateChannel::is_over_limit() const {
  MutexLock lock(&mutex_);
  return pending_bytes_ > max_pending_bytes_;
}

void UpdateChannel::Close() {
  MutexLock lock(&mutex_);
  closed_ = true;
  pending_.clear();
  pending_bytes_ = 0;
}

}  // namespace wintserve
