// What the ranks of a tensor-parallel group compute together.
#pragma once

#include <cstdint>

#include "absl/status/status.h"

namespace wintserve {

// Every rank calls the same operations in the same order with the same sizes. Data is device memory
// of the ranks' backends (host memory on CPUs), and an operation stands in the order of the
// backend's operators: those called before it have written its input, those called after it read
// its result.
//
// Threading: one thread per rank; Abort() and DeviceStatus() from any thread.
// Errors:    UNAVAILABLE when a peer is gone or the group was aborted; the group is then unusable.
class Collective {
 public:
  virtual ~Collective() = default;
  virtual int rank() const = 0;
  virtual int world_size() const = 0;

  // data [count] becomes the sum over ranks, added in rank order in float32: equal bits on every
  // rank.
  virtual absl::Status AllReduceSum(float* data, int64_t count) = 0;
  // out [world_size, count] = the inputs [count] of all ranks in rank order. out must not overlap
  // in.
  virtual absl::Status AllGather(const float* in, int64_t count, float* out) = 0;
  // data [size_bytes] of rank 0 on every rank.
  virtual absl::Status Broadcast(void* data, int64_t size_bytes) = 0;

  // Of operations that returned OK and that the device has since done, as an event that was
  // recorded after them says: UNAVAILABLE when an abort may have cut them short, so that their
  // results do not count. Any thread.
  virtual absl::Status DeviceStatus() { return absl::OkStatus(); }

  // Ends the group on every rank, also for those that wait inside an operation or whose device
  // does. Returns at once; the waiting ends within a second. Idempotent. Without peers there is
  // nothing to end.
  virtual void Abort() {}
};

}  // namespace wintserve
