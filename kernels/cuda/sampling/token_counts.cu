#include <cuda_runtime.h>

#include "common/check.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/sampling/sampling.h"

namespace wintserve::kernels::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void CountTokensKernel(const TokenCountsArgs args) {
  const int i = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  const auto is_sampled = [&](int id) { return id >= 0 && id < args.vocabulary; };
  if (i < args.num_prompt_ids) {
    const int id = args.prompt_ids[i];
    if (is_sampled(id)) atomicOr(&args.counts[id], sampling::kInPrompt);
  }
  if (i < args.num_generated_ids) {
    const int id = args.generated_ids[i];
    if (is_sampled(id)) atomicAdd(&args.counts[id], 1u);
  }
}

}  // namespace

void LaunchResetTokenCounts(const TokenCountsArgs& args, cudaStream_t stream) {
  CHECK(args.vocabulary >= 1 && args.num_prompt_ids >= 0 && args.num_generated_ids >= 0,
        "vocabulary={} num_prompt_ids={} num_generated_ids={}", args.vocabulary,
        args.num_prompt_ids, args.num_generated_ids);
  CUDA_CALL(cudaMemsetAsync, args.counts, 0, args.vocabulary * sizeof(args.counts[0]), stream);
  const int num_ids =
      args.num_prompt_ids > args.num_generated_ids ? args.num_prompt_ids : args.num_generated_ids;
  if (num_ids == 0) return;
  const auto num_blocks = static_cast<unsigned>((num_ids + kThreads - 1) / kThreads);
  CUDA_LAUNCH(CountTokensKernel, (LaunchShape{.grid = num_blocks, .block = kThreads}), stream,
              args);
}

}  // namespace wintserve::kernels::cuda
