#include "kernels/cuda/side_stream.h"

#include "common/status_macros.h"
#include "kernels/cuda/cuda_check.h"

namespace wintserve::kernels::cuda {

absl::StatusOr<SideStream> SideStream::Create() {
  SideStream side;
  ASSIGN_OR_RETURN(side.stream_, CreateStream());
  ASSIGN_OR_RETURN(side.forked_, CreateEvent());
  ASSIGN_OR_RETURN(side.done_, CreateEvent());
  return side;
}

void SideStream::Fork(cudaStream_t main) {
  CUDA_CALL(cudaEventRecord, forked_.get(), main);
  CUDA_CALL(cudaStreamWaitEvent, stream_.get(), forked_.get(), 0u);
}

void SideStream::Join(cudaStream_t main) {
  CUDA_CALL(cudaEventRecord, done_.get(), stream_.get());
  CUDA_CALL(cudaStreamWaitEvent, main, done_.get(), 0u);
}

}  // namespace wintserve::kernels::cuda
