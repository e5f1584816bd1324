// The CUDA twin of DeviceBatch.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>
#include <deque>
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
  void StartSlot(int32_t slot, const SlotSampling& sampling);

  const plan::BatchArrays& arrays() const { return arrays_; }
  // Device memory [num_logit_rows()].
  const SamplingRow* sampling_rows() const { return sampling_rows_; }
  int32_t max_row_length() const { return max_row_length_; }
  const int32_t* stop_ids() const { return stop_ids_; }  // device memory
  int64_t num_stop_ids() const { return static_cast<int64_t>(limits_.stop_ids.size()); }
  int64_t counted_vocab_size() const { return limits_.counted_vocab_size; }
  // Device memory [num_slots, token_counts_stride()]; null when nothing is counted.
  sampling::Occurrence* token_counts() const { return token_counts_; }
  int64_t token_counts_stride() const { return (limits_.counted_vocab_size + 3) / 4 * 4; }
  // Device memory [num_slots, sampling::kMaxLogitBiases].
  const sampling::LogitBias* logit_biases() const { return logit_biases_; }
  // Of the batch that was set last.
  bool has_penalties() const { return has_penalties_; }
  bool wants_logprobs() const { return wants_logprobs_; }

  const int32_t* logit_tokens() const override { return arrays_.logit_tokens; }
  const int32_t* route_as() const override { return has_padding_ ? arrays_.route_as : nullptr; }

 private:
  static constexpr int kStagings = 4;
  struct Staging {
    PinnedBuffer words;
    Event copied;
    bool in_use = false;
  };

  // Page-locked memory through which a slot's ids and biases pass.
  struct SlotStaging {
    PinnedBuffer memory;
    Event copied;
  };
  static constexpr size_t kMaxSlotStagings = 16;

  CudaBatch(const BatchLimits& limits, cudaStream_t stream) : limits_(limits), stream_(stream) {}
  absl::Status AllocateMemory();
  absl::StatusOr<SlotStaging> NewSlotStaging() const;
  // One that is free; waits when all have been lent and none was read yet.
  SlotStaging TakeSlotStaging();

  const BatchLimits limits_;
  const cudaStream_t stream_;
  DeviceBuffer memory_;
  int32_t* words_ = nullptr;  // in memory_, as is all that follows
  plan::BatchArrays arrays_;
  SamplingRow* sampling_rows_ = nullptr;
  int32_t* stop_ids_ = nullptr;
  sampling::Occurrence* token_counts_ = nullptr;
  sampling::LogitBias* logit_biases_ = nullptr;
  int32_t* sequence_ids_ = nullptr;  // [max_sequence_tokens] of the slot that is being started
  int32_t max_row_length_ = 0;
  bool has_padding_ = false;
  bool has_penalties_ = false;
  bool wants_logprobs_ = false;
  std::array<Staging, kStagings> stagings_;
  int next_staging_ = 0;
  std::deque<SlotStaging> slot_stagings_;  // the one that was lent first in front
};

}  // namespace wintserve::kernels::cuda
