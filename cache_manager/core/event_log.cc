#include "cache_manager/core/event_log.h"

#include <iterator>
#include <utility>

namespace wintserve {

void EventLog::Add(CacheEvent event) {
  if (pending_.size() == max_pending_) {
    pending_.pop_front();
    ++lost_;
  }
  pending_.push_back(std::move(event));
}

std::vector<CacheEvent> EventLog::Take(uint64_t* lost) {
  *lost = std::exchange(lost_, 0);
  std::vector<CacheEvent> events(std::make_move_iterator(pending_.begin()),
                                 std::make_move_iterator(pending_.end()));
  pending_.clear();
  return events;
}

}  // namespace wintserve
