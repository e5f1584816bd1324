// How a product with float32 weights is cut into work. It serves the routers, where a few rows meet
// a small matrix and the whole GPU must share it, and the rare unquantised layer.
//
// A row's result has the same bits in any batch: the k rows of the weights are cut into slices of
// fixed length, a slice into parts that one thread each adds up in order of k, parts are added in
// their order, the slices of a section in theirs, and then the sections, whoever adds them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/plan/host_device.h"

namespace wintserve::kernels::plan {

inline constexpr int kFloatSliceRows = 64;     // k rows of one slice
inline constexpr int kFloatSectionSlices = 8;  // of the last section what is left
inline constexpr int kFloatColumns = 64;       // columns of one thread block
inline constexpr int kFloatThreads = 256;
inline constexpr int kFewRows = 8;  // rows of a thread block: few, or many
inline constexpr int kManyRows = 32;

struct FloatProductPlan {
  int block_rows = kFewRows;
  int num_slices = 1;
  int slices_per_block = 1;  // one, a section's or all
  int num_sums = 1;          // of each product, one a block; several are added up afterwards
  int grid_row_blocks = 1;
  int grid_column_blocks = 1;

  constexpr bool is_split() const { return num_sums > 1; }
  // Of the sums: slices are added up to sections first.
  constexpr int sums_per_section() const { return slices_per_block == 1 ? kFloatSectionSlices : 1; }
};

constexpr int NumFloatSlices(int64_t k) {
  return static_cast<int>((k + kFloatSliceRows - 1) / kFloatSliceRows);
}

// REQUIRES: num_rows, k, n > 0.
constexpr FloatProductPlan PlanFloatProduct(int64_t num_rows, int64_t k, int64_t n,
                                            int num_multiprocessors) {
  FloatProductPlan plan;
  plan.num_slices = NumFloatSlices(k);
  plan.grid_column_blocks = static_cast<int>((n + kFloatColumns - 1) / kFloatColumns);
  // Many rows a block read the weights less often, once they leave no multiprocessor idle.
  const int64_t many = (num_rows + kManyRows - 1) / kManyRows * plan.grid_column_blocks;
  if (many * plan.num_slices >= num_multiprocessors) plan.block_rows = kManyRows;
  plan.grid_row_blocks = static_cast<int>((num_rows + plan.block_rows - 1) / plan.block_rows);
  // The fewest sums whose blocks fill the machine.
  const int64_t blocks = int64_t{plan.grid_row_blocks} * plan.grid_column_blocks;
  const int num_sections = (plan.num_slices + kFloatSectionSlices - 1) / kFloatSectionSlices;
  if (blocks >= 2 * num_multiprocessors) {
    plan.slices_per_block = plan.num_slices;
  } else if (blocks * num_sections >= 2 * num_multiprocessors) {
    plan.slices_per_block = kFloatSectionSlices;
  }
  plan.num_sums = (plan.num_slices + plan.slices_per_block - 1) / plan.slices_per_block;
  return plan;
}

// float32 sums of a split product, [sum][row][column].
constexpr int64_t FloatPartials(const FloatProductPlan& plan, int64_t num_rows, int64_t n) {
  return plan.is_split() ? plan.num_sums * num_rows * n : 0;
}

}  // namespace wintserve::kernels::plan
