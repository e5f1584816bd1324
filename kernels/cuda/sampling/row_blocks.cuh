// The threads that work on one row: the blocks of a cluster, on devices without clusters and where
// one block suffices that block alone. Every function here is called by all threads of a warp, a
// block or the row's blocks together, as its name says.
#pragma once

#include <cstdint>

#include "kernels/cuda/device_ops.h"
#include "kernels/plan/sampling_plan.h"

namespace wintserve::kernels::cuda {

// The blocks of one row: consecutive ones of the grid.
struct RowBlocks {
  int count = 1;
  int index = 0;  // of this block

  WINTSERVE_DEVICE explicit RowBlocks(int blocks_per_row)
      : count(blocks_per_row), index(BlockIndex() % blocks_per_row) {}

  // Waits for all threads of the row; what they wrote to shared memory before is seen by all after.
  WINTSERVE_DEVICE void Sync() const {
    if (count > 1) {
      SyncCluster();
    } else {
      SyncBlock();
    }
  }

  // Another block's copy of an object in shared memory.
  template <typename T>
  WINTSERVE_DEVICE T* Of(int block, T* object) const {
    return count > 1 ? OfBlock(block, object) : object;
  }
};

WINTSERVE_DEVICE int Lane() { return ThreadIndex() % 32; }
WINTSERVE_DEVICE int Warp() { return ThreadIndex() / 32; }

WINTSERVE_DEVICE uint64_t WarpSum(uint64_t value) {
  for (int step = 16; step > 0; step /= 2) value += ShuffleXor(value, step);
  return value;
}

WINTSERVE_DEVICE uint64_t WarpMinimum(uint64_t value) {
  for (int step = 16; step > 0; step /= 2) {
    const uint64_t other = ShuffleXor(value, step);
    value = other < value ? other : value;
  }
  return value;
}

// The sum over lanes up to and with the own.
WINTSERVE_DEVICE uint64_t WarpRunningSum(uint64_t value) {
  for (int step = 1; step < 32; step *= 2) {
    const uint64_t other = ShuffleUp(value, step);
    if (Lane() >= step) value += other;
  }
  return value;
}

// The sum over threads up to and with the own. scratch: one element a warp, free again on return.
WINTSERVE_DEVICE uint64_t BlockRunningSum(uint64_t value, uint64_t* scratch) {
  const uint64_t in_warp = WarpRunningSum(value);
  if (Lane() == 31) scratch[Warp()] = in_warp;
  SyncBlock();
  uint64_t before = 0;
  for (int warp = 0; warp < Warp(); ++warp) before += scratch[warp];
  SyncBlock();
  return before + in_warp;
}

WINTSERVE_DEVICE uint64_t BlockMinimum(uint64_t value, uint64_t* scratch) {
  value = WarpMinimum(value);
  if (Lane() == 0) scratch[Warp()] = value;
  SyncBlock();
  value = scratch[0];
  for (int warp = 1; warp < plan::kSamplingWarps; ++warp) {
    value = scratch[warp] < value ? scratch[warp] : value;
  }
  SyncBlock();
  return value;
}

WINTSERVE_DEVICE uint64_t BlockSum(uint64_t value, uint64_t* scratch) {
  value = WarpSum(value);
  if (Lane() == 0) scratch[Warp()] = value;
  SyncBlock();
  value = scratch[0];
  for (int warp = 1; warp < plan::kSamplingWarps; ++warp) value += scratch[warp];
  SyncBlock();
  return value;
}

}  // namespace wintserve::kernels::cuda
