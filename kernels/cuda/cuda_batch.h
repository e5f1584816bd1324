// The CUDA twin of DeviceBatch.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "kernels/batch.h"
#include "kernels/cuda/handles.h"
#include "kernels/cuda/sampling/sampling.h"
#include "kernels/plan/packed_batch.h"

namespace wintserve::kernels::cuda {

// A batch passes through page-locked memory of its own until it has been copied; after kStagings
// batches that memory is used again, which is the only wait of the host.
class CudaBatch final : public DeviceBatch {
 public:
  // Fills device memory on `stream`, on which everything that reads the batch must run, too.
  static absl::StatusOr<std::unique_ptr<CudaBatch>> Create(const BatchLimits& limits,
                                                           cudaStream_t stream);

  void Set(const Batch& batch);
  void KeepIds(const int32_t* ids);

  const plan::BatchArrays& arrays() const { return arrays_; }
  // Device memory [num_logit_rows()].
  const SamplingRow* sampling_rows() const { return sampling_rows_; }
  int32_t max_row_length() const { return max_row_length_; }
  const int32_t* stop_ids() const { return stop_ids_; }  // device memory
  int64_t num_stop_ids() const { return static_cast<int64_t>(limits_.stop_ids.size()); }

  const int32_t* logit_tokens() const override { return arrays_.logit_tokens; }

 private:
  static constexpr int kStagings = 4;
  struct Staging {
    PinnedBuffer words;
    Event copied;
    bool in_use = false;
  };

  CudaBatch(const BatchLimits& limits, cudaStream_t stream) : limits_(limits), stream_(stream) {}
  absl::Status AllocateMemory();

  const BatchLimits limits_;
  const cudaStream_t stream_;
  DeviceBuffer memory_;
  int32_t* words_ = nullptr;  // in memory_, as is all that follows
  plan::BatchArrays arrays_;
  SamplingRow* sampling_rows_ = nullptr;
  int32_t* stop_ids_ = nullptr;
  int32_t max_row_length_ = 0;
  std::array<Staging, kStagings> stagings_;
  int next_staging_ = 0;
};

}  // namespace wintserve::kernels::cuda
