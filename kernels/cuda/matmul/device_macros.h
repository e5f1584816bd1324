// Kernels are function templates over a Device that offers a thread's position, barriers, copies
// and matrix instructions: GpuDevice on a GPU, EmulatedDevice in tests on the host.
#pragma once

#define WINTSERVE_PRAGMA(text) _Pragma(#text)
#if defined(__CUDACC__)
#define WINTSERVE_DEVICE __device__ __forceinline__
#define WINTSERVE_UNROLL _Pragma("unroll")
#define WINTSERVE_UNROLL_BY(n) WINTSERVE_PRAGMA(unroll n)
#else
#define WINTSERVE_DEVICE inline
#define WINTSERVE_UNROLL
#define WINTSERVE_UNROLL_BY(n)
#endif

namespace wintserve::kernels::cuda {

struct alignas(8) Words2 {
  unsigned x, y;
};
struct alignas(16) Words4 {
  unsigned x, y, z, w;
};

}  // namespace wintserve::kernels::cuda
