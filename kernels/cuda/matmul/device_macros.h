// Kernels are function templates over a Device that offers a thread's position, barriers, copies
// and matrix instructions: GpuDevice on a GPU, EmulatedDevice in tests on the host.
#pragma once

#if defined(__CUDACC__)
#define WINTSERVE_DEVICE __device__ __forceinline__
#define WINTSERVE_UNROLL _Pragma("unroll")
#else
#define WINTSERVE_DEVICE inline
#define WINTSERVE_UNROLL
#endif

namespace wintserve::kernels::cuda {

struct alignas(8) Words2 {
  unsigned x, y;
};
struct alignas(16) Words4 {
  unsigned x, y, z, w;
};

}  // namespace wintserve::kernels::cuda
