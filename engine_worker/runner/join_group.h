// How ranks that have loaded their slices become a group.
#pragma once

#include <cstdint>
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

// Waits for the other ranks where the backend's devices have to meet first. The backend outlives
// the collective. Errors: those of FetchGroupMemory, and of the collective's creation.
absl::StatusOr<std::unique_ptr<Collective>> JoinGroup(const GroupPlace& place,
                                                      const kernels::Backend& backend);

}  // namespace wintserve
