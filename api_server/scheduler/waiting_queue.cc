#include "api_server/scheduler/waiting_queue.h"

#include <algorithm>

#include "common/check.h"

namespace wintserve {
namespace {

bool ByRank(const Sequence* a, const Sequence* b) { return a->rank < b->rank; }

}  // namespace

void WaitingQueue::Insert(Sequence* sequence, int64_t num_tokens) {
  queue_.insert(std::upper_bound(queue_.begin(), queue_.end(), sequence, ByRank), sequence);
  sequence->num_waiting_tokens = num_tokens;
  num_tokens_ += num_tokens;
}

void WaitingQueue::Remove(Sequence* sequence) {
  const auto found = std::lower_bound(queue_.begin(), queue_.end(), sequence, ByRank);
  CHECK(found != queue_.end() && *found == sequence);
  queue_.erase(found);
  num_tokens_ -= sequence->num_waiting_tokens;
  sequence->num_waiting_tokens = 0;
}

void WaitingQueue::SetTokens(Sequence* sequence, int64_t num_tokens) {
  num_tokens_ += num_tokens - sequence->num_waiting_tokens;
  sequence->num_waiting_tokens = num_tokens;
}

int WaitingQueue::NumBefore(int priority) const {
  const auto first_behind = std::partition_point(
      queue_.begin(), queue_.end(),
      [priority](const Sequence* sequence) { return sequence->rank.priority <= priority; });
  return static_cast<int>(first_behind - queue_.begin());
}

}  // namespace wintserve
