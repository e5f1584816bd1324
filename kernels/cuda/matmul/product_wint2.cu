#include "kernels/cuda/matmul/product_kernels.cuh"

namespace wintserve::kernels::cuda {

const ProductLaunches& Wint2Launches() { return LaunchesOfCodec<Wint2Codec>(); }

}  // namespace wintserve::kernels::cuda
