#include "kernels/cuda/matmul/wgmma_kernels.cuh"

namespace wintserve::kernels::cuda {

const WgmmaLaunches& Wint2WgmmaLaunches() { return WgmmaLaunchesOfCodec<Wint2Codec>(); }

}  // namespace wintserve::kernels::cuda
