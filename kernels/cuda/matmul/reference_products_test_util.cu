#include <cuda_bf16.h>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/matmul/reference_products_test_util.h"

namespace wintserve::kernels::cuda {
namespace {

constexpr int kThreads = 128;

__global__ void ReferenceProductKernel(ReferenceTokens tokens, int k, int n, const double* x,
                                       const double* w, const float* unit, double* y,
                                       double* magnitudes, double* unit_magnitudes) {
  const int column = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  const auto token = static_cast<int>(blockIdx.y);
  if (column >= n) return;
  const int64_t row = tokens.source_row == nullptr ? token : tokens.source_row[token];
  const int64_t expert = tokens.expert_of == nullptr ? 0 : tokens.expert_of[token];
  double sum = 0;
  double magnitude = 0;
  double unit_magnitude = 0;
  for (int i = 0; i < k; ++i) {
    const double a = x[row * k + i];
    const int64_t at = (expert * k + i) * n + column;
    sum += a * w[at];
    magnitude += fabs(a * w[at]);
    unit_magnitude += fabs(a) * unit[at];
  }
  const int64_t out = int64_t{token} * n + column;
  y[out] = sum;
  magnitudes[out] = magnitude;
  unit_magnitudes[out] = unit_magnitude;
}

__global__ void RoundedProductKernel(ReferenceTokens tokens, int k, int n, const float* x,
                                     const float* w, float* y) {
  const int column = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  const auto token = static_cast<int>(blockIdx.y);
  if (column >= n) return;
  const int64_t row = tokens.source_row == nullptr ? token : tokens.source_row[token];
  const int64_t expert = tokens.expert_of == nullptr ? 0 : tokens.expert_of[token];
  float sum = 0;
  for (int i = 0; i < k; ++i) {
    sum = fmaf(x[row * k + i], w[(expert * k + i) * n + column], sum);
  }
  y[int64_t{token} * n + column] = __bfloat162float(__float2bfloat16_rn(sum));
}

LaunchShape Shape(int n, int num_tokens) {
  LaunchShape shape;
  shape.grid = dim3((n + kThreads - 1) / kThreads, num_tokens);
  shape.block = kThreads;
  return shape;
}

}  // namespace

void LaunchReferenceProduct(const ReferenceTokens& tokens, int k, int n, const double* x,
                            const double* w, const float* unit, double* y, double* magnitudes,
                            double* unit_magnitudes, cudaStream_t stream) {
  CUDA_LAUNCH(ReferenceProductKernel, Shape(n, tokens.num_tokens), stream, tokens, k, n, x, w, unit,
              y, magnitudes, unit_magnitudes);
}

void LaunchRoundedProduct(const ReferenceTokens& tokens, int k, int n, const float* x,
                          const float* w, float* y, cudaStream_t stream) {
  CUDA_LAUNCH(RoundedProductKernel, Shape(n, tokens.num_tokens), stream, tokens, k, n, x, w, y);
}

}  // namespace wintserve::kernels::cuda
