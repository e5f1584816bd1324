// How ranks that have loaded their slices become a group.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "engine_worker/collectives/collective.h"
#include "kernels/backend.h"

namespace wintserve {

struct GroupPlace {
  std::string supervisor_socket;  // which lends the ranks memory to meet in
  std::string token;
  uint64_t group_epoch = 0;
  int rank = 0;
  int world_size = 1;
};

// Waits for the other ranks where the backend's devices have to meet first; `on_waiting` gets what
// ends that wait, from any thread. The backend outlives the collective. UNAVAILABLE: another rank
// is gone, or the wait was ended. Other errors: those of the collective's creation, and of
// FetchGroupMemory, whose UNAVAILABLE is DEADLINE_EXCEEDED here.
absl::StatusOr<std::unique_ptr<Collective>> JoinGroup(
    const GroupPlace& place, const kernels::Backend& backend,
    const std::function<void(std::function<void()> abort)>& on_waiting);

}  // namespace wintserve
