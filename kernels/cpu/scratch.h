// Working memory of the CPU operators: one set a thread and one per call, kept between calls.
#pragma once

#include <cstdint>
#include <vector>

#include "common/check.h"
#include "hwy/aligned_allocator.h"
#include "kernels/cpu/matmul.h"

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
      capacity_ = count;
    }
    return data_.get();
  }

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
};

}  // namespace wintserve::kernels::cpu
