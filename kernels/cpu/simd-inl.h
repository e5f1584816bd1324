// What every SIMD file shares. Included once per target, from inside foreach_target.
#if defined(WINTSERVE_KERNELS_CPU_SIMD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef WINTSERVE_KERNELS_CPU_SIMD_INL_H_
#undef WINTSERVE_KERNELS_CPU_SIMD_INL_H_
#else
#define WINTSERVE_KERNELS_CPU_SIMD_INL_H_
#endif

#include "hwy/highway.h"

// Register blocks need their loops gone at any optimisation level.
#undef WINTSERVE_UNROLL
#if defined(__clang__)
#define WINTSERVE_UNROLL _Pragma("unroll")
#else
#define WINTSERVE_UNROLL _Pragma("GCC unroll 16")
#endif

HWY_BEFORE_NAMESPACE();
namespace wintserve::kernels::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using D = hn::CappedTag<float, 16>;
using V = hn::Vec<D>;
inline constexpr int kLanes = static_cast<int>(hn::MaxLanes(D()));

// Rows of x that one register block multiplies at most.
inline constexpr int kMaxBlockRows = kLanes == 16 ? 8 : kLanes == 8 ? 6 : 4;

// Column vectors of a register block. Its accumulators, a vector of weights for each column vector
// and one broadcast have to fit the registers: 32 with AVX-512, else 16.
constexpr int BlockVecs(int rows, int columns) {
  const int registers = kLanes == 16 ? 32 : 16;
  const int vecs = 5 * rows + 4 <= registers ? 4 : 2;
  return vecs * kLanes <= columns ? vecs : columns / kLanes;
}

}  // namespace HWY_NAMESPACE
}  // namespace wintserve::kernels::cpu
HWY_AFTER_NAMESPACE();

#endif
