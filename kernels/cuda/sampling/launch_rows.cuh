// Launches a kernel whose thread blocks share rows of logits. For .cu files of this room.
#pragma once

#include <cuda_runtime.h>

#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/sampling/row_selection.cuh"
#include "kernels/plan/sampling_plan.h"

namespace wintserve::kernels::cuda {

inline int DeviceAttribute(cudaDeviceAttr attribute) {
  int device = 0;
  int value = 0;
  CUDA_CALL(cudaGetDevice, &device);
  CUDA_CALL(cudaDeviceGetAttribute, &value, attribute, device);
  return value;
}

template <typename Args>
plan::SamplingDevice PrepareRows(void (*kernel)(Args, plan::SamplingPlan), int max_blocks_per_row) {
  plan::SamplingDevice device = {
      .num_sms = DeviceAttribute(cudaDevAttrMultiProcessorCount),
      .max_shared_bytes_per_block = DeviceAttribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
      .max_shared_bytes_per_sm = DeviceAttribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
      .max_blocks_per_row =
          DeviceAttribute(cudaDevAttrClusterLaunch) != 0 ? max_blocks_per_row : 1};
  CUDA_CALL(cudaFuncSetAttribute, reinterpret_cast<const void*>(kernel),
            cudaFuncAttributeMaxDynamicSharedMemorySize, device.max_shared_bytes_per_block);
  return device;
}

// PrepareRows for the kernel of logprobs.cu.
void PrepareLogprobs();

// REQUIRES: args.num_rows >= 1.
template <typename Args>
void LaunchRows(void (*kernel)(Args, plan::SamplingPlan), const Args& args,
                const plan::SamplingDevice& device, cudaStream_t stream) {
  const plan::SamplingPlan plan =
      plan::PlanSampling(args.num_rows, args.vocabulary, kSelectionBytes, device);
  const LaunchShape shape = {.grid = static_cast<unsigned>(args.num_rows * plan.blocks_per_row),
                             .block = plan::kSamplingThreads,
                             .shared_bytes = static_cast<size_t>(plan.shared_bytes()),
                             .cluster_blocks = static_cast<unsigned>(plan.blocks_per_row),
                             .overlaps_previous = true};
  CUDA_LAUNCH(kernel, shape, stream, args, plan);
}

}  // namespace wintserve::kernels::cuda
