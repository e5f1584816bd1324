#include "kernels/cuda/matmul/wgmma_kernels.cuh"

namespace wintserve::kernels::cuda {

const WgmmaLaunches& Wint4WgmmaLaunches() { return WgmmaLaunchesOfCodec<Wint4Codec>(); }

}  // namespace wintserve::kernels::cuda
