// Working memory of the CPU operators: one set a thread and one per call, kept between calls.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "common/check.h"
#include "hwy/aligned_allocator.h"
#include "kernels/cpu/matmul.h"
#include "kernels/cpu/work_split.h"

namespace wintserve::kernels::cpu {

// Rows that a work item handles at most: its outputs stay in the L2 cache.
inline constexpr int64_t kMaxItemRows = 256;

// Cache-line aligned floats that only grow. Contents are lost when they do.
class FloatArena {
 public:
  float* Reserve(int64_t count) {
    if (count > capacity_) {
      data_ = hwy::AllocateAligned<float>(count);
      CHECK(data_ != nullptr, "no memory for {} floats", count);
      // Touched now: what a process needs shows when it starts, not when the pages are first used.
      std::memset(data_.get(), 0, count * sizeof(float));
      capacity_ = count;
    }
    return data_.get();
  }
  int64_t capacity() const { return capacity_; }

 private:
  hwy::AlignedFreeUniquePtr<float[]> data_;
  int64_t capacity_ = 0;
};

struct ThreadScratch {
  FloatArena panel;      // [kPanelFloats]
  FloatArena tiles;      // two of [kMaxItemRows, kTileColumns]
  FloatArena attention;  // [AttendScratchFloats(head_dim)]
  const float* x_rows[kMaxItemRows] = {};

  float* panel_data() { return panel.Reserve(kPanelFloats); }
  float* tile_data(int which) {
    constexpr int64_t kTileFloats = kMaxItemRows * kTileColumns;
    return tiles.Reserve(2 * kTileFloats) + which * kTileFloats;
  }
};

struct Scratch {
  std::vector<ThreadScratch> threads;
  FloatArena activations;  // between gate-up and down
  FloatArena logits;       // of the router
  // Of the largest batch to come; 0: unknown, then memory grows with the batches.
  int64_t max_rows = 0;

  // num_floats in `arena` for a batch of num_rows; what the largest batch needs in proportion is
  // taken with it.
  float* ReserveForRows(int64_t num_rows, int64_t num_floats, FloatArena* arena) const {
    const int64_t floats_per_row = CeilDiv(num_floats, std::max<int64_t>(1, num_rows));
    return arena->Reserve(std::max(num_floats, floats_per_row * max_rows));
  }
};

}  // namespace wintserve::kernels::cpu
