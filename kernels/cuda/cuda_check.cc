#include "kernels/cuda/cuda_check.h"

#include <cstdlib>

#include "common/log.h"

namespace wintserve::kernels::cuda {

std::string ErrorText(cudaError_t error) {
  return fmt::format("{} ({})", cudaGetErrorName(error), cudaGetErrorString(error));
}

void CudaCallFailed(const char* file, int line, const char* call, const std::string& arguments,
                    cudaError_t error) {
  int device = -1;
  cudaGetDevice(&device);  // -1 stays if even that fails
  LOG_ERROR("{}:{}: {}({}) failed on device {}: {}", file, line, call, arguments, device,
            ErrorText(error));
  spdlog::default_logger()->flush();
  std::abort();
}

}  // namespace wintserve::kernels::cuda
