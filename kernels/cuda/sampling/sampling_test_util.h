// Rows of logits and requests on the device, for the tests of sampling and log-probabilities.
#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <vector>

#include "kernels/cpu/sampling.h"
#include "kernels/cpu/sampling_test_util.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/handles.h"
#include "kernels/cuda/sampling/sampling.h"

namespace wintserve::kernels::cuda {

template <typename T>
class DeviceArray {
 public:
  // Filled with bytes 0xff: NaN, or -1.
  explicit DeviceArray(size_t size) : size_(size) {
    auto memory = DeviceBuffer::Allocate(static_cast<int64_t>(size * sizeof(T)));
    if (!memory.ok()) {
      ADD_FAILURE() << memory.status();
      std::abort();
    }
    memory_ = *std::move(memory);
    if (size > 0) CUDA_CALL(cudaMemset, data(), 0xff, size * sizeof(T));
  }
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) { Set(values); }

  T* data() const { return memory_.data<T>(); }

  void Set(const std::vector<T>& values) {
    ASSERT_EQ(values.size(), size_);
    if (size_ == 0) return;
    CUDA_CALL(cudaMemcpy, data(), values.data(), size_ * sizeof(T), cudaMemcpyDefault);
  }
  // Waits for what was launched on the default stream.
  std::vector<T> Get() const {
    std::vector<T> values(size_);
    if (size_ > 0) {
      CUDA_CALL(cudaMemcpy, values.data(), data(), size_ * sizeof(T), cudaMemcpyDefault);
    }
    return values;
  }

 private:
  size_t size_;
  DeviceBuffer memory_;
};

// What a launch reads and writes, for rows of one vocabulary. Slots are not in the order of rows,
// some are unused.
class DeviceRows {
 public:
  // padding: floats between one row of logits and the next. Every request with masked ids has the
  // same ones: those of the launch.
  explicit DeviceRows(const std::vector<cpu::TestRequest>& requests, int padding = 0)
      : num_rows_(static_cast<int>(requests.size())),
        vocabulary_(static_cast<int>(requests[0].logits.size())),
        logits_stride_(vocabulary_ + padding),
        counts_stride_((vocabulary_ + 3) / 4 * 4),
        logits_(num_rows_ * logits_stride_),
        rows_(num_rows_),
        counts_(num_slots() * counts_stride_),
        ids_(num_rows_),
        last_ids_(num_slots()) {
    std::vector<float> logits(num_rows_ * logits_stride_, std::numeric_limits<float>::quiet_NaN());
    std::vector<sampling::Occurrence> counts(num_slots() * counts_stride_, 0);
    size_t max_bias = 0;
    for (const cpu::TestRequest& r : requests) max_bias = std::max(max_bias, r.bias.size());
    std::vector<sampling::LogitBias> bias(num_slots() * max_bias);
    std::vector<int32_t> stop_ids;
    for (int i = 0; i < num_rows_; ++i) {
      const cpu::TestRequest& r = requests[i];
      std::copy(r.logits.begin(), r.logits.end(), logits.begin() + i * logits_stride_);
      for (const auto [id, occurrence] : r.occurrences) {
        if (id < vocabulary_) counts[SlotOf(i) * counts_stride_ + id] = occurrence;
      }
      std::copy(r.bias.begin(), r.bias.end(), bias.begin() + SlotOf(i) * max_bias);
      if (!r.masked.empty()) stop_ids = r.masked;
      host_rows_.push_back(RowOf(i, r));
    }
    logits_.Set(logits);
    counts_.Set(counts);
    rows_.Set(host_rows_);
    bias_stride_ = static_cast<int64_t>(max_bias);
    bias_ = DeviceArray<sampling::LogitBias>(bias);
    num_stop_ids_ = static_cast<int>(stop_ids.size());
    stop_ids_ = DeviceArray<int32_t>(stop_ids);
  }

  int num_slots() const { return num_rows_ + 5; }
  int SlotOf(int row) const { return num_slots() - 2 - row; }

  SamplingArgs args() const {
    return {.logits = logits_.data(),
            .logits_stride = logits_stride_,
            .num_rows = num_rows_,
            .vocabulary = vocabulary_,
            .rows = rows_.data(),
            .stop_ids = stop_ids_.data(),
            .num_stop_ids = num_stop_ids_,
            .logit_bias = bias_.data(),
            .logit_bias_stride = bias_stride_,
            .token_counts = counts_.data(),
            .token_counts_stride = counts_stride_,
            .ids = ids_.data(),
            .last_ids = last_ids_.data()};
  }

  std::vector<SamplingRow>& host_rows() { return host_rows_; }
  void UploadRows() { rows_.Set(host_rows_); }
  DeviceArray<float>& logits() { return logits_; }
  DeviceArray<sampling::Occurrence>& counts() { return counts_; }
  DeviceArray<int32_t>& ids() { return ids_; }
  DeviceArray<int32_t>& last_ids() { return last_ids_; }

 private:
  SamplingRow RowOf(int row, const cpu::TestRequest& r) const {
    return {.slot = SlotOf(row),
            .temperature = r.scalars.temperature,
            .top_p = r.scalars.top_p,
            .top_k = r.scalars.top_k,
            .min_p = r.scalars.min_p,
            .min_scaled_logit = sampling::MinScaledLogit(r.scalars.min_p),
            .penalties = r.scalars.penalties,
            .num_logit_bias = static_cast<int32_t>(r.bias.size()),
            .masks_stop_ids = r.masked.empty() ? 0 : 1,
            .position = r.scalars.position,
            .choice_index = r.scalars.choice_index,
            .seed = r.scalars.seed};
  }

  const int num_rows_;
  const int vocabulary_;
  const int64_t logits_stride_;
  const int64_t counts_stride_;
  std::vector<SamplingRow> host_rows_;
  DeviceArray<float> logits_;
  DeviceArray<SamplingRow> rows_;
  DeviceArray<sampling::Occurrence> counts_;
  DeviceArray<int32_t> ids_;
  DeviceArray<int32_t> last_ids_;
  int64_t bias_stride_ = 0;
  int num_stop_ids_ = 0;
  DeviceArray<sampling::LogitBias> bias_{0};
  DeviceArray<int32_t> stop_ids_{0};
};

}  // namespace wintserve::kernels::cuda
