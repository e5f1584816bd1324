// A weight matrix that is made, not loaded: for measuring a model's speed and memory without its
// checkpoint. Plain data; kernels/plan/dummy_weights.h says what the weights are.
#pragma once

#include <cstdint>

#include "kernels/formats/matrix.h"

namespace wintserve::formats {

// One rank's slice of a whole logical matrix. A weight follows from the seed and from its place in
// the whole matrix alone, so every backend has the same weights, and slices are slices.
struct DummyMatrix {
  // Columns of the whole matrix that stand side by side in the slice.
  struct Columns {
    int64_t first = 0;
    int64_t count = 0;
  };
  static constexpr int kMaxRanges = 3;  // q, k and v

  WeightFormat format = WeightFormat::kWint2;
  uint64_t seed = 0;        // of the whole matrix
  float deviation = 1;      // standard deviation of the weights, about
  bool transposed = false;  // the weight at (row, column) stands at (column, row) of the whole
                            // matrix, as in a tied head; kFloat32 and kBfloat16 only
  int64_t k = 0;            // of the slice
  int64_t n = 0;            // of the slice: the ranges' counts together
  int64_t first_row = 0;    // of the whole matrix; kWint2: a multiple of 64
  int num_ranges = 0;
  Columns ranges[kMaxRanges] = {};
};

}  // namespace wintserve::formats
