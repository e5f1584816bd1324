// Launches a kernel. For .cu files.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <utility>

#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/kernel_overlap.h"

namespace wintserve::kernels::cuda {

struct LaunchShape {
  dim3 grid = 1;
  dim3 block = 1;
  size_t shared_bytes = 0;  // dynamic shared memory; above 48 KiB see AllowSharedMemory
  unsigned cluster_blocks = 1;
  // Where the device can, begin before the kernel before it in the stream has ended (programmatic
  // dependent launch). The rule for such a kernel, which leaves no hazard between it and any kernel
  // before or behind it:
  //   1. Every thread that touches memory calls WaitForPreviousKernel, also in blocks without work:
  //      a kernel has ended only after all those before it have.
  //   2. Before that it writes nothing, and reads nothing that the kernel right before it writes.
  //   3. LetNextKernelBegin, if at all, comes after it.
  // By 3, when a kernel begins, the one before it has passed its own wait, so whatever is older has
  // ended and may be read at once: weights, and what the last kernel but one left. By 1 and 2 a
  // kernel writes when all others have ended, so it overwrites nothing that is still read. What was
  // read before the wait must not be what is written during it: not through the first-level cache
  // either if it may share a sector with that (LoadFresh for integers).
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
  std::array<cudaLaunchAttribute, 2> attributes = {};
  config.attrs = attributes.data();
  if (shape.overlaps_previous && kernels_may_overlap && DeviceOverlapsKernels()) {
    cudaLaunchAttribute& overlap = attributes[config.numAttrs++];
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
  }
  if (shape.cluster_blocks > 1) {
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {shape.cluster_blocks, 1, 1};
  }
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
  if (error != cudaSuccess) [[unlikely]] {
    const auto dims = [](dim3 d) { return fmt::format("{}x{}x{}", d.x, d.y, d.z); };
    CudaCallFailed(
        file, line, name,
        fmt::format("grid {} block {} cluster {} shared {} bytes stream {}: {}", dims(shape.grid),
                    dims(shape.block), shape.cluster_blocks, shape.shared_bytes,
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
