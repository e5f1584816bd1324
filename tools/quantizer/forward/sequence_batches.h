// The calibration tokens of all sequences, one behind the other, in batches of whole sequences.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/batch.h"
#include "tools/quantizer/forward/calibration_text.h"

namespace wintserve::quantizer {

// Immutable. A token's number is its place among the tokens of all sequences in their order; a
// batch holds the tokens first_token … first_token + num_tokens - 1. Each batch has the KV pool for
// itself: blocks 0 … num_blocks - 1 hold its sequences, one behind the other.
class SequenceBatches {
 public:
  struct Range {
    int64_t first_token = 0;
    int64_t num_tokens = 0;
    int64_t first_sequence = 0;
    int64_t num_sequences = 0;
    int64_t num_blocks = 0;
  };

  // A batch takes sequences as long as they fit into max_batch_tokens; a longer sequence has one of
  // its own. REQUIRES: there are sequences, and none is empty.
  SequenceBatches(std::vector<TokenSequence> sequences, int64_t max_batch_tokens);
  SequenceBatches(const SequenceBatches&) = delete;
  SequenceBatches& operator=(const SequenceBatches&) = delete;

  const std::vector<TokenSequence>& sequences() const { return sequences_; }
  int64_t num_tokens() const { return num_tokens_; }
  const std::vector<Range>& ranges() const { return ranges_; }
  int64_t max_batch_tokens() const { return limits_.max_tokens; }
  int64_t max_blocks() const { return static_cast<int64_t>(block_ids_.size()); }
  // Of every batch.
  const kernels::BatchLimits& limits() const { return limits_; }

  // Its rows refer to this object.
  kernels::Batch MakeBatch(const Range& range) const;

 private:
  const std::vector<TokenSequence> sequences_;
  std::vector<Range> ranges_;
  int64_t num_tokens_ = 0;
  std::vector<int32_t> block_ids_;  // 0, 1, …
  kernels::BatchLimits limits_;
};

}  // namespace wintserve::quantizer
