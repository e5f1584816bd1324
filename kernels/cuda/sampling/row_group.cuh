// The threads that work on one row: a cluster of thread blocks, on devices without clusters and
// where one block suffices that block alone. Every function here is called by all threads of a
// block (or of the row's blocks, where it says so) together.
#pragma once

#include <cooperative_groups.h>

#include <cstdint>

#include "kernels/plan/sampling_plan.h"

namespace wintserve::kernels::cuda {

inline constexpr unsigned kAllLanes = 0xffffffffu;

// The block's dynamic shared memory, 16-byte aligned.
__device__ inline unsigned char* SharedMemory() {
  extern __shared__ uint4 wintserve_sampling_memory[];
  return reinterpret_cast<unsigned char*>(wintserve_sampling_memory);
}

// The blocks of one row: consecutive ones of the grid.
struct RowBlocks {
  int count = 1;
  int index = 0;  // of this block

  __device__ explicit RowBlocks(int blocks_per_row)
      : count(blocks_per_row), index(static_cast<int>(blockIdx.x) % blocks_per_row) {}

  // Waits for all threads of the row; what they wrote to shared memory before is seen by all after.
  __device__ void Sync() const {
#if __CUDA_ARCH__ >= 900
    if (count > 1) {
      cooperative_groups::this_cluster().sync();
      return;
    }
#endif
    __syncthreads();
  }

  // Another block's copy of an object in shared memory.
  template <typename T>
  __device__ T* Of(int block, T* object) const {
#if __CUDA_ARCH__ >= 900
    if (count > 1) return cooperative_groups::this_cluster().map_shared_rank(object, block);
#endif
    return object;
  }
};

__device__ inline int Lane() { return static_cast<int>(threadIdx.x) % 32; }
__device__ inline int Warp() { return static_cast<int>(threadIdx.x) / 32; }

template <typename T>
__device__ T WarpSum(T value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

template <typename T>
__device__ T WarpMinimum(T value) {
  for (int step = 16; step > 0; step /= 2) {
    const T other = __shfl_xor_sync(kAllLanes, value, step);
    value = other < value ? other : value;
  }
  return value;
}

// The sum over lanes up to and with the own.
template <typename T>
__device__ T WarpRunningSum(T value) {
  for (int step = 1; step < 32; step *= 2) {
    const T other = __shfl_up_sync(kAllLanes, value, step);
    if (Lane() >= step) value += other;
  }
  return value;
}

// The sum over threads up to and with the own. scratch: one element a warp, free again on return.
template <typename T>
__device__ T BlockRunningSum(T value, T* scratch) {
  const T in_warp = WarpRunningSum(value);
  if (Lane() == 31) scratch[Warp()] = in_warp;
  __syncthreads();
  T before = 0;
  for (int warp = 0; warp < Warp(); ++warp) before += scratch[warp];
  __syncthreads();
  return before + in_warp;
}

template <typename T>
__device__ T BlockMinimum(T value, T* scratch) {
  value = WarpMinimum(value);
  if (Lane() == 0) scratch[Warp()] = value;
  __syncthreads();
  value = scratch[0];
  for (int warp = 1; warp < plan::kSamplingWarps; ++warp) {
    value = scratch[warp] < value ? scratch[warp] : value;
  }
  __syncthreads();
  return value;
}

template <typename T>
__device__ T BlockSum(T value, T* scratch) {
  value = WarpSum(value);
  if (Lane() == 0) scratch[Warp()] = value;
  __syncthreads();
  value = scratch[0];
  for (int warp = 1; warp < plan::kSamplingWarps; ++warp) value += scratch[warp];
  __syncthreads();
  return value;
}

}  // namespace wintserve::kernels::cuda
