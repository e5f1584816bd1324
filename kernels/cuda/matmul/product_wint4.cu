#include "kernels/cuda/matmul/product_kernels.cuh"

namespace wintserve::kernels::cuda {

const ProductLaunches& Wint4Launches() { return LaunchesOfCodec<Wint4Codec>(); }

}  // namespace wintserve::kernels::cuda
