// Attention over the paged KV cache, and the way into it, on a GPU. Free functions: no allocation,
// no waiting for the device, no state of their own; they may be captured in a graph, whose replays
// read the sequences anew.
//
// Determinism: the result of a token's head has the same bits in any batch, alone or in a chunk of
// any length, on devices of one kind (kernels/plan/attention_plan.h says why).
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>

#include "kernels/cuda/attention/attention_params.h"
#include "kernels/plan/attention_plan.h"
#include "kernels/plan/kv_layout.h"

namespace wintserve::kernels::cuda {

// What launches need to know about kernels on the current device. head_dim 64 or 128 (CHECK).
struct AttentionSetup {
  plan::KvCacheKind kind = plan::KvCacheKind::kBfloat16;
  int head_dim = 0;
  int num_multiprocessors = 0;
  // Thread blocks of each size, in the order of plan::kAttentionWarps, that one multiprocessor
  // runs.
  std::array<int, plan::kAttentionWarps.size()> blocks_per_multiprocessor = {};
};

// Also makes the kernels ready to be launched on the current device; once before the first launch.
AttentionSetup PrepareAttention(plan::KvCacheKind kind, int head_dim);

// Memory for the sums of sequences that are cut at their segments. Any amount will do, also none;
// too little costs time where few sequences are long. Two launches in one stream may share it.
struct AttentionScratch {
  float* partials = nullptr;  // aligned to 16 bytes; holds nothing between launches
  int64_t partials_bytes = 0;
  int32_t* arrivals = nullptr;  // zeros before the first launch, left as zeros by each
  int32_t num_arrivals = 0;
};

// Enough for 64 sequences of 1024 tokens with 8 KV heads.
inline constexpr int64_t kAttentionPartialsBytes = int64_t{64} << 20;
// The arrivals that go with so many bytes of partials.
int32_t NumAttentionArrivals(int64_t partials_bytes, int head_dim);

struct AttentionArgs {
  SequenceArrays sequences = {};
  int32_t max_length = 0;  // upper bound of the sequences' lengths
  int num_heads = 0;
  int num_kv_heads = 0;  // divides num_heads; query head h reads KV head h / (num_heads / them)
  DeviceKvLayer kv = {};
  const float* qkv = nullptr;  // [num_tokens, qkv_stride]; q rotated
  int64_t qkv_stride = 0;
  float* out = nullptr;  // [num_tokens, out_stride]; rows of no sequence stay as they are
  int64_t out_stride = 0;
  AttentionScratch scratch = {};
};

// out[token, head] = softmax(q K / sqrt(head_dim)) V over the token's sequence up to itself.
// REQUIRES: pointers aligned to 16 bytes, strides multiples of 4. The kernel launched right before
// in the stream writes neither the sequences' arrays nor cached tokens before a sequence's
// `position`, or lets no kernel begin before it has ended.
void LaunchAttention(const AttentionSetup& setup, const AttentionArgs& args, cudaStream_t stream);

struct AppendKvArgs {
  plan::KvCacheKind kind = plan::KvCacheKind::kBfloat16;
  SequenceArrays sequences = {};
  int num_heads = 0;
  int num_kv_heads = 0;
  int head_dim = 0;  // 64 or 128 (CHECK)
  DeviceKvLayer kv = {};
  const float* cos_sin = nullptr;  // [num_tokens, cos_sin_stride]: cosines, then sines
  int64_t cos_sin_stride = 0;
  float* qkv = nullptr;  // [num_tokens, qkv_stride]
  int64_t qkv_stride = 0;
};

// Rotates the adjacent pairs of q in place; puts rotated k and plain v, rounded to what the cache
// holds, at the tokens' places. Rows of no sequence stay as they are, and so do k and v in qkv.
// REQUIRES: as LaunchAttention.
void LaunchRopeAndAppendKv(const AppendKvArgs& args, cudaStream_t stream);

}  // namespace wintserve::kernels::cuda
