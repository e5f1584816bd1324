#include "kernels/cuda/cuda_batch.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "common/status_macros.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/rows/batch_kernels.h"

namespace wintserve::kernels::cuda {
namespace {

// Of a slot's staging: the biases come first.
constexpr int64_t kSlotBiasBytes =
    sampling::kMaxLogitBiases * static_cast<int64_t>(sizeof(sampling::LogitBias));

// Hands out parts of one allocation; with a null base it only counts.
class Carver {
 public:
  explicit Carver(char* base) : base_(base) {}

  template <typename T>
  T* Take(int64_t count) {
    char* const part = base_ == nullptr ? nullptr : base_ + size_bytes_;
    size_bytes_ += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    return reinterpret_cast<T*>(part);
  }
  int64_t size_bytes() const { return size_bytes_; }

 private:
  char* const base_;
  int64_t size_bytes_ = 0;
};

}  // namespace

absl::StatusOr<std::unique_ptr<CudaBatch>> CudaBatch::Create(const BatchLimits& limits,
                                                             cudaStream_t stream) {
  auto batch = std::unique_ptr<CudaBatch>(new CudaBatch(limits, stream));
  RETURN_IF_ERROR(batch->AllocateMemory());
  return batch;
}

absl::Status CudaBatch::AllocateMemory() {
  const int64_t num_words = plan::LargestShape(limits_).num_words();
  const auto carve = [&](char* base) {
    Carver carver(base);
    words_ = carver.Take<int32_t>(num_words);
    arrays_.tokens = carver.Take<int32_t>(limits_.max_tokens);
    arrays_.positions = carver.Take<int32_t>(limits_.max_tokens);
    arrays_.token_rows = carver.Take<int32_t>(limits_.max_tokens);
    arrays_.route_as = carver.Take<int32_t>(limits_.max_tokens);
    arrays_.row_first_tokens = carver.Take<int32_t>(limits_.max_rows);
    arrays_.row_positions = carver.Take<int32_t>(limits_.max_rows);
    arrays_.row_lengths = carver.Take<int32_t>(limits_.max_rows);
    arrays_.block_tables = carver.Take<int32_t>(limits_.max_rows * limits_.max_blocks_per_row);
    arrays_.block_table_stride = limits_.max_blocks_per_row;
    arrays_.logit_tokens = carver.Take<int32_t>(limits_.max_rows);
    arrays_.logit_slots = carver.Take<int32_t>(limits_.max_rows);
    sampling_rows_ = carver.Take<SamplingRow>(limits_.max_rows);
    arrays_.slot_ids = carver.Take<int32_t>(limits_.num_slots);
    stop_ids_ = carver.Take<int32_t>(num_stop_ids());
    logit_biases_ =
        carver.Take<sampling::LogitBias>(int64_t{limits_.num_slots} * sampling::kMaxLogitBiases);
    if (limits_.counted_vocab_size > 0) {
      sequence_ids_ = carver.Take<int32_t>(limits_.max_sequence_tokens());
      token_counts_ =
          carver.Take<sampling::Occurrence>(int64_t{limits_.num_slots} * token_counts_stride());
    }
    return carver.size_bytes();
  };
  ASSIGN_OR_RETURN(memory_, DeviceBuffer::Allocate(carve(nullptr)));
  carve(memory_.data<char>());
  CUDA_CALL(cudaMemsetAsync, memory_.data(), 0, static_cast<size_t>(memory_.size_bytes()), stream_);
  if (num_stop_ids() > 0) {
    CUDA_CALL(cudaMemcpyAsync, stop_ids_, limits_.stop_ids.data(),
              limits_.stop_ids.size() * sizeof(int32_t), cudaMemcpyHostToDevice, stream_);
  }
  for (Staging& staging : stagings_) {
    ASSIGN_OR_RETURN(staging.words,
                     PinnedBuffer::Allocate(num_words * static_cast<int64_t>(sizeof(int32_t))));
    ASSIGN_OR_RETURN(staging.copied, CreateEvent());
  }
  ASSIGN_OR_RETURN(SlotStaging slot_staging, NewSlotStaging());
  slot_stagings_.push_back(std::move(slot_staging));
  return ToStatus(cudaStreamSynchronize(stream_), "preparing a batch");
}

absl::StatusOr<CudaBatch::SlotStaging> CudaBatch::NewSlotStaging() const {
  SlotStaging staging;
  ASSIGN_OR_RETURN(staging.memory, PinnedBuffer::Allocate(
                                       kSlotBiasBytes + limits_.max_sequence_tokens() *
                                                            static_cast<int64_t>(sizeof(int32_t))));
  ASSIGN_OR_RETURN(staging.copied, CreateEvent());
  return staging;
}

CudaBatch::SlotStaging CudaBatch::TakeSlotStaging() {
  const bool is_free = cudaEventQuery(slot_stagings_.front().copied.get()) == cudaSuccess;
  if (!is_free && slot_stagings_.size() < kMaxSlotStagings) {
    absl::StatusOr<SlotStaging> fresh = NewSlotStaging();
    if (fresh.ok()) return *std::move(fresh);
  }
  SlotStaging first = std::move(slot_stagings_.front());
  slot_stagings_.pop_front();
  if (!is_free) CUDA_CALL(cudaEventSynchronize, first.copied.get());
  return first;
}

void CudaBatch::StartSlot(int32_t slot, const SlotSampling& sampling) {
  CheckSlotSampling(slot, sampling, limits_);
  SlotStaging staging = TakeSlotStaging();
  char* const memory = staging.memory.data<char>();
  if (!sampling.logit_biases.empty()) {
    const size_t num_bytes = sampling.logit_biases.size_bytes();
    std::memcpy(memory, sampling.logit_biases.data(), num_bytes);
    CUDA_CALL(cudaMemcpyAsync, logit_biases_ + int64_t{slot} * sampling::kMaxLogitBiases, memory,
              num_bytes, cudaMemcpyHostToDevice, stream_);
  }
  if (limits_.counted_vocab_size > 0) {
    auto* const ids = reinterpret_cast<int32_t*>(memory + kSlotBiasBytes);
    const auto num_prompt_ids = static_cast<int32_t>(sampling.prompt_ids.size());
    const auto num_generated_ids = static_cast<int32_t>(sampling.generated_ids.size());
    std::copy(sampling.generated_ids.begin(), sampling.generated_ids.end(),
              std::copy(sampling.prompt_ids.begin(), sampling.prompt_ids.end(), ids));
    if (num_prompt_ids + num_generated_ids > 0) {
      CUDA_CALL(cudaMemcpyAsync, sequence_ids_, ids,
                (num_prompt_ids + num_generated_ids) * sizeof(int32_t), cudaMemcpyHostToDevice,
                stream_);
    }
    LaunchResetTokenCounts({.counts = token_counts_ + slot * token_counts_stride(),
                            .vocabulary = static_cast<int32_t>(limits_.counted_vocab_size),
                            .prompt_ids = sequence_ids_,
                            .num_prompt_ids = num_prompt_ids,
                            .generated_ids = sequence_ids_ + num_prompt_ids,
                            .num_generated_ids = num_generated_ids},
                           stream_);
  }
  CUDA_CALL(cudaEventRecord, staging.copied.get(), stream_);
  slot_stagings_.push_back(std::move(staging));
}

void CudaBatch::Set(const Batch& batch) {
  CheckBatch(batch, limits_);
  Staging& staging = stagings_[next_staging_];
  next_staging_ = (next_staging_ + 1) % kStagings;
  if (staging.in_use) CUDA_CALL(cudaEventSynchronize, staging.copied.get());

  const plan::PackedBatchShape shape = plan::ShapeOf(batch);
  plan::PackBatch(batch, staging.words.data<int32_t>());
  CUDA_CALL(cudaMemcpyAsync, words_, staging.words.data(), shape.num_words() * sizeof(int32_t),
            cudaMemcpyHostToDevice, stream_);
  CUDA_CALL(cudaEventRecord, staging.copied.get(), stream_);
  staging.in_use = true;
  LaunchUnpackBatch(words_, shape, arrays_, sampling_rows_, stream_);

  has_padding_ = shape.num_padding_rows > 0;
  max_row_length_ = has_padding_ ? 1 : 0;
  has_penalties_ = false;
  wants_logprobs_ = false;
  for (const BatchRow& row : batch.rows) {
    max_row_length_ = std::max(max_row_length_, row.length);
    if (!row.want_logits) continue;
    has_penalties_ |= !row.sample.penalties.none();
    wants_logprobs_ |= row.sample.num_top_logprobs >= 0;
  }
  SetCounts(shape.num_tokens + shape.num_padding_rows, shape.num_rows + shape.num_padding_rows,
            shape.num_logit_rows + shape.num_padding_rows);
}

void CudaBatch::KeepIds(const int32_t* ids) {
  LaunchKeepIds(ids, num_logit_rows(), arrays_, stream_);
}

}  // namespace wintserve::kernels::cuda
