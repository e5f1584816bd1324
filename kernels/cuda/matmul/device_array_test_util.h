// Typed device memory that tests and benchmarks fill from and read back to vectors.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "common/check.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/handles.h"

namespace wintserve::kernels::cuda {

template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(int64_t count) : count_(count) {
    auto buffer = DeviceBuffer::Allocate(count * static_cast<int64_t>(sizeof(T)));
    CHECK(buffer.ok(), "{}", buffer.status().ToString());
    buffer_ = *std::move(buffer);
  }
  explicit DeviceArray(const std::vector<T>& values)
      : DeviceArray(static_cast<int64_t>(values.size())) {
    CUDA_CALL(cudaMemcpy, data(), values.data(), values.size() * sizeof(T), cudaMemcpyDefault);
    // From pageable memory the copy returns when the last bytes are staged, not when they have
    // arrived; a stream that does not wait for the default stream would read too early.
    CUDA_CALL(cudaStreamSynchronize, nullptr);
  }

  T* data() const { return buffer_.template data<T>(); }
  int64_t count() const { return count_; }

  // Every byte 0xFF: float NaNs, and indices that lead out of every buffer.
  void Poison(cudaStream_t stream) {
    CUDA_CALL(cudaMemsetAsync, data(), 0xFF, count_ * sizeof(T), stream);
  }
  // Waits for the stream.
  std::vector<T> Download(cudaStream_t stream) const {
    std::vector<T> values(count_);
    CUDA_CALL(cudaMemcpyAsync, values.data(), data(), count_ * sizeof(T), cudaMemcpyDefault,
              stream);
    CUDA_CALL(cudaStreamSynchronize, stream);
    return values;
  }

 private:
  int64_t count_;
  DeviceBuffer buffer_;
};

}  // namespace wintserve::kernels::cuda
