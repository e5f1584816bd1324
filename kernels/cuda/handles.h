// What the CUDA runtime lends, owned: streams, events, device memory, page-locked host memory.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <type_traits>

#include "absl/status/statusor.h"

namespace wintserve::kernels::cuda {

struct StreamDestroyer {
  void operator()(cudaStream_t stream) const noexcept;
};
using Stream = std::unique_ptr<std::remove_pointer_t<cudaStream_t>, StreamDestroyer>;

// On the current device; does not wait for the legacy default stream, nor does that wait for it.
absl::StatusOr<Stream> CreateStream();

struct EventDestroyer {
  void operator()(cudaEvent_t event) const noexcept;
};
using Event = std::unique_ptr<std::remove_pointer_t<cudaEvent_t>, EventDestroyer>;

enum class EventTiming { kOff, kOn };  // kOn: for cudaEventElapsedTime; recording costs more

absl::StatusOr<Event> CreateEvent(EventTiming timing = EventTiming::kOff);

// Device memory of the device that was current at creation. Not zeroed. Freeing it waits for the
// device, so buffers live as long as what computes with them.
class DeviceBuffer {
 public:
  // RESOURCE_EXHAUSTED: no memory. size_bytes 0 gives a null pointer.
  static absl::StatusOr<DeviceBuffer> Allocate(int64_t size_bytes);
  DeviceBuffer() = default;

  template <typename T = void>
  T* data() const {
    return static_cast<T*>(memory_.get());
  }
  int64_t size_bytes() const { return size_bytes_; }

 private:
  struct Freer {
    void operator()(void* memory) const noexcept;
  };
  std::unique_ptr<void, Freer> memory_;
  int64_t size_bytes_ = 0;
};

// Page-locked host memory, which the device reads and writes while the host goes on.
class PinnedBuffer {
 public:
  // RESOURCE_EXHAUSTED: no memory that can be locked.
  static absl::StatusOr<PinnedBuffer> Allocate(int64_t size_bytes);
  PinnedBuffer() = default;

  template <typename T = void>
  T* data() const {
    return static_cast<T*>(memory_.get());
  }
  int64_t size_bytes() const { return size_bytes_; }

 private:
  struct Freer {
    void operator()(void* memory) const noexcept;
  };
  std::unique_ptr<void, Freer> memory_;
  int64_t size_bytes_ = 0;
};

}  // namespace wintserve::kernels::cuda
