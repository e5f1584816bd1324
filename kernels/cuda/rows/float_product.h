// Products with float32 weights in true float32 arithmetic, and the router on top of them. Launches
// only. All pointers are device memory. kernels/plan/float_product_plan.h says how work is cut and
// why a row's result has the same bits in any batch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/operands.h"
#include "kernels/plan/float_product_plan.h"

namespace wintserve::kernels::cuda {

struct FloatProductArgs {
  ConstRows x;
  int64_t num_rows = 0;
  const float* w = nullptr;  // [k, n]
  int64_t k = 0;
  int64_t n = 0;
  Rows y;                     // [num_rows, n]; unused by a split plan
  float* partials = nullptr;  // [num_sums, num_rows, n], plan::FloatPartials; of a split plan
};
// y = x * w. A split plan leaves the sums of its blocks in `partials` instead.
void LaunchFloatProduct(const plan::FloatProductPlan& plan, const FloatProductArgs& args,
                        cudaStream_t stream);

// y [num_rows, n] becomes what a split plan left in `partials`, added up.
void LaunchAddPartials(const plan::FloatProductPlan& plan, const float* partials, int64_t num_rows,
                       int64_t n, Rows y, cudaStream_t stream);

inline constexpr int kMaxRoutedExperts = 256;
inline constexpr int kMaxChosenExperts = 32;

struct SelectExpertsArgs {
  const float* logits = nullptr;  // [num_sums, num_rows, num_experts], to be added up
  int num_sums = 1;               // as the plan of the product says
  int sums_per_section = 1;
  int64_t num_rows = 0;
  const int32_t* route_as = nullptr;  // [num_rows] the row whose logits a row takes; null: its own
  const float* bias = nullptr;        // [num_experts] or null
  RouterShape shape;                  // at most kMaxRoutedExperts, kMaxChosenExperts
  int32_t* expert_ids = nullptr;      // [num_rows, top_k]
  float* expert_weights = nullptr;    // [num_rows, top_k]
};
// The second half of Backend::Route. Ids are distinct and in range whatever the logits are.
void LaunchSelectExperts(const SelectExpertsArgs& args, cudaStream_t stream);

}  // namespace wintserve::kernels::cuda
