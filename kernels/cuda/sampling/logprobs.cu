#include <cuda_runtime.h>

#include "common/check.h"
#include "kernels/cuda/sampling/launch_rows.cuh"
#include "kernels/cuda/sampling/logprob_kernel.cuh"
#include "kernels/cuda/sampling/sampling.h"

namespace wintserve::kernels::cuda {
namespace {

// Two blocks a multiprocessor.
__global__ void __launch_bounds__(plan::kSamplingThreads, 2)
    LogprobKernel(const LogprobArgs args, const plan::SamplingPlan plan) {
  BeginAfterPreviousKernel();
  LogprobsOfRow(args, plan);
}

}  // namespace

void PrepareLogprobs() { PrepareRows(&LogprobKernel, /*max_blocks_per_row=*/1); }

void LaunchLogprobs(const LogprobArgs& args, const plan::SamplingDevice& device,
                    cudaStream_t stream) {
  CHECK(args.num_rows >= 0, "num_rows={}", args.num_rows);
  CHECK(args.vocabulary >= 1 && args.vocabulary <= sampling::kMaxVocabulary, "vocabulary={}",
        args.vocabulary);
  if (args.num_rows == 0) return;
  LaunchRows(&LogprobKernel, args, device, stream);
}

}  // namespace wintserve::kernels::cuda
