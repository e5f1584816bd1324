// A kernels::Event of a stream.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>

#include "absl/status/status.h"
#include "kernels/backend.h"
#include "kernels/cuda/handles.h"

namespace wintserve::kernels::cuda {

// After what was called on the stream before. MicrosecondsSince needs both events with
// EventTiming::kOn. `failed`: if not OK, what Wait() returns, once that is over.
std::unique_ptr<kernels::Event> RecordEvent(cudaStream_t stream, EventTiming timing,
                                            absl::Status failed = absl::OkStatus());

}  // namespace wintserve::kernels::cuda
