#include "api_server/scheduler/waiting_queue.h"

#include <fmt/core.h>

#include <algorithm>

#include "common/check.h"

namespace wintserve {
namespace {

using SortedDeque = std::deque<Sequence*>;  // by rank

// Returns its index.
size_t InsertByRank(Sequence* sequence, SortedDeque* deque) {
  const auto place = std::upper_bound(deque->begin(), deque->end(), sequence, ByRank());
  const auto index = static_cast<size_t>(place - deque->begin());
  deque->insert(place, sequence);
  return index;
}

// Returns the index that it had. REQUIRES: it is there.
size_t EraseByRank(const Sequence* sequence, SortedDeque* deque) {
  const auto found = std::lower_bound(deque->begin(), deque->end(), sequence, ByRank());
  CHECK(found != deque->end() && *found == sequence);
  const auto index = static_cast<size_t>(found - deque->begin());
  deque->erase(found);
  return index;
}

// How many have at most that priority value.
int CountBefore(const SortedDeque& deque, int priority) {
  const auto first_behind = std::partition_point(
      deque.begin(), deque.end(),
      [priority](const Sequence* sequence) { return sequence->rank.priority <= priority; });
  return static_cast<int>(first_behind - deque.begin());
}

// Index of the first one behind that rank.
size_t FirstBehind(const SortedDeque& deque, const SequenceRank& rank) {
  const auto first_behind =
      std::partition_point(deque.begin(), deque.end(),
                           [&rank](const Sequence* sequence) { return sequence->rank <= rank; });
  return static_cast<size_t>(first_behind - deque.begin());
}

}  // namespace

int WaitingQueue::Room(const Tenant& tenant) const {
  return std::max(0, max_seqs_per_tenant_ - tenant.num_running);
}

void WaitingQueue::FillRoom(Tenant* tenant) {
  const size_t num_in_line = std::min(tenant->waiting.size(), static_cast<size_t>(Room(*tenant)));
  while (tenant->num_in_line > num_in_line) {
    EraseByRank(tenant->waiting[--tenant->num_in_line], &line_);
  }
  while (tenant->num_in_line < num_in_line) {
    InsertByRank(tenant->waiting[tenant->num_in_line++], &line_);
  }
}

void WaitingQueue::Insert(Sequence* sequence, int64_t num_tokens) {
  sequence->num_waiting_tokens = num_tokens;
  num_tokens_ += num_tokens;
  ++size_;
  Tenant* tenant = sequence->request->tenant;
  if (tenant == nullptr) {
    InsertByRank(sequence, &line_);
    return;
  }
  if (InsertByRank(sequence, &tenant->waiting) < tenant->num_in_line) {
    InsertByRank(sequence, &line_);
    ++tenant->num_in_line;
  }
  FillRoom(tenant);
}

void WaitingQueue::TakeOut(Sequence* sequence) {
  --size_;
  num_tokens_ -= sequence->num_waiting_tokens;
  sequence->num_waiting_tokens = 0;
  Tenant* tenant = sequence->request->tenant;
  if (tenant != nullptr) {
    if (EraseByRank(sequence, &tenant->waiting) >= tenant->num_in_line) return;
    --tenant->num_in_line;
  }
  EraseByRank(sequence, &line_);
}

void WaitingQueue::Remove(Sequence* sequence) {
  TakeOut(sequence);
  if (Tenant* tenant = sequence->request->tenant) FillRoom(tenant);
}

void WaitingQueue::Start(Sequence* sequence) {
  TakeOut(sequence);
  Tenant* tenant = sequence->request->tenant;
  if (tenant == nullptr) return;
  CHECK(tenant->num_running < max_seqs_per_tenant_, "num_running={}", tenant->num_running);
  ++tenant->num_running;
  FillRoom(tenant);
}

void WaitingQueue::StopRunning(Tenant* tenant) {
  CHECK(tenant->num_running > 0);
  --tenant->num_running;
  FillRoom(tenant);
}

void WaitingQueue::SetTokens(Sequence* sequence, int64_t num_tokens) {
  num_tokens_ += num_tokens - sequence->num_waiting_tokens;
  sequence->num_waiting_tokens = num_tokens;
}

int WaitingQueue::NumBefore(int priority, const Tenant* tenant) const {
  const int num_in_line = CountBefore(line_, priority);
  if (tenant == nullptr) return num_in_line;
  // Of its own, those that are parked as well.
  const int num_own = CountBefore(tenant->waiting, priority);
  return num_in_line + std::max(0, num_own - static_cast<int>(tenant->num_in_line));
}

absl::Status WaitingQueue::CheckInvariants(
    const std::unordered_map<std::string, Tenant>& tenants) const {
  const auto is_sorted = [](const SortedDeque& deque) {
    return std::is_sorted(deque.begin(), deque.end(), ByRank());
  };
  int64_t num_tokens = 0;
  size_t size = 0;
  for (const Sequence* sequence : line_) {
    if (sequence->request->tenant != nullptr) continue;
    ++size;
    num_tokens += sequence->num_waiting_tokens;
  }
  SortedDeque line;
  for (const auto& [name, tenant] : tenants) {
    size += tenant.waiting.size();
    for (const Sequence* sequence : tenant.waiting) num_tokens += sequence->num_waiting_tokens;
    const auto room = static_cast<size_t>(Room(tenant));
    if (!is_sorted(tenant.waiting) || tenant.num_in_line != std::min(room, tenant.waiting.size())) {
      return absl::InternalError(
          fmt::format("{} of {} sequences of tenant {} stand in line, it has room for {}",
                      tenant.num_in_line, tenant.waiting.size(), name, room));
    }
    line.insert(line.end(), tenant.waiting.begin(), tenant.waiting.begin() + tenant.num_in_line);
  }
  for (Sequence* sequence : line_) {
    if (sequence->request->tenant == nullptr) line.push_back(sequence);
  }
  std::sort(line.begin(), line.end(), ByRank());
  if (line != line_) {
    return absl::InternalError(
        fmt::format("{} sequences stand in line, {} should", line_.size(), line.size()));
  }
  if (static_cast<int>(size) != size_ || num_tokens != num_tokens_) {
    return absl::InternalError(fmt::format("{} sequences of {} tokens wait, counted were {} of {}",
                                           size, num_tokens, size_, num_tokens_));
  }
  return absl::OkStatus();
}

Sequence* QueueWalk::Next() {
  AddParkedBehindLast();
  const size_t index = FirstBehind(queue_.line_, last_rank_);
  Sequence* next = index < queue_.line_.size() ? queue_.line_[index] : nullptr;
  if (!parked_.empty() && (next == nullptr || parked_.top()->rank < next->rank)) {
    next = parked_.top();
    parked_.pop();
  }
  if (next == nullptr) return nullptr;
  last_rank_ = next->rank;
  last_tenant_ = next->request->tenant;
  return next;
}

void QueueWalk::CountIn() {
  if (last_tenant_ != nullptr) ++counted_in_[last_tenant_];
}

// Whoever was neither started nor counted in leaves its room to the next one of its tenant.
void QueueWalk::AddParkedBehindLast() {
  if (last_tenant_ == nullptr) return;
  const Tenant& tenant = *last_tenant_;
  const size_t index = FirstBehind(tenant.waiting, last_rank_);
  if (index < tenant.num_in_line || index == tenant.waiting.size()) return;
  const auto counted_in = counted_in_.find(&tenant);
  const int num_counted_in = counted_in == counted_in_.end() ? 0 : counted_in->second;
  if (num_counted_in < queue_.Room(tenant)) parked_.push(tenant.waiting[index]);
}

}  // namespace wintserve
