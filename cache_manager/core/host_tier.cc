#include "cache_manager/core/host_tier.h"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>
#include <set>

#include "common/check.h"

namespace wintserve {

HostTier::HostTier(uint32_t num_slots) : slots_(num_slots), free_(num_slots) {
  std::iota(free_.rbegin(), free_.rend(), 0u);
}

std::optional<uint32_t> HostTier::Take() {
  if (free_.empty()) return std::nullopt;
  const uint32_t slot = free_.back();
  free_.pop_back();
  slots_[slot] = {State::kFilling, 1};
  return slot;
}

void HostTier::EndFill(uint32_t slot) {
  CHECK(slots_[slot].state == State::kFilling && slots_[slot].users == 1, "slot={}", slot);
  slots_[slot] = {State::kValid, 0};
}

void HostTier::Discard(uint32_t slot) {
  Slot& s = slots_[slot];
  CHECK(s.state == State::kFilling || s.state == State::kValid, "slot={}", slot);
  if (s.users == 0) {
    Free(slot);
  } else {
    s.state = State::kQuarantined;
  }
}

void HostTier::DropUser(uint32_t slot) {
  Slot& s = slots_[slot];
  CHECK(s.users > 0, "slot={}", slot);
  if (--s.users == 0 && s.state == State::kQuarantined) Free(slot);
}

void HostTier::Free(uint32_t slot) {
  slots_[slot].state = State::kFree;
  free_.push_back(slot);
}

uint32_t HostTier::Count(State state) const {
  return static_cast<uint32_t>(std::ranges::count(slots_, state, &Slot::state));
}

absl::Status HostTier::CheckInvariants() const {
  const std::set<uint32_t> distinct(free_.begin(), free_.end());
  if (distinct.size() != free_.size() || free_.size() != Count(State::kFree)) {
    return absl::InternalError(fmt::format("the free host slots: {} listed, {} distinct, {} free",
                                           free_.size(), distinct.size(), Count(State::kFree)));
  }
  for (uint32_t slot = 0; slot < num_slots(); ++slot) {
    const Slot& s = slots_[slot];
    const bool must_have_users = s.state == State::kFilling || s.state == State::kQuarantined;
    if ((must_have_users && s.users == 0) || (s.state == State::kFree && s.users != 0)) {
      return absl::InternalError(fmt::format("host slot {} has {} users in state {}", slot, s.users,
                                             static_cast<int>(s.state)));
    }
  }
  return absl::OkStatus();
}

}  // namespace wintserve
