// The CopyQueue of a CudaBackend: a stream beside that of the operators.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>

#include "absl/status/statusor.h"
#include "kernels/backend.h"

namespace wintserve::kernels::cuda {

// `operators`: the stream that the operators are launched on; it outlives the queue.
absl::StatusOr<std::unique_ptr<CopyQueue>> CreateCopyQueue(cudaStream_t operators);

}  // namespace wintserve::kernels::cuda
