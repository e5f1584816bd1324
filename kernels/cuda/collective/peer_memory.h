// The memory through which GPUs of one host exchange small messages (peer_exchange.h).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <span>
#include <type_traits>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/cuda/collective/peer_exchange.h"
#include "kernels/cuda/handles.h"

namespace wintserve::kernels::cuda {

// What a rank tells the others, so that they can write to its memory. Goes from process to process
// as bytes.
struct PeerHandle {
  uint64_t process = 0;  // drawn once a process: pids of different containers may be equal
  uint64_t address = 0;  // in that process
  int64_t size_bytes = 0;
  char device[32] = {};  // its PCI address, which is the same for every process
  cudaIpcMemHandle_t memory = {};
};
static_assert(std::is_trivially_copyable_v<PeerHandle>);

// Ownership: this rank's memory, and the mappings of the others'. They must have ended with each
//            other's memory before one of them goes.
// Threading: as the launches on its group(); Abort() from any thread.
class PeerMemory {
 public:
  // Of the current device. RESOURCE_EXHAUSTED: no memory.
  static absl::StatusOr<std::unique_ptr<PeerMemory>> Create(int rank, int world_size);
  ~PeerMemory();

  const PeerHandle& handle() const { return handle_; }

  // `handles`: of all ranks in their order. UNAVAILABLE: a device cannot reach another's memory;
  // INVALID_ARGUMENT: a handle is none of this version. The message names the rank.
  absl::Status Open(std::span<const PeerHandle> handles);

  // For launches, once it is open.
  const PeerGroup& group() const { return group_; }

  // Launches end from now on without waiting. What they compute is not defined.
  void Abort();

 private:
  PeerMemory() = default;
  absl::Status OpenOne(int rank, const PeerHandle& handle);

  PeerHandle handle_;
  PeerGroup group_;
  DeviceBuffer memory_;
  PinnedBuffer abort_word_;
  std::vector<void*> mappings_;  // of other processes' memory
};

}  // namespace wintserve::kernels::cuda
