#include "kernels/cuda/device_code.h"

namespace wintserve::kernels::cuda {
namespace {

__global__ void EmptyKernel() {}

}  // namespace

cudaError_t FindDeviceCode() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, EmptyKernel);
}

}  // namespace wintserve::kernels::cuda
