#include "kernels/cuda/recorded_event.h"

#include <cmath>
#include <utility>

#include "common/check.h"
#include "common/status_macros.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/cuda_status.h"

namespace wintserve::kernels::cuda {
namespace {

class RecordedEvent final : public kernels::Event {
 public:
  RecordedEvent(cuda::Event event, absl::Status failed)
      : event_(std::move(event)), failed_(std::move(failed)) {}

  bool IsDone() override { return cudaEventQuery(event_.get()) != cudaErrorNotReady; }
  absl::Status Wait() override {
    RETURN_IF_ERROR(ToStatus(cudaEventSynchronize(event_.get()), "waiting for what was computed"));
    return failed_;
  }
  int64_t MicrosecondsSince(const kernels::Event& earlier) const override {
    float milliseconds = 0;
    CUDA_CALL(cudaEventElapsedTime, &milliseconds,
              static_cast<const RecordedEvent&>(earlier).event_.get(), event_.get());
    return std::lround(double{milliseconds} * 1000);
  }

 private:
  const cuda::Event event_;
  const absl::Status failed_;
};

}  // namespace

std::unique_ptr<kernels::Event> RecordEvent(cudaStream_t stream, EventTiming timing,
                                            absl::Status failed) {
  absl::StatusOr<cuda::Event> event = CreateEvent(timing);
  CHECK(event.ok(), "{}", event.status().ToString());
  CUDA_CALL(cudaEventRecord, event->get(), stream);
  return std::make_unique<RecordedEvent>(*std::move(event), std::move(failed));
}

}  // namespace wintserve::kernels::cuda
