// What the cache manager asks of the GPUs' driver.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "common/unique_fd.h"

namespace wintserve {

// In the driver's own answers; a device is its ordinal among those that the process sees.
struct GpuTraits {
  std::string name;    // "NVIDIA H200"
  std::string driver;  // "CUDA 13.0", the newest version that the driver serves
  int64_t total_bytes = 0;
  bool has_virtual_memory = false;  // CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
  bool exports_fds = false;       // CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED
  int64_t granularity_bytes = 0;  // of allocations; 0 without virtual memory
};

// Allocates a GPU's memory without ever mapping it, and without a context. Threading: any thread.
class GpuDriver {
 public:
  virtual ~GpuDriver() = default;

  // UNAVAILABLE: no such device, or the driver does not answer.
  virtual absl::StatusOr<GpuTraits> Query(int device) = 0;
  // Memory that lives as long as the descriptor, a copy of it, or a mapping. What it holds is not
  // defined. size_bytes: a multiple of the device's granularity. RESOURCE_EXHAUSTED: there is no
  // such piece of memory. INTERNAL: anything else, in the driver's words.
  virtual absl::StatusOr<UniqueFd> Allocate(int device, int64_t size_bytes) = 0;
};

// "GPU 0 (NVIDIA H200)"
std::string GpuName(int device, const GpuTraits& traits);

// The device's traits, if a KV pool can be made of its memory. FAILED_PRECONDITION: it cannot; the
// message names the device, what its driver lacks and what to do. UNAVAILABLE: no such device.
absl::StatusOr<GpuTraits> CheckGpu(GpuDriver* driver, int device);

}  // namespace wintserve
