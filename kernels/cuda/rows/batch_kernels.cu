#include "kernels/cuda/device_ops.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/rows/batch_kernels.h"

namespace wintserve::kernels::cuda {
namespace {

constexpr int kUnpackThreads = 256;

__device__ SamplingRow SamplingRowOf(const plan::PackedLogitRow& row) {
  SamplingRow sampling;
  sampling.slot = row.slot;
  sampling.temperature = row.sample.temperature;
  sampling.top_p = row.sample.top_p;
  sampling.top_k = row.sample.top_k;
  sampling.min_p = row.sample.min_p;
  sampling.min_scaled_logit = row.min_scaled_logit;
  sampling.penalties = row.sample.penalties;
  sampling.num_logit_bias = row.sample.num_logit_biases;
  sampling.num_top_logprobs = row.sample.num_top_logprobs;
  sampling.masks_stop_ids = row.sample.mask_stop_ids ? 1 : 0;
  sampling.position = row.sample.position;
  sampling.choice_index = row.sample.choice_index;
  sampling.seed = row.sample.seed;
  return sampling;
}

// Blocks 0 … num_rows - 1 unpack a row each, one more all the logit rows and the padding. Kernels
// read a batch's arrays before they wait for the one before them, so none begins before this one
// has ended.
__global__ void __launch_bounds__(kUnpackThreads)
    UnpackBatchKernel(const int32_t* words, plan::PackedBatchShape shape, plan::BatchArrays arrays,
                      SamplingRow* sampling_rows) {
  WaitForPreviousKernel();
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const auto block = static_cast<int32_t>(blockIdx.x);
  if (block < shape.num_rows) {
    plan::UnpackRow(words, shape, arrays, block, thread, kUnpackThreads);
  } else {
    for (int32_t i = thread; i < shape.num_logit_rows; i += kUnpackThreads) {
      sampling_rows[i] = SamplingRowOf(plan::UnpackLogitRow(words, shape, arrays, i));
    }
    for (int32_t i = thread; i < shape.num_padding_rows; i += kUnpackThreads) {
      sampling_rows[shape.num_logit_rows + i] =
          SamplingRowOf(plan::UnpackPaddingRow(shape, arrays, i));
    }
  }
  FenceDevice();
}

__global__ void __launch_bounds__(kUnpackThreads)
    KeepIdsKernel(const int32_t* ids, int32_t num_ids, plan::BatchArrays arrays) {
  BeginAfterPreviousKernel();
  for (auto i = static_cast<int32_t>(threadIdx.x); i < num_ids; i += kUnpackThreads) {
    const int32_t slot = arrays.logit_slots[i];
    if (slot >= 0) arrays.slot_ids[slot] = max(ids[i], 0);
  }
}

}  // namespace

void LaunchUnpackBatch(const int32_t* words, const plan::PackedBatchShape& shape,
                       const plan::BatchArrays& arrays, SamplingRow* sampling_rows,
                       cudaStream_t stream) {
  const LaunchShape launch = {.grid = static_cast<unsigned>(shape.num_rows + 1),
                              .block = kUnpackThreads,
                              .overlaps_previous = true};
  CUDA_LAUNCH(UnpackBatchKernel, launch, stream, words, shape, arrays, sampling_rows);
}

void LaunchKeepIds(const int32_t* ids, int64_t num_ids, const plan::BatchArrays& arrays,
                   cudaStream_t stream) {
  if (num_ids == 0) return;
  const LaunchShape launch = {.block = kUnpackThreads, .overlaps_previous = true};
  CUDA_LAUNCH(KeepIdsKernel, launch, stream, ids, static_cast<int32_t>(num_ids), arrays);
}

}  // namespace wintserve::kernels::cuda
