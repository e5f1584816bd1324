// What launch functions need to know about a GPU.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"

namespace wintserve::kernels::cuda {

struct DeviceProperties {
  int ordinal = 0;   // as cudaSetDevice takes it
  std::string name;  // "NVIDIA H200"
  int compute_capability_major = 0;
  int compute_capability_minor = 0;
  int num_multiprocessors = 0;
  int64_t max_shared_bytes_per_block = 0;  // with AllowSharedMemory
  int64_t l2_bytes = 0;
  int64_t total_bytes = 0;

  int compute_capability() const {  // 90 for 9.0
    return 10 * compute_capability_major + compute_capability_minor;
  }
};

// 0 without a driver.
int NumVisibleDevices();

// UNAVAILABLE: no driver, or no device of this ordinal; the message says how many there are.
absl::StatusOr<DeviceProperties> QueryDevice(int ordinal);

// Makes the device current for the calling thread, and checks that this build has code for it.
// UNAVAILABLE: it has not (the message names its compute capability), or the device cannot be used.
absl::StatusOr<DeviceProperties> UseDevice(int ordinal);

struct DeviceMemoryBytes {
  int64_t free = 0;
  int64_t total = 0;
};

// Of the current device; other processes count.
absl::StatusOr<DeviceMemoryBytes> QueryDeviceMemory();

}  // namespace wintserve::kernels::cuda
