#include "kernels/cuda/cuda_status.h"

#include <fmt/format.h>

#include "kernels/cuda/cuda_check.h"

namespace wintserve::kernels::cuda {
namespace {

absl::StatusCode CodeOf(cudaError_t error) {
  switch (error) {
    case cudaErrorMemoryAllocation:
      return absl::StatusCode::kResourceExhausted;
    case cudaErrorNoDevice:
    case cudaErrorInsufficientDriver:
    case cudaErrorInvalidDevice:
    case cudaErrorDevicesUnavailable:
    case cudaErrorInitializationError:
    case cudaErrorSystemDriverMismatch:
    case cudaErrorSystemNotReady:
      return absl::StatusCode::kUnavailable;
    default:
      return absl::StatusCode::kInternal;
  }
}

}  // namespace

absl::Status ToStatus(cudaError_t error, std::string_view what) {
  if (error == cudaSuccess) return absl::OkStatus();
  cudaGetLastError();  // reported here; a later look at the last error must not find it again
  int device = -1;
  cudaGetDevice(&device);
  return absl::Status(CodeOf(error),
                      fmt::format("{} on device {}: {}", what, device, ErrorText(error)));
}

}  // namespace wintserve::kernels::cuda
