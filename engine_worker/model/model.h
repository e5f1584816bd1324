// A decoder's forward pass over one batch, as the runner sees it.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace wintserve {

// A run of consecutive tokens of one sequence. Its keys and values are written to the sequence's
// blocks before they are attended to; positions 0 … position-1 are in the blocks already.
struct BatchRow {
  int32_t position = 0;                  // of the row's first token
  int32_t length = 0;                    // tokens; >= 1
  std::span<const int32_t> block_table;  // covers position + length tokens
  bool want_logits = false;              // after the row's last token
};

struct Batch {
  std::vector<int32_t> tokens;  // of all rows, concatenated
  std::vector<BatchRow> rows;
};

// Owns its rank's weights and scratch memory.
// Threading: one thread calls; a backend may use more inside.
// Determinism (CPU): a row's result has the same bits in any batch.
class Model {
 public:
  virtual ~Model() = default;

  virtual int vocab_size() const = 0;
  virtual int num_layers() const = 0;
  virtual int max_position() const = 0;
  // Bytes of one KV block on this rank: [layer][K, V][kv_head][block_size * head_dim]; the order of
  // the last part is the backend's (the CPU keeps K as [head_dim][block_size]).
  virtual int64_t kv_block_bytes() const = 0;
  // Equal digests mean that blocks can be read by each other's group (all ranks together).
  virtual uint64_t kv_layout_digest() const = 0;
  // Of the checkpoint's files and the decoding options, not of the rank.
  virtual uint64_t weights_digest() const = 0;

  // Runs `batch` against the pool of KV blocks at `kv_pool` (device memory of the backend).
  // Logits [number of rows with want_logits, vocab_size], float32, in row order, valid on rank 0
  // until the next call; empty on other ranks.
  // REQUIRES: tokens in 0 … vocab_size-1; at most max_batch_tokens() tokens.
  virtual absl::StatusOr<std::span<const float>> Forward(const Batch& batch, void* kv_pool) = 0;
  virtual int max_batch_tokens() const = 0;
};

}  // namespace wintserve
