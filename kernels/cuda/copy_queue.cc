#include "kernels/cuda/copy_queue.h"

#include <utility>

#include "common/check.h"
#include "common/status_macros.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/handles.h"
#include "kernels/cuda/recorded_event.h"

namespace wintserve::kernels::cuda {
namespace {

class CudaCopyQueue final : public CopyQueue {
 public:
  CudaCopyQueue(cudaStream_t operators, Stream copies, cuda::Event fence)
      : operators_(operators), copies_(std::move(copies)), fence_(std::move(fence)) {}

  ~CudaCopyQueue() override {
    // Whoever owns the host memory may give it up now. A fault has been reported where it was
    // waited for.
    cudaStreamSynchronize(copies_.get());
  }

  void CopyFromHost(void* device, const void* host, int64_t size_bytes) override {
    CUDA_CALL(cudaMemcpyAsync, device, host, static_cast<size_t>(size_bytes),
              cudaMemcpyHostToDevice, copies_.get());
  }
  void CopyToHost(void* host, const void* device, int64_t size_bytes) override {
    CUDA_CALL(cudaMemcpyAsync, host, device, static_cast<size_t>(size_bytes),
              cudaMemcpyDeviceToHost, copies_.get());
  }
  void WaitForOperators() override { Fence(operators_, copies_.get()); }
  void HoldOperators() override { Fence(copies_.get(), operators_); }
  std::unique_ptr<kernels::Event> Record() override {
    return RecordEvent(copies_.get(), EventTiming::kOff);
  }

 private:
  // What is called on `later` from now on waits for what was called on `earlier`. A wait is for the
  // event as it was last recorded, so one event serves all fences.
  void Fence(cudaStream_t earlier, cudaStream_t later) {
    CUDA_CALL(cudaEventRecord, fence_.get(), earlier);
    CUDA_CALL(cudaStreamWaitEvent, later, fence_.get(), 0u);
  }

  const cudaStream_t operators_;
  const Stream copies_;
  const cuda::Event fence_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<CopyQueue>> CreateCopyQueue(cudaStream_t operators) {
  ASSIGN_OR_RETURN(Stream copies, CreateStream());
  ASSIGN_OR_RETURN(cuda::Event fence, CreateEvent());
  return std::make_unique<CudaCopyQueue>(operators, std::move(copies), std::move(fence));
}

}  // namespace wintserve::kernels::cuda
