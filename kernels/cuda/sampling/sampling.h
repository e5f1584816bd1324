// Sampling on the device, one launch for a batch: kernels/sampling/definition.h says what is drawn,
// and the CPU's sampler draws the same ids from the same logits.
//
// Both launches are asynchronous on their stream: no allocation, no synchronisation, no workspace,
// and a grid that depends on host-known numbers alone, so they can be captured in a graph.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/cuda/sampling/sampling_args.h"
#include "kernels/plan/sampling_plan.h"

namespace wintserve::kernels::cuda {

// Once for each device, which must be the current one: what it has, and the kernels' permission to
// use its shared memory. max_blocks_per_row 1 switches clusters off.
plan::SamplingDevice PrepareSampling(int max_blocks_per_row = plan::kMaxSamplingBlocksPerRow);

// REQUIRES: a device of PrepareSampling; arguments in their ranges (CHECK where the host sees
// them).
void LaunchSampling(const SamplingArgs& args, const plan::SamplingDevice& device,
                    cudaStream_t stream);
void LaunchLogprobs(const LogprobArgs& args, const plan::SamplingDevice& device,
                    cudaStream_t stream);

// For a slot whose rows will have penalties, before the first of them.
void LaunchResetTokenCounts(const TokenCountsArgs& args, cudaStream_t stream);

}  // namespace wintserve::kernels::cuda
