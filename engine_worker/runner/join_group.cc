#include "engine_worker/runner/join_group.h"

#include <utility>

#include "common/status_macros.h"
#include "engine_worker/collectives/shm/group_memory.h"
#include "engine_worker/collectives/shm/shm_collective.h"
#include "engine_worker/collectives/single_rank_collective.h"
#ifdef WINTSERVE_HAS_CUDA
#include "engine_worker/collectives/nccl/nccl_collective.h"
#include "kernels/cuda/cuda_backend.h"
#endif

namespace wintserve {
namespace {

constexpr int64_t kMemoryTimeoutMs = 30'000;

// Longer messages take several rounds. Two buffers of four ranks are 4 MiB, which a second-level
// cache does not hold; smaller slots would pay for more rounds than they save.
constexpr int64_t kSlotBytes = 512 << 10;

absl::StatusOr<std::unique_ptr<ShmCollective>> JoinThroughMemory(const GroupPlace& place,
                                                                 int64_t slot_bytes) {
  absl::StatusOr<MappedMemory> memory =
      FetchGroupMemory(place.supervisor_socket, place.token, place.group_epoch,
                       ShmGroupMemoryBytes(place.world_size, slot_bytes), kMemoryTimeoutMs);
  if (absl::IsUnavailable(memory.status())) {
    return absl::DeadlineExceededError(memory.status().message());
  }
  RETURN_IF_ERROR(memory.status());
  return ShmCollective::Create(std::make_shared<MappedMemory>(*std::move(memory)),
                               {.group_epoch = place.group_epoch,
                                .rank = place.rank,
                                .world_size = place.world_size,
                                .slot_bytes = slot_bytes});
}

}  // namespace

absl::StatusOr<std::unique_ptr<Collective>> JoinGroup(
    const GroupPlace& place, const kernels::Backend& backend,
    [[maybe_unused]] const std::function<void(std::function<void()> abort)>& on_waiting) {
  if (place.world_size == 1) return MakeSingleRankCollective();
  if (backend.uses_host_memory()) return JoinThroughMemory(place, kSlotBytes);
#ifdef WINTSERVE_HAS_CUDA
  ASSIGN_OR_RETURN(std::unique_ptr<ShmCollective> control,
                   JoinThroughMemory(place, kNcclControlSlotBytes));
  on_waiting(control->AbortFunction());
  return NcclCollective::Create(std::move(control), {.stream = kernels::cuda::StreamOf(backend)});
#else
  return absl::UnimplementedError("this build has no collectives for a device of its own memory");
#endif
}

}  // namespace wintserve
