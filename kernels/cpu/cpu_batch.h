// The CPU twin of DeviceBatch: a copy in host memory, with every id known.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/batch.h"
#include "kernels/cpu/token_counts.h"

namespace wintserve::kernels::cpu {

// Tokens first_token … first_token + length - 1 of the batch continue one sequence at `position`.
struct SequenceChunk {
  int64_t first_token = 0;
  int32_t position = 0;
  int32_t length = 0;
  std::span<const int32_t> block_table;  // covers position + length tokens
};

class CpuBatch final : public DeviceBatch {
 public:
  explicit CpuBatch(const BatchLimits& limits);

  void Set(const Batch& batch);
  void KeepIds(const int32_t* ids);
  void StartSlot(int32_t slot, const SlotSampling& sampling);
  // The i-th row that wants logits has drawn `id`.
  void CountDrawn(int64_t i, int32_t id);

  std::span<const int32_t> tokens() const { return tokens_; }
  std::span<const int32_t> positions() const { return positions_; }
  // Without padding rows.
  std::span<const SequenceChunk> chunks() const { return chunks_; }
  // Whether the i-th row that wants logits is of no sequence.
  bool is_padding(int64_t i) const { return logit_rows_[i].slot < 0; }
  // Of the i-th row that wants logits.
  const SampleParams& sample(int64_t i) const { return logit_rows_[i].sample; }
  // Of that row's slot, as far as the row's SampleParams ask for it.
  std::span<const sampling::LogitBias> logit_biases(int64_t i) const;
  std::span<const TokenOccurrence> occurrences(int64_t i) const;
  std::span<const int32_t> stop_ids() const { return limits_.stop_ids; }

  const int32_t* logit_tokens() const override { return logit_tokens_.data(); }
  const int32_t* route_as() const override {
    return route_as_.empty() ? nullptr : route_as_.data();
  }

 private:
  struct LogitRow {
    int32_t slot = 0;  // -1: padding
    SampleParams sample = {};
  };

  struct SlotState {
    std::vector<sampling::LogitBias> logit_biases;
    TokenCounts counts;
  };

  const BatchLimits limits_;
  std::vector<SlotState> slots_;
  std::vector<int32_t> ids_of_slots_;
  std::vector<int32_t> tokens_;
  std::vector<int32_t> positions_;
  std::vector<SequenceChunk> chunks_;
  std::vector<int32_t> block_tables_;  // of all chunks, concatenated
  std::vector<int32_t> logit_tokens_;
  std::vector<int32_t> route_as_;  // empty without padding
  std::vector<LogitRow> logit_rows_;
};

}  // namespace wintserve::kernels::cpu
