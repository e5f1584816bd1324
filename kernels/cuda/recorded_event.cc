#include "kernels/cuda/recorded_event.h"

#include <cmath>
#include <utility>

#include "common/check.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/cuda_status.h"

namespace wintserve::kernels::cuda {
namespace {

class RecordedEvent final : public kernels::Event {
 public:
  explicit RecordedEvent(cuda::Event event) : event_(std::move(event)) {}

  bool IsDone() override { return cudaEventQuery(event_.get()) != cudaErrorNotReady; }
  absl::Status Wait() override {
    return ToStatus(cudaEventSynchronize(event_.get()), "waiting for what was computed");
  }
  int64_t MicrosecondsSince(const kernels::Event& earlier) const override {
    float milliseconds = 0;
    CUDA_CALL(cudaEventElapsedTime, &milliseconds,
              static_cast<const RecordedEvent&>(earlier).event_.get(), event_.get());
    return std::lround(double{milliseconds} * 1000);
  }

 private:
  const cuda::Event event_;
};

}  // namespace

std::unique_ptr<kernels::Event> RecordEvent(cudaStream_t stream, EventTiming timing) {
  absl::StatusOr<cuda::Event> event = CreateEvent(timing);
  CHECK(event.ok(), "{}", event.status().ToString());
  CUDA_CALL(cudaEventRecord, event->get(), stream);
  return std::make_unique<RecordedEvent>(*std::move(event));
}

}  // namespace wintserve::kernels::cuda
