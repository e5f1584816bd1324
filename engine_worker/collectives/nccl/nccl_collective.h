// Collectives between GPUs of one host: small ones through each other's memory
// (kernels/cuda/collective), the others through NCCL.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <thread>

#include "absl/status/statusor.h"
#include "engine_worker/collectives/collective.h"
#include "engine_worker/collectives/nccl/nccl_library.h"
#include "engine_worker/collectives/shm/shm_collective.h"

namespace wintserve {

// Of ShmGroup, for the group through which NcclCollective meets and aborts.
inline constexpr int64_t kNcclControlSlotBytes = 4096;

// UNAVAILABLE: NCCL is not on this machine; the message says what is missing. For before a model is
// loaded.
absl::Status CheckNccl();

// "2.28.9"; of the library. REQUIRES: CheckNccl().ok().
std::string NcclVersion();

// Device memory that a rank of a group takes when it is created, rounded up.
int64_t NcclGroupMemoryBytes(int world_size);

struct NcclGroup {
  cudaStream_t stream = nullptr;  // of the operators between which operations stand
  // Up to so many bytes of a rank an operation goes through the peers' memory. kMeasured: as long
  // as that is faster. 0: never.
  static constexpr int64_t kMeasured = -1;
  int64_t max_peer_bytes = kMeasured;
  // Called when the ranks have met, before NCCL connects them. For tests.
  std::function<void()> before_init = nullptr;
};

// Operations are put on the stream and return; what they report is what can be known then. They may
// be captured in a graph, which is destroyed before the collective is.
//
// Order of additions: rank order, in float32, in every message. Of two ranks any order is that, so
// large sums go through NCCL; with more they go through the peers' memory in parts. Where
// GPUs cannot reach each other's memory, more than two ranks add up in the order that NCCL chooses
// for the size; a warning says so.
//
// How it ends: by an abort of the group, also when it is destroyed, and also while it is still
// being created. A thread of each rank waits for that; it ends what the device waits in, and NCCL.
// The thread that calls the operations may be waiting for the device meanwhile, or for peers inside
// NCCL, or destroying graphs: NCCL demands that both go on at the same time.
//
// Ownership: borrows the stream; the device of the creating thread.
// Threading: as Collective.
class NcclCollective : public Collective {
 public:
  // Called by every rank at the same time; returns when all are there. `control` was used by nobody
  // yet. UNAVAILABLE: no NCCL, or a rank is gone; RESOURCE_EXHAUSTED: no device memory; INTERNAL:
  // whatever else NCCL says. If one rank fails, all do. After an abort of `control`, UNAVAILABLE
  // within a second.
  static absl::StatusOr<std::unique_ptr<NcclCollective>> Create(
      std::unique_ptr<ShmCollective> control, const NcclGroup& group);
  // Waits, for at most a second, until the other ranks have let go of this one's memory: have left
  // as well, or are seen to have ended.
  ~NcclCollective() override;

  int rank() const override;
  int world_size() const override;
  absl::Status AllReduceSum(float* data, int64_t count) override;
  absl::Status AllGather(const float* in, int64_t count, float* out) override;
  absl::Status Broadcast(void* data, int64_t size_bytes) override;
  absl::Status DeviceStatus() override;
  void Abort() override;

  // Whether small operations go through the peers' memory.
  bool uses_peer_memory() const;

 private:
  struct State;

  explicit NcclCollective(std::shared_ptr<State> state);
  absl::Status Join(const std::function<void()>& before_init);
  absl::Status WarmUp();
  void SumThroughPeers(float* data, int64_t count);
  // Calls NCCL unless the group was aborted.
  template <typename Call>
  absl::Status CallNccl(const char* what, const Call& call);

  const std::shared_ptr<State> state_;  // shared with watcher_
  std::thread watcher_;
};

}  // namespace wintserve
