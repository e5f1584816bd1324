// The Hopper kernels of a product, one source a format because they take long to compile.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/cuda/matmul/product_params.h"
#include "kernels/formats/matrix.h"
#include "kernels/plan/wgmma_plan.h"

namespace wintserve::kernels::cuda {

// REQUIRES: compute capability 9.0. params.x was prepared in the order kWgmma.
struct WgmmaLaunches {
  void (*allow_shared_memory)();
  void (*product)(const plan::WgmmaPlan& plan, const ProductParams& params, cudaStream_t stream);
};
const WgmmaLaunches& Wint2WgmmaLaunches();
const WgmmaLaunches& Wint4WgmmaLaunches();
const WgmmaLaunches& Wint8WgmmaLaunches();
const WgmmaLaunches& Bfloat16WgmmaLaunches();

const WgmmaLaunches& WgmmaLaunchesOf(formats::WeightFormat format);

}  // namespace wintserve::kernels::cuda
