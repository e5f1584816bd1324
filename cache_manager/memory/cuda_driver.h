// NVIDIA's driver as a GpuDriver. Only where ENABLE_CUDA is on: its types are those of the
// toolkit's header, as a copy of them would not notice when they change. The library is loaded at
// run time, so that the same program starts on a machine without a GPU.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "cache_manager/memory/gpu_driver.h"

namespace wintserve {

// UNAVAILABLE: the library is not there or too old, or it finds no GPU that works; the message says
// what it says. Takes up to seconds where no other process uses a GPU.
absl::StatusOr<std::unique_ptr<GpuDriver>> LoadCudaDriver(const char* library = "libcuda.so.1");

}  // namespace wintserve
