// Rotary embedding, the CPU layout of a KV block, and causal attention over blocks. Free functions;
// no allocation, no threads.
#pragma once

#include <cstdint>

#include "kernels/backend.h"
#include "kernels/cpu/cpu_batch.h"

namespace wintserve::kernels::cpu {

// In a block, one KV head of one layer holds K transposed, [head_dim][kKvBlockTokens], so that the
// scores of a block are a matrix product with keys as columns, and V as [kKvBlockTokens][head_dim].
inline constexpr char kKvLayoutName[] =
    "float32 [layer][K,V][kv_head] K:[head_dim][64] V:[64][head_dim]";

constexpr int64_t KeyOffset(const AttentionShape& shape, int kv_head) {
  return int64_t{kv_head} * kKvBlockTokens * shape.head_dim;
}
constexpr int64_t ValueOffset(const AttentionShape& shape, int kv_head) {
  return int64_t{shape.num_kv_heads + kv_head} * kKvBlockTokens * shape.head_dim;
}

// One layer in a block.
constexpr int64_t KvLayerFloats(const AttentionShape& shape) {
  return int64_t{2} * shape.num_kv_heads * kKvBlockTokens * shape.head_dim;
}

// This layer's numbers in block `block`.
inline float* LayerOfBlock(const KvLayer& kv, int32_t block) {
  return reinterpret_cast<float*>(static_cast<char*>(kv.pool) + block * kv.block_stride_bytes +
                                  kv.layer_offset_bytes);
}

// Rotates adjacent pairs of head [head_dim] in place; cos_sin [head_dim]: cosines, then sines.
void RotatePairs(const float* cos_sin, int head_dim, float* head);

// Rotates the q heads of one token in place and puts its rotated k and its v at `position`.
//   qkv [shape.qkv_columns()]   one token's q, k and v
void RopeAndAppendToken(const AttentionShape& shape, const float* cos_sin, const KvLayer& kv,
                        const SequenceChunk& chunk, int32_t position, float* qkv);

// Query rows that one AttendTokens call handles: kMaxQueryRows / (heads per KV head) tokens.
inline constexpr int kMaxQueryRows = 32;

// Tokens first … first + count - 1 of `chunk` (counted from its start), the query heads of one KV
// head. The blocks are visited in order with a running maximum and sum, so a token's result depends
// on its own position only, and memory does not grow with the context.
//   scratch [AttendScratchFloats(head_dim)]
void AttendTokens(const AttentionShape& shape, const SequenceChunk& chunk, int32_t first,
                  int32_t count, int kv_head, ConstRows qkv, const KvLayer& kv, float* scratch,
                  Rows out);

constexpr int64_t AttendScratchFloats(int head_dim) {
  return int64_t{kMaxQueryRows} * (kKvBlockTokens + head_dim);
}

}  // namespace wintserve::kernels::cpu
