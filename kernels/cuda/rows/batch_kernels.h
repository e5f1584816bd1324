// From the words of a packed batch to arrays in device memory. Launches only.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/cuda/sampling/sampling.h"
#include "kernels/plan/packed_batch.h"

namespace wintserve::kernels::cuda {

// `words` is device memory; a token that stands for a slot's id becomes that id. sampling_rows
// [shape.num_logit_rows + shape.num_padding_rows].
void LaunchUnpackBatch(const int32_t* words, const plan::PackedBatchShape& shape,
                       const plan::BatchArrays& arrays, SamplingRow* sampling_rows,
                       cudaStream_t stream);

// slot_ids[logit_slots[i]] = ids[i], 0 for a negative one; nothing for a negative slot. ids
// [num_ids].
void LaunchKeepIds(const int32_t* ids, int64_t num_ids, const plan::BatchArrays& arrays,
                   cudaStream_t stream);

}  // namespace wintserve::kernels::cuda
