// Products computed naively on the device, one thread an output: the references of the GPU tests.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace wintserve::kernels::cuda {

// Token i multiplies row source_row[i] of x with the weights of expert expert_of[i] (null: row i,
// expert 0). All pointers are device memory, arrays dense.
struct ReferenceTokens {
  int num_tokens = 0;
  const int32_t* source_row = nullptr;
  const int32_t* expert_of = nullptr;
};

// In float64. y [num_tokens, n] = x * w; magnitudes = |x| * |w|; unit_magnitudes = |x| * unit, the
// size of a weight's code step.   x [rows, k]   w, unit [experts, k, n] (unit float32)
void LaunchReferenceProduct(const ReferenceTokens& tokens, int k, int n, const double* x,
                            const double* w, const float* unit, double* y, double* magnitudes,
                            double* unit_magnitudes, cudaStream_t stream);

// As FastDeploy's kernels round: x and w bfloat16 values, float32 accumulation, bfloat16 result.
void LaunchRoundedProduct(const ReferenceTokens& tokens, int k, int n, const float* x,
                          const float* w, float* y, cudaStream_t stream);

}  // namespace wintserve::kernels::cuda
