// A decoder's forward pass over one batch, as the runner sees it.
#pragma once

#include <cstdint>

#include "absl/status/statusor.h"
#include "kernels/backend.h"

namespace wintserve {

// Which experts the tokens of a pass went to.
struct RoutedExperts {
  const int32_t* ids = nullptr;  // device memory [tokens, top_k], until the next pass
  int num_experts = 0;
  int top_k = 0;
};

// Owns its rank's weights and scratch memory.
// Threading: one thread calls; a backend may use more inside.
// Determinism (CPU): a row's result has the same bits in any batch.
class Model {
 public:
  virtual ~Model() = default;

  // The device that the model is on: its batches, its KV pool, its logits. Outlives the model.
  virtual kernels::Backend* backend() const = 0;

  virtual int vocab_size() const = 0;
  virtual int num_layers() const = 0;
  virtual int max_position() const = 0;
  // Bytes of one KV block on this rank: [layer][K, V][kv_head][block_size * head_dim], their type
  // and order the backend's.
  virtual int64_t kv_block_bytes() const = 0;
  // Equal digests mean that blocks can be read by each other's group (all ranks together).
  virtual uint64_t kv_layout_digest() const = 0;
  // Of where the weights come from and of the decoding options, not of the rank.
  virtual uint64_t weights_digest() const = 0;
  // Of what lies between operators, in device memory: for max_batch_tokens() and max_logit_rows().
  virtual int64_t workspace_bytes() const { return 0; }
  // Of the last Forward; without ids for a layer that routes nothing.
  virtual RoutedExperts routed_experts(int /*layer*/) const { return {}; }

  // Hands one pass over `batch` to the device, against the pool of KV blocks at `kv_pool` (device
  // memory). Returns the logits [batch.num_logit_rows(), vocab_size] in device memory, for whatever
  // is called on the backend before the next Forward; null data on ranks other than 0, or when no
  // row wants logits.
  // REQUIRES: a batch of backend() with 1 to max_batch_tokens() tokens in 0 … vocab_size-1, of
  // which at most max_logit_rows() want logits.
  virtual absl::StatusOr<kernels::ConstRows> Forward(const kernels::DeviceBatch& batch,
                                                     void* kv_pool) = 0;
  // Logits [num_tokens, vocab_size] of the tokens from `first_token` on, places in the batch of the
  // last Forward; given and lasting as those of Forward, which they overwrite. Every rank calls it,
  // with the same numbers.
  // REQUIRES: 1 to max_logit_rows() tokens, none of which has had its logits computed since then:
  // neither by an earlier call nor because it wanted them.
  virtual absl::StatusOr<kernels::ConstRows> TokenLogits(int64_t first_token,
                                                         int64_t num_tokens) = 0;
  virtual int max_batch_tokens() const = 0;
  virtual int max_logit_rows() const = 0;
};

}  // namespace wintserve
