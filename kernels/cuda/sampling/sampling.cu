#include <cuda_runtime.h>

#include "common/check.h"
#include "kernels/cuda/sampling/launch_rows.cuh"
#include "kernels/cuda/sampling/sample_kernel.cuh"
#include "kernels/cuda/sampling/sampling.h"

namespace wintserve::kernels::cuda {
namespace {

// Two blocks a multiprocessor.
__global__ void __launch_bounds__(plan::kSamplingThreads, 2)
    SampleKernel(const SamplingArgs args, const plan::SamplingPlan plan) {
  BeginAfterPreviousKernel();
  SampleRow(args, plan);
}

}  // namespace

plan::SamplingDevice PrepareSampling(int max_blocks_per_row) {
  PrepareLogprobs();
  return PrepareRows(&SampleKernel, max_blocks_per_row);
}

void LaunchSampling(const SamplingArgs& args, const plan::SamplingDevice& device,
                    cudaStream_t stream) {
  CHECK(args.num_rows >= 0, "num_rows={}", args.num_rows);
  CHECK(args.vocabulary >= 1 && args.vocabulary <= sampling::kMaxVocabulary, "vocabulary={}",
        args.vocabulary);
  CHECK(args.token_counts_stride % 4 == 0, "token_counts_stride={}", args.token_counts_stride);
  if (args.num_rows == 0) return;
  LaunchRows(&SampleKernel, args, device, stream);
}

}  // namespace wintserve::kernels::cuda
