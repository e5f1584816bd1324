#include "kernels/cuda/device.h"

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include "common/status_macros.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/device_code.h"

namespace wintserve::kernels::cuda {

int NumVisibleDevices() {
  int num_devices = 0;
  if (cudaGetDeviceCount(&num_devices) == cudaSuccess) return num_devices;
  cudaGetLastError();
  return 0;
}

absl::StatusOr<DeviceProperties> QueryDevice(int ordinal) {
  int num_devices = 0;
  const cudaError_t counted = cudaGetDeviceCount(&num_devices);
  if (counted != cudaSuccess && counted != cudaErrorNoDevice) {
    return absl::UnavailableError(fmt::format("no CUDA device: {}", ErrorText(counted)));
  }
  if (ordinal < 0 || ordinal >= num_devices) {
    return absl::UnavailableError(
        fmt::format("no CUDA device {}: {} visible to this process", ordinal,
                    num_devices == 0 ? "none is" : fmt::format("0 … {} are", num_devices - 1)));
  }
  cudaDeviceProp found;
  RETURN_IF_ERROR(ToStatus(cudaGetDeviceProperties(&found, ordinal),
                           fmt::format("reading the properties of device {}", ordinal)));
  return DeviceProperties{
      .ordinal = ordinal,
      .name = found.name,
      .compute_capability_major = found.major,
      .compute_capability_minor = found.minor,
      .num_multiprocessors = found.multiProcessorCount,
      .max_shared_bytes_per_block = static_cast<int64_t>(found.sharedMemPerBlockOptin),
      .l2_bytes = found.l2CacheSize,
      .total_bytes = static_cast<int64_t>(found.totalGlobalMem)};
}

absl::StatusOr<DeviceProperties> UseDevice(int ordinal) {
  ASSIGN_OR_RETURN(DeviceProperties device, QueryDevice(ordinal));
  RETURN_IF_ERROR(ToStatus(cudaSetDevice(ordinal), fmt::format("using device {}", ordinal)));
  const cudaError_t found = FindDeviceCode();
  if (found == cudaErrorNoKernelImageForDevice || found == cudaErrorInvalidDeviceFunction) {
    cudaGetLastError();
    return absl::UnavailableError(
        fmt::format("device {} is {} with compute capability {}.{}, for which this build has no "
                    "code; it has code for {}",
                    ordinal, device.name, device.compute_capability_major,
                    device.compute_capability_minor, WINTSERVE_CUDA_ARCHITECTURES));
  }
  RETURN_IF_ERROR(ToStatus(found, "starting"));
  return device;
}

absl::StatusOr<DeviceMemoryBytes> QueryDeviceMemory() {
  size_t free_bytes = 0;
  size_t total_bytes = 0;
  RETURN_IF_ERROR(
      ToStatus(cudaMemGetInfo(&free_bytes, &total_bytes), "asking for the device's memory"));
  return DeviceMemoryBytes{.free = static_cast<int64_t>(free_bytes),
                           .total = static_cast<int64_t>(total_bytes)};
}

}  // namespace wintserve::kernels::cuda
