// The states of the host tier's slots. Deals in slot numbers, never in bytes.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "absl/status/status.h"

namespace wintserve {

//   FREE           -> FILLING      Take
//   FILLING        -> VALID        EndFill
//   FILLING, VALID -> FREE         Discard
//   FILLING, VALID -> QUARANTINED  Discard, while a copy uses the slot
//   QUARANTINED    -> FREE         DropUser of the last one
//
// Users:     the copies under way from or to a slot. A slot that has users is never FREE, so no
//            copy ever runs on a slot that has been given to another entry.
// Threading: thread-compatible.
class HostTier {
 public:
  enum class State : uint8_t { kFree, kFilling, kValid, kQuarantined };

  explicit HostTier(uint32_t num_slots);

  // A FREE slot, now FILLING, with the copy that fills it as its one user.
  std::optional<uint32_t> Take();
  // FILLING -> VALID; the filling copy is no user any more.
  void EndFill(uint32_t slot);
  // The slot's entry has no more use for it. REQUIRES: FILLING or VALID.
  void Discard(uint32_t slot);
  void AddUser(uint32_t slot) { ++slots_[slot].users; }
  void DropUser(uint32_t slot);

  State state(uint32_t slot) const { return slots_[slot].state; }
  uint32_t users(uint32_t slot) const { return slots_[slot].users; }
  uint32_t num_slots() const { return static_cast<uint32_t>(slots_.size()); }
  uint32_t num_free() const { return static_cast<uint32_t>(free_.size()); }
  // Linear in num_slots().
  uint32_t Count(State state) const;
  absl::Status CheckInvariants() const;

 private:
  struct Slot {
    State state = State::kFree;
    uint32_t users = 0;
  };

  void Free(uint32_t slot);

  std::vector<Slot> slots_;
  std::vector<uint32_t> free_;  // a stack
};

}  // namespace wintserve
