#include "kernels/cuda/handles.h"

#include <fmt/format.h>

#include "common/log.h"
#include "common/status_macros.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/cuda_status.h"

namespace wintserve::kernels::cuda {
namespace {

// After a fault every call fails, the releasing ones too, and the fault itself has been reported.
void WarnIfFailed(cudaError_t error, const char* call) {
  if (error != cudaSuccess) LOG_WARNING("{}: {}", call, ErrorText(error));
}

}  // namespace

void StreamDestroyer::operator()(cudaStream_t stream) const noexcept {
  WarnIfFailed(cudaStreamDestroy(stream), "cudaStreamDestroy");
}

absl::StatusOr<Stream> CreateStream() {
  cudaStream_t stream = nullptr;
  RETURN_IF_ERROR(
      ToStatus(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "creating a stream"));
  return Stream(stream);
}

void EventDestroyer::operator()(cudaEvent_t event) const noexcept {
  WarnIfFailed(cudaEventDestroy(event), "cudaEventDestroy");
}

absl::StatusOr<Event> CreateEvent(EventTiming timing) {
  cudaEvent_t event = nullptr;
  const unsigned flags = timing == EventTiming::kOn ? cudaEventDefault : cudaEventDisableTiming;
  RETURN_IF_ERROR(ToStatus(cudaEventCreateWithFlags(&event, flags), "creating an event"));
  return Event(event);
}

absl::StatusOr<DeviceBuffer> DeviceBuffer::Allocate(int64_t size_bytes) {
  DeviceBuffer buffer;
  if (size_bytes == 0) return buffer;
  void* memory = nullptr;
  RETURN_IF_ERROR(ToStatus(cudaMalloc(&memory, static_cast<size_t>(size_bytes)),
                           fmt::format("allocating {} bytes", size_bytes)));
  buffer.memory_.reset(memory);
  buffer.size_bytes_ = size_bytes;
  return buffer;
}

void DeviceBuffer::Freer::operator()(void* memory) const noexcept {
  WarnIfFailed(cudaFree(memory), "cudaFree");
}

absl::StatusOr<PinnedBuffer> PinnedBuffer::Allocate(int64_t size_bytes) {
  PinnedBuffer buffer;
  if (size_bytes == 0) return buffer;
  void* memory = nullptr;
  RETURN_IF_ERROR(
      ToStatus(cudaHostAlloc(&memory, static_cast<size_t>(size_bytes), cudaHostAllocDefault),
               fmt::format("allocating {} bytes of page-locked host memory", size_bytes)));
  buffer.memory_.reset(memory);
  buffer.size_bytes_ = size_bytes;
  return buffer;
}

void PinnedBuffer::Freer::operator()(void* memory) const noexcept {
  WarnIfFailed(cudaFreeHost(memory), "cudaFreeHost");
}

}  // namespace wintserve::kernels::cuda
