#include "kernels/cuda/matmul/product_kernels.cuh"

namespace wintserve::kernels::cuda {

const ProductLaunches& Bfloat16Launches() { return LaunchesOfCodec<Bfloat16Codec>(); }

}  // namespace wintserve::kernels::cuda
