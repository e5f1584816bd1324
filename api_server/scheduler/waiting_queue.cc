#include "api_server/scheduler/waiting_queue.h"

#include <algorithm>
#include <cmath>

#include "common/check.h"

namespace wintserve {
namespace {

constexpr double kMemorySeconds = 30;
constexpr double kEnoughSeconds = 1;  // of waiting, before a rate is given

bool ByRank(const Sequence* a, const Sequence* b) { return a->rank < b->rank; }

}  // namespace

void DrainRate::Observe(int64_t now_us, bool was_waiting, int num_left) {
  const double seconds = static_cast<double>(now_us - last_us_) / 1e6;
  last_us_ = now_us;
  if (!was_waiting) return;
  const double kept = std::exp(-seconds / kMemorySeconds);
  num_left_ = num_left_ * kept + num_left;
  busy_seconds_ = busy_seconds_ * kept + seconds;
}

std::optional<double> DrainRate::SecondsFor(double num_sequences) const {
  if (busy_seconds_ < kEnoughSeconds || num_left_ < 1) return std::nullopt;
  return num_sequences * busy_seconds_ / num_left_;
}

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
