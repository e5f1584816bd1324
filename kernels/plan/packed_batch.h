// A batch as one run of 32-bit words, so that it reaches a device in one copy, and the arrays that
// the device makes of it at addresses that stay the same from batch to batch.
//
// Words, every section from a multiple of 4 words on:
//   tokens   [num_tokens]          ids, or TokenOfSlot
//   rows     [num_rows]            PackedRow
//   blocks   [num_blocks]          the rows' block tables, as far as they are needed
//   logits   [num_logit_rows]      PackedLogitRow
#pragma once

#include <cstdint>

#include "kernels/batch.h"
#include "kernels/plan/host_device.h"

namespace wintserve::kernels::plan {

struct PackedRow {
  int32_t first_token = 0;
  int32_t position = 0;
  int32_t length = 0;
  int32_t first_block = 0;  // in `blocks`
};

struct alignas(16) PackedLogitRow {
  int32_t token = 0;  // its place in the batch
  int32_t slot = 0;
  SampleParams sample;
  float min_scaled_logit = 0;  // sampling::MinScaledLogit of sample.min_p
};

// Padding rows have no words: they follow from their number.
struct PackedBatchShape {
  int32_t num_tokens = 0;  // this and the next three without padding rows
  int32_t num_rows = 0;
  int32_t num_blocks = 0;
  int32_t num_logit_rows = 0;
  int32_t num_padding_rows = 0;

  static constexpr int64_t RoundUp(int64_t words) { return (words + 3) / 4 * 4; }
  template <typename T>
  static constexpr int64_t WordsOf(int64_t count) {
    return RoundUp(count * static_cast<int64_t>(sizeof(T)) / 4);
  }
  constexpr int64_t rows_word() const { return WordsOf<int32_t>(num_tokens); }
  constexpr int64_t blocks_word() const { return rows_word() + WordsOf<PackedRow>(num_rows); }
  constexpr int64_t logits_word() const { return blocks_word() + WordsOf<int32_t>(num_blocks); }
  constexpr int64_t num_words() const {
    return logits_word() + WordsOf<PackedLogitRow>(num_logit_rows);
  }
};

PackedBatchShape ShapeOf(const Batch& batch);
// The largest that fits the limits.
PackedBatchShape LargestShape(const BatchLimits& limits);

// Writes ShapeOf(batch).num_words() words. REQUIRES: `words` is aligned to 16 bytes.
void PackBatch(const Batch& batch, int32_t* words);

// A batch in device memory.
struct BatchArrays {
  int32_t* tokens = nullptr;      // [max_tokens] ids
  int32_t* positions = nullptr;   // [max_tokens]
  int32_t* token_rows = nullptr;  // [max_tokens] the row that holds the token; -1: padding
  int32_t* route_as = nullptr;    // [max_tokens] DeviceBatch::route_as

  int32_t* row_first_tokens = nullptr;  // [max_rows]
  int32_t* row_positions = nullptr;     // [max_rows]
  int32_t* row_lengths = nullptr;       // [max_rows]; 0: padding
  int32_t* block_tables = nullptr;      // [max_rows, block_table_stride]
  int64_t block_table_stride = 0;       // max_blocks_per_row

  int32_t* logit_tokens = nullptr;  // [max_rows]
  int32_t* logit_slots = nullptr;   // [max_rows]; -1: padding

  int32_t* slot_ids = nullptr;  // [num_slots] the ids drawn last; outlasts the batches
};

// Unpacks row `row`, its tokens and its block table; threads 0 … num_threads - 1 share the work.
WINTSERVE_HOST_DEVICE inline void UnpackRow(const int32_t* words, const PackedBatchShape& shape,
                                            const BatchArrays& arrays, int32_t row, int32_t thread,
                                            int32_t num_threads) {
  const PackedRow packed = reinterpret_cast<const PackedRow*>(words + shape.rows_word())[row];
  if (thread == 0) {
    arrays.row_first_tokens[row] = packed.first_token;
    arrays.row_positions[row] = packed.position;
    arrays.row_lengths[row] = packed.length;
  }
  for (int32_t t = thread; t < packed.length; t += num_threads) {
    const int32_t token = packed.first_token + t;
    const int32_t id = words[token];
    arrays.tokens[token] = id >= 0 ? id : arrays.slot_ids[TokenOfSlot(id)];
    arrays.positions[token] = packed.position + t;
    arrays.token_rows[token] = row;
    arrays.route_as[token] = token;
  }
  const int64_t end = int64_t{packed.position} + packed.length;
  const auto num_blocks = static_cast<int32_t>((end + kKvBlockTokens - 1) / kKvBlockTokens);
  const int32_t* blocks = words + shape.blocks_word() + packed.first_block;
  int32_t* table = arrays.block_tables + row * arrays.block_table_stride;
  for (int32_t b = thread; b < num_blocks; b += num_threads) table[b] = blocks[b];
}

// The i-th row that wants logits; what its sample becomes is a matter of the sampler's.
WINTSERVE_HOST_DEVICE inline PackedLogitRow UnpackLogitRow(const int32_t* words,
                                                           const PackedBatchShape& shape,
                                                           const BatchArrays& arrays, int32_t i) {
  const PackedLogitRow packed =
      reinterpret_cast<const PackedLogitRow*>(words + shape.logits_word())[i];
  arrays.logit_tokens[i] = packed.token;
  arrays.logit_slots[i] = packed.slot;
  return packed;
}

// The i-th padding row: behind all others, and of none of their sequences.
WINTSERVE_HOST_DEVICE inline PackedLogitRow UnpackPaddingRow(const PackedBatchShape& shape,
                                                             const BatchArrays& arrays, int32_t i) {
  const int32_t token = shape.num_tokens + i;
  const int32_t row = shape.num_rows + i;
  arrays.tokens[token] = 0;
  arrays.positions[token] = 0;
  arrays.token_rows[token] = -1;
  arrays.route_as[token] = 0;
  arrays.row_first_tokens[row] = token;
  arrays.row_positions[row] = 0;
  arrays.row_lengths[row] = 0;
  PackedLogitRow logit_row;
  logit_row.token = token;
  logit_row.slot = -1;
  arrays.logit_tokens[shape.num_logit_rows + i] = logit_row.token;
  arrays.logit_slots[shape.num_logit_rows + i] = logit_row.slot;
  return logit_row;
}

}  // namespace wintserve::kernels::plan
