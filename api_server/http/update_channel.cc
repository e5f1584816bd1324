#include "api_server/http/update_channel.h"

#include <boost/asio/post.hpp>
#include <utility>

namespace wintserve {
namespace {

int64_t SizeOf(const GenerationUpdate& update) {
  int64_t bytes = sizeof(update);
  for (const ChoiceDelta& delta : update.choices) {
    bytes += static_cast<int64_t>(sizeof(delta) + delta.text.size() +
                                  delta.token_ids.size() * sizeof(int32_t));
  }
  return bytes;
}

}  // namespace

void UpdateChannel::Push(size_t prompt_index, GenerationUpdate update) {
  MutexLock lock(&mutex_);
  if (closed_ || overflowed_) return;
  pending_bytes_ += SizeOf(update);
  overflowed_ = pending_bytes_ > max_pending_bytes_;
  pending_.push_back({prompt_index, std::move(update)});
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
  pending_bytes_ = 0;
  return std::exchange(pending_, {});
}

bool UpdateChannel::overflowed() const {
  MutexLock lock(&mutex_);
  return overflowed_;
}

void UpdateChannel::Close() {
  MutexLock lock(&mutex_);
  closed_ = true;
  pending_.clear();
}

}  // namespace wintserve
