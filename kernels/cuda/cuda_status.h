// What can fail on a sound machine, as a Status.
#pragma once

#include <cuda_runtime_api.h>

#include <string_view>

#include "absl/status/status.h"

namespace wintserve::kernels::cuda {

// OK for cudaSuccess. RESOURCE_EXHAUSTED: no memory. UNAVAILABLE: no driver, no such device, or one
// that is in use. INTERNAL: anything else, such as a fault of an earlier kernel.
// The message is "`what` on device 0: cudaErrorX (what it means)".
absl::Status ToStatus(cudaError_t error, std::string_view what);

}  // namespace wintserve::kernels::cuda
