// What has happened to entries since someone last asked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <vector>

#include "cache_manager/core/cache_messages.h"

namespace wintserve {

// Threading: thread-compatible.
class EventLog {
 public:
  explicit EventLog(size_t max_pending) : max_pending_(max_pending) {}

  // Beyond max_pending the oldest event is dropped.
  void Add(CacheEvent event);
  // All pending events, oldest first. `lost`: how many were dropped since the last call.
  std::vector<CacheEvent> Take(uint64_t* lost);

 private:
  const size_t max_pending_;
  std::deque<CacheEvent> pending_;
  uint64_t lost_ = 0;
};

}  // namespace wintserve
