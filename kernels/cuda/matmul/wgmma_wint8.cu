#include "kernels/cuda/matmul/wgmma_kernels.cuh"

namespace wintserve::kernels::cuda {

const WgmmaLaunches& Wint8WgmmaLaunches() { return WgmmaLaunchesOfCodec<Wint8Codec>(); }

}  // namespace wintserve::kernels::cuda
