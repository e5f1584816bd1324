// Makes the weights of plan/dummy_weights.h in device memory. Launches only: the weights are there
// for what is launched on the stream afterwards.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/formats/dummy_matrix.h"
#include "kernels/plan/weight_layout.h"

namespace wintserve::kernels::cuda {

// out [k, n]: float or the bits of bfloat16. REQUIRES: kFloat32 or kBfloat16.
void LaunchDummyRows(const formats::DummyMatrix& matrix, void* out, cudaStream_t stream);

// out: layout.size_bytes() bytes, aligned to 16. REQUIRES: `layout` is LayOutDummyWeights'.
void LaunchDummyWeights(const formats::DummyMatrix& matrix, const plan::WeightLayout& layout,
                        uint8_t* out, cudaStream_t stream);

}  // namespace wintserve::kernels::cuda
