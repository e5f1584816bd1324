// Device memory for what operators keep from one of their kernels to the next.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "kernels/cuda/handles.h"

namespace wintserve::kernels::cuda {

// Operators use it one after another, each for its own; as large as the largest has asked for. It
// grows while a model warms up; growing waits for the device, and cannot be captured.
class Scratch {
 public:
  // At least so large. Growing gives up what was there before. RESOURCE_EXHAUSTED: the device has
  // no room, and data() is null.
  absl::Status Reserve(int64_t size_bytes, cudaStream_t stream);

  void* data() const { return buffer_->data(); }
  // For a graph that works with it and outlives its growth.
  std::shared_ptr<const DeviceBuffer> buffer() const { return buffer_; }

 private:
  std::shared_ptr<const DeviceBuffer> buffer_ = std::make_shared<const DeviceBuffer>();
};

}  // namespace wintserve::kernels::cuda
