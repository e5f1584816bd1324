// Arrays and rows in device memory, for the tests that need a GPU.
#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <vector>

#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/handles.h"
#include "kernels/cuda/sampling/sampling_test_util.h"

namespace wintserve::kernels::cuda {

template <typename T>
class DeviceArray {
 public:
  // Filled with bytes 0xff: NaN, or -1.
  explicit DeviceArray(size_t size) : size_(size) {
    auto memory = DeviceBuffer::Allocate(static_cast<int64_t>(size * sizeof(T)));
    if (!memory.ok()) {
      ADD_FAILURE() << memory.status();
      std::abort();
    }
    memory_ = *std::move(memory);
    if (size > 0) CUDA_CALL(cudaMemset, data(), 0xff, size * sizeof(T));
  }
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) { Set(values); }

  T* data() const { return memory_.data<T>(); }

  void Set(const std::vector<T>& values) {
    ASSERT_EQ(values.size(), size_);
    if (size_ == 0) return;
    CUDA_CALL(cudaMemcpy, data(), values.data(), size_ * sizeof(T), cudaMemcpyDefault);
  }
  // Waits for what was launched on the default stream.
  std::vector<T> Get() const {
    std::vector<T> values(size_);
    if (size_ > 0) {
      CUDA_CALL(cudaMemcpy, values.data(), data(), size_ * sizeof(T), cudaMemcpyDefault);
    }
    return values;
  }

 private:
  size_t size_;
  DeviceBuffer memory_;
};

using DeviceRows = TestRows<DeviceArray>;

}  // namespace wintserve::kernels::cuda
