#include "kernels/cuda/matmul/wgmma_kernels.cuh"

namespace wintserve::kernels::cuda {

const WgmmaLaunches& Bfloat16WgmmaLaunches() { return WgmmaLaunchesOfCodec<Bfloat16Codec>(); }

}  // namespace wintserve::kernels::cuda
