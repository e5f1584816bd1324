// The tokens of one forward pass: as the host describes them, and as a device has them.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/sampling/sampling_types.h"

namespace wintserve::kernels {

// Tokens of one block of the KV pool.
inline constexpr int kKvBlockTokens = 64;

// How an id is drawn from a row's logits; kernels/sampling/definition.h states the rule. The random
// numbers are a pure function of (seed, position, choice_index).
struct SampleParams {
  float temperature = 1.0f;  // >= 0; 0 is greedy
  float top_p = 1.0f;        // (0, 1]
  int32_t top_k = 0;         // >= 0; 0 keeps all
  float min_p = 0.0f;        // [0, 1]; 0 keeps all
  // Other than none: the row's slot was started (Backend::StartSlot) with the sequence's ids.
  sampling::Penalties penalties = {};
  int32_t num_logit_biases = 0;   // all that the slot was started with, or 0
  int32_t num_top_logprobs = -1;  // 0 … kMaxTopLogprobs; -1: no log-probability either
  bool mask_stop_ids = false;
  int64_t seed = 0;
  uint32_t position = 0;  // of the drawn token in its sequence
  uint32_t choice_index = 0;
};

// What drawing for one sequence needs beyond the SampleParams of its rows. Spans are host memory.
struct SlotSampling {
  // Ids rising, each once; at most kMaxLogitBiases.
  std::span<const sampling::LogitBias> logit_biases = {};
  // Of the sequence so far, for penalties. Ids that are not sampled do not count.
  std::span<const int32_t> prompt_ids = {};
  std::span<const int32_t> generated_ids = {};
};

// Log-probabilities by row of logits, in device memory.
struct LogprobArrays {
  float* logprobs = nullptr;      // [rows] of the drawn or given id
  int32_t* ranks = nullptr;       // [rows] its place in the order of falling logits, from 1
  int32_t* top_ids = nullptr;     // [rows, kMaxTopLogprobs] in that order
  float* top_logprobs = nullptr;  // [rows, kMaxTopLogprobs]

  // Of the rows from `row` on.
  LogprobArrays From(int64_t row) const {
    const int64_t top = row * sampling::kMaxTopLogprobs;
    return {logprobs + row, ranks + row, top_ids + top, top_logprobs + top};
  }
};

// A run of consecutive tokens that continues one sequence at `position`. Its keys and values are
// written to the sequence's blocks before they are attended to; those of positions 0 … position - 1
// are there already.
struct BatchRow {
  int32_t position = 0;                  // of the row's first token
  int32_t length = 0;                    // tokens; >= 1
  std::span<const int32_t> block_table;  // of the pool's blocks; covers position + length tokens
  // The row's last token wants logits; the other two are for drawing from them.
  bool want_logits = false;
  int32_t slot = 0;  // of the sequence; no two rows share one
  SampleParams sample = {};
};

// Stands in Batch::tokens for the id that was drawn last for a slot and may not have reached the
// host yet.
constexpr int32_t TokenOfSlot(int32_t slot) { return -1 - slot; }

struct Batch {
  std::vector<int32_t> tokens = {};  // of all rows, concatenated: ids, or TokenOfSlot
  std::vector<BatchRow> rows = {};
  // Behind them, rows of no sequence: a token each, which wants logits. They bring a batch to the
  // size that a graph was captured for (Backend::Capture). What operators give for them is not
  // defined, and they change nothing: no block, no slot's last id, no count.
  int32_t num_padding_rows = 0;
};

// What a DeviceBatch has room for.
struct BatchLimits {
  int64_t max_tokens = 0;
  int64_t max_rows = 0;
  int64_t max_blocks_per_row = 0;
  int32_t num_slots = 0;
  std::vector<int32_t> stop_ids = {};  // for mask_stop_ids; in rising order, each once
  // Ids 0 … counted_vocab_size - 1 are counted for penalties. 0: no row has any.
  int64_t counted_vocab_size = 0;

  constexpr int64_t max_sequence_tokens() const { return max_blocks_per_row * kKvBlockTokens; }
};

// Blocks that hold positions 0 … position + length - 1: the part of its block table that a row
// needs.
constexpr int64_t BlocksOf(const BatchRow& row) {
  return (int64_t{row.position} + row.length + kKvBlockTokens - 1) / kKvBlockTokens;
}

// A batch beyond the limits, or one whose rows do not fit its tokens, is our bug (CHECK).
void CheckBatch(const Batch& batch, const BatchLimits& limits);
// The same for a slot that is started.
void CheckSlotSampling(int32_t slot, const SlotSampling& sampling, const BatchLimits& limits);

// A batch in device memory, with the ids that were drawn last for every slot, and what drawing for
// it needs. Made by a backend
// (Backend::CreateBatch), filled anew for each forward pass (Backend::SetBatch).
// Ownership: the backend outlives it.
// Threading: that of the backend.
class DeviceBatch {
 public:
  virtual ~DeviceBatch() = default;

  // With those of padding rows.
  int64_t num_tokens() const { return num_tokens_; }
  int64_t num_rows() const { return num_rows_; }
  int64_t num_logit_rows() const { return num_logit_rows_; }
  // Device memory [num_logit_rows()]: the places in the batch of the tokens that want logits, in
  // row order.
  virtual const int32_t* logit_tokens() const = 0;
  // Device memory [num_tokens()]: for Backend::Route, the place of the token whose experts a token
  // takes: its own, but the first token's for padding, so that no expert is read for padding alone.
  // Null without padding rows: a graph is captured with some.
  virtual const int32_t* route_as() const = 0;

 protected:
  void SetCounts(int64_t num_tokens, int64_t num_rows, int64_t num_logit_rows) {
    num_tokens_ = num_tokens;
    num_rows_ = num_rows;
    num_logit_rows_ = num_logit_rows;
  }

 private:
  int64_t num_tokens_ = 0;
  int64_t num_rows_ = 0;
  int64_t num_logit_rows_ = 0;
};

}  // namespace wintserve::kernels
