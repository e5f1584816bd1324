#include "api_server/scheduler/waiting_queue.h"

#include <fmt/core.h>

#include <algorithm>
#include <utility>

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

void WaitingQueue::Advance(int64_t now_us) {
  now_us_ = now_us;
  drain_rate_.Observe(now_us, !empty(), 0);
  line_drain_rate_.Observe(now_us, num_in_line() > num_taking_back_, 0);
}

void WaitingQueue::EnterLine(Sequence* sequence, bool was_parked) {
  const size_t index = InsertByRank(sequence, &line_);
  // They are few: no more than places that were given up since the last step.
  sequence->takes_back =
      was_parked && std::all_of(line_.begin(), line_.begin() + index,
                                [](const Sequence* before) { return before->takes_back; });
  if (sequence->takes_back) ++num_taking_back_;
}

void WaitingQueue::LeaveLine(Sequence* sequence) {
  EraseByRank(sequence, &line_);
  if (std::exchange(sequence->takes_back, false)) --num_taking_back_;
}

void WaitingQueue::FillRoom(Tenant* tenant) {
  const size_t num_in_line = std::min(tenant->waiting.size(), static_cast<size_t>(Room(*tenant)));
  while (tenant->num_in_line > num_in_line) {
    LeaveLine(tenant->waiting[--tenant->num_in_line]);
  }
  while (tenant->num_in_line < num_in_line) {
    EnterLine(tenant->waiting[tenant->num_in_line++], /*was_parked=*/true);
  }
}

void WaitingQueue::Insert(Sequence* sequence, int64_t num_tokens) {
  sequence->num_waiting_tokens = num_tokens;
  num_tokens_ += num_tokens;
  ++size_;
  Tenant* tenant = sequence->request->tenant;
  if (tenant == nullptr) return EnterLine(sequence, /*was_parked=*/false);
  tenant->drain_rate.Observe(now_us_, !tenant->waiting.empty(), 0);
  const bool has_room = tenant->waiting.size() < static_cast<size_t>(Room(*tenant));
  if (InsertByRank(sequence, &tenant->waiting) >= tenant->num_in_line && !has_room) return;
  EnterLine(sequence, /*was_parked=*/false);
  ++tenant->num_in_line;
  FillRoom(tenant);  // whoever has no room any more is parked
}

void WaitingQueue::TakeOut(Sequence* sequence) {
  --size_;
  num_tokens_ -= sequence->num_waiting_tokens;
  sequence->num_waiting_tokens = 0;
  Tenant* tenant = sequence->request->tenant;
  if (tenant != nullptr) {
    tenant->drain_rate.Observe(now_us_, true, 0);
    if (EraseByRank(sequence, &tenant->waiting) >= tenant->num_in_line) return;
    --tenant->num_in_line;
  }
  LeaveLine(sequence);
}

void WaitingQueue::Remove(Sequence* sequence) {
  TakeOut(sequence);
  if (Tenant* tenant = sequence->request->tenant) FillRoom(tenant);
}

void WaitingQueue::Start(Sequence* sequence) {
  const bool takes_back = sequence->takes_back;
  TakeOut(sequence);
  drain_rate_.Observe(now_us_, true, 1);
  if (!takes_back) line_drain_rate_.Observe(now_us_, true, 1);
  Tenant* tenant = sequence->request->tenant;
  if (tenant == nullptr) return;
  tenant->drain_rate.Observe(now_us_, true, 1);
  CHECK(tenant->num_running < max_seqs_per_tenant_, "num_running={}", tenant->num_running);
  ++tenant->num_running;
  FillRoom(tenant);
}

bool WaitingQueue::RunAgain(Tenant* tenant) {
  if (Room(*tenant) == 0) return false;
  ++tenant->num_running;
  FillRoom(tenant);
  return true;
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

std::optional<double> WaitingQueue::WaitSeconds(int priority, const Tenant* tenant) const {
  std::optional<double> seconds;
  if (num_in_line() > num_taking_back_) {
    seconds = line_drain_rate_.SecondsFor(CountBefore(line_, priority) + 1);
  }
  if (tenant == nullptr) return seconds;
  const int num_own = CountBefore(tenant->waiting, priority);
  if (num_own < Room(*tenant)) return seconds;
  DrainRate own = tenant->drain_rate;
  own.Observe(now_us_, !tenant->waiting.empty(), 0);
  return std::max(seconds, own.SecondsFor(num_own + 1));  // an unknown one is the least
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
  const auto num_taking_back = std::count_if(
      line.begin(), line.end(), [](const Sequence* sequence) { return sequence->takes_back; });
  if (num_taking_back != num_taking_back_) {
    return absl::InternalError(fmt::format("{} in line take back a place, counted were {}",
                                           num_taking_back, num_taking_back_));
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
