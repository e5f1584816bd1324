// The CUDA twin of kernels::Backend.
//
// Activations are float32 between operators. Inside, products round them once to binary16 under a
// power of two of their row and weights not at all (matmul/matmul.h), attention works in bfloat16
// as the KV cache is (attention/attention.h), the router is true float32 (rows/float_product.h).
#pragma once

#include <cuda_runtime_api.h>

#include <memory>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/plan/kv_layout.h"

namespace wintserve::kernels::cuda {

struct CudaBackendOptions {
  int device = 0;  // ordinal among those that the process sees
  plan::KvCacheKind kv_cache = plan::KvCacheKind::kBfloat16;
  int num_host_threads = 1;  // that pack weights, including the calling thread; >= 1
};

// Makes the device current for the calling thread, which is the one that may call the backend.
// UNAVAILABLE: no such device, or no code for it in this build; the message says which.
absl::StatusOr<std::unique_ptr<Backend>> CreateCudaBackend(const CudaBackendOptions& options);

// The stream on which the operators of a backend that CreateCudaBackend made are launched: for
// collectives, which stand in their order.
cudaStream_t StreamOf(const Backend& backend);

}  // namespace wintserve::kernels::cuda
