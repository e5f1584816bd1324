// From the engine's thread to one connection.
#pragma once

#include <boost/asio/any_io_executor.hpp>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "api_server/llm/llm.h"
#include "common/mutex.h"

namespace wintserve {

struct PromptUpdate {
  size_t prompt_index = 0;
  GenerationUpdate update;
};

// What waits for a slow reader is merged into one update a prompt with one delta a choice, so that
// it takes the memory of the text itself, however many updates brought it.
//
// Push from any thread; everything else on the connection's IO thread. May outlive the connection:
// the LLM's callback holds it, and after Close a Push does nothing.
class UpdateChannel : public std::enable_shared_from_this<UpdateChannel> {
 public:
  // on_news runs on `executor` after a Push, once for all that came since the last time.
  UpdateChannel(boost::asio::any_io_executor executor, int64_t max_pending_bytes,
                std::function<void()> on_news)
      : executor_(std::move(executor)),
        max_pending_bytes_(max_pending_bytes),
        on_news_(std::move(on_news)) {}

  void Push(size_t prompt_index, GenerationUpdate update) EXCLUDES(mutex_);
  // All that is pending, by prompt.
  std::vector<PromptUpdate> Take() EXCLUDES(mutex_);
  // More than max_pending_bytes wait to be taken. Nothing is lost; the reader should be given up if
  // that lasts.
  bool is_over_limit() const EXCLUDES(mutex_);
  // on_news is not called any more, and nothing is pending.
  void Close() EXCLUDES(mutex_);

 private:
  void Notify() EXCLUDES(mutex_);

  const boost::asio::any_io_executor executor_;
  const int64_t max_pending_bytes_;
  const std::function<void()> on_news_;
  mutable Mutex mutex_;
  std::map<size_t, GenerationUpdate> pending_ GUARDED_BY(mutex_);  // by prompt
  int64_t pending_bytes_ GUARDED_BY(mutex_) = 0;
  bool notified_ GUARDED_BY(mutex_) = false;
  bool closed_ GUARDED_BY(mutex_) = false;
};

}  // namespace wintserve
