#include "kernels/cuda/scratch.h"

#include <fmt/format.h>

#include <string>
#include <utility>

#include "common/check.h"
#include "kernels/cuda/cuda_check.h"

namespace wintserve::kernels::cuda {

absl::Status Scratch::Reserve(int64_t size_bytes, cudaStream_t stream) {
  const int64_t size_before = buffer_->size_bytes();
  if (size_bytes <= size_before) return absl::OkStatus();
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  CUDA_CALL(cudaStreamIsCapturing, stream, &capture);
  CHECK(capture == cudaStreamCaptureStatusNone,
        "a graph's operators need {} bytes of scratch memory, those that ran before it {}",
        size_bytes, size_before);
  CUDA_CALL(cudaStreamSynchronize, stream);  // whoever still uses the smaller one
  buffer_ = std::make_shared<const DeviceBuffer>();
  absl::StatusOr<DeviceBuffer> larger = DeviceBuffer::Allocate(size_bytes);
  if (!larger.ok()) {
    return absl::Status(
        larger.status().code(),
        fmt::format("an operator needs {} bytes of scratch memory, {} before: {}", size_bytes,
                    size_before, std::string(larger.status().message())));
  }
  buffer_ = std::make_shared<const DeviceBuffer>(*std::move(larger));
  return absl::OkStatus();
}

}  // namespace wintserve::kernels::cuda
