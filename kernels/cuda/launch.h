// Launches a kernel. For .cu files.
#pragma once

#include <cuda_runtime.h>

#include <utility>

#include "kernels/cuda/cuda_check.h"

namespace wintserve::kernels::cuda {

struct LaunchShape {
  dim3 grid = 1;
  dim3 block = 1;
  size_t shared_bytes = 0;  // dynamic shared memory; above 48 KiB see AllowSharedMemory
  // Where the device can, begin before the kernel before it in the stream has ended. Every block of
  // such a kernel waits for that one (griddepcontrol.wait).
  bool overlaps_previous = false;
};

// Whether the current device, and so all of a process', lets kernels overlap: from sm_90 on.
inline bool DeviceOverlapsKernels() {
  static const bool overlaps = [] {
    int device = 0;
    int major = 0;
    CUDA_CALL(cudaGetDevice, &device);
    CUDA_CALL(cudaDeviceGetAttribute, &major, cudaDevAttrComputeCapabilityMajor, device);
    return major >= 9;
  }();
  return overlaps;
}

// Lets a kernel take up to `bytes` of dynamic shared memory. Once for each kernel and device,
// before its first launch; costs nothing afterwards and may be repeated.
template <typename... Params>
void AllowSharedMemory(void (*kernel)(Params...), size_t bytes) {
  CUDA_CALL(cudaFuncSetAttribute, reinterpret_cast<const void*>(kernel),
            cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

template <typename... Params, typename... Args>
void LaunchOrDie(const char* file, int line, const char* name, void (*kernel)(Params...),
                 const LaunchShape& shape, cudaStream_t stream, Args&&... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  if (shape.overlaps_previous && DeviceOverlapsKernels()) {
    config.attrs = &overlap;
    config.numAttrs = 1;
  }
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
  if (error != cudaSuccess) [[unlikely]] {
    const auto dims = [](dim3 d) { return fmt::format("{}x{}x{}", d.x, d.y, d.z); };
    CudaCallFailed(file, line, name,
                   fmt::format("grid {} block {} shared {} bytes stream {}: {}", dims(shape.grid),
                               dims(shape.block), shape.shared_bytes,
                               reinterpret_cast<const void*>(stream), ArgumentsText(args...)),
                   error);
  }
}

}  // namespace wintserve::kernels::cuda

// CUDA_LAUNCH((AddRowsKernel<float>), {.grid = n, .block = 256}, stream, a, b): aborts with shape
// and arguments unless the launch is accepted. A grid of 0 blocks is an error: return before.
// The shape stands in its own parentheses or is a LaunchShape, because of the commas.
#define CUDA_LAUNCH(kernel, shape, stream, ...)                                               \
  ::wintserve::kernels::cuda::LaunchOrDie(__FILE__, __LINE__, #kernel, kernel, shape, stream, \
                                          __VA_ARGS__)
