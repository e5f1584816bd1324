#include "kernels/cuda/matmul/product_kernels.cuh"

namespace wintserve::kernels::cuda {

const ProductLaunches& Wint8Launches() { return LaunchesOfCodec<Wint8Codec>(); }

}  // namespace wintserve::kernels::cuda
