// Whether this binary holds machine code for the current device.
#pragma once

#include <cuda_runtime_api.h>

namespace wintserve::kernels::cuda {

// cudaErrorNoKernelImageForDevice: it holds none.
cudaError_t FindDeviceCode();

}  // namespace wintserve::kernels::cuda
