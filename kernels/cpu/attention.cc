#include "kernels/cpu/attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/attention.cc"
#include "hwy/foreach_target.h"
// After foreach_target.
#include "hwy/contrib/math/math-inl.h"
#include "kernels/cpu/fma_block-inl.h"

HWY_BEFORE_NAMESPACE();
namespace wintserve::kernels::cpu {
namespace HWY_NAMESPACE {

// The running softmax of one query row.
struct RowState {
  float maximum;
  float sum;
};

// Turns the scores of one block (valid keys first) into weights exp(scale * score - maximum), zero
// for the others, and returns the factor for what was summed under the old maximum.
HWY_NOINLINE float SoftmaxBlock(float scale, int num_valid, float* scores, RowState* state) {
  const D d;
  constexpr float kMasked = -1e30f;
  for (int j = num_valid; j < kKvBlockTokens; ++j) scores[j] = kMasked;

  const V scale_v = hn::Set(d, scale);
  V maximum = hn::Set(d, kMasked);
  for (int j = 0; j < kKvBlockTokens; j += kLanes) {
    const V scaled = hn::Mul(hn::LoadU(d, scores + j), scale_v);
    hn::StoreU(scaled, d, scores + j);
    maximum = hn::Max(maximum, scaled);
  }
  const float new_maximum = std::max(state->maximum, hn::GetLane(hn::MaxOfLanes(d, maximum)));
  const V maximum_v = hn::Set(d, new_maximum);
  V sum = hn::Zero(d);
  for (int j = 0; j < kKvBlockTokens; j += kLanes) {
    const V weight = hn::CallExp(d, hn::Sub(hn::LoadU(d, scores + j), maximum_v));
    hn::StoreU(weight, d, scores + j);
    sum = hn::Add(sum, weight);
  }
  const V change = hn::CallExp(d, hn::Set(d, state->maximum - new_maximum));
  const float factor = hn::GetLane(change);
  state->sum = state->sum * factor + hn::GetLane(hn::SumOfLanes(d, sum));
  state->maximum = new_maximum;
  return factor;
}

HWY_NOINLINE void ScaleRow(float factor, int columns, float* row) {
  const D d;
  const V factor_v = hn::Set(d, factor);
  for (int c = 0; c < columns; c += kLanes) {
    hn::StoreU(hn::Mul(hn::LoadU(d, row + c), factor_v), d, row + c);
  }
}

void AttendTokensImpl(const AttentionShape& shape, const SequenceChunk& chunk, int32_t first,
                      int32_t count, int kv_head, ConstRows qkv, const KvLayer& kv, float* scratch,
                      Rows out) {
  const int head_dim = shape.head_dim;
  const int group = shape.num_heads / shape.num_kv_heads;
  const int num_rows = count * group;
  const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  float* scores = scratch;                                 // [num_rows, kKvBlockTokens]
  float* sums = scratch + kMaxQueryRows * kKvBlockTokens;  // [num_rows, head_dim]
  std::memset(sums, 0, sizeof(float) * num_rows * head_dim);

  // Row r is query head r % group of token first + r / group.
  const float* queries[kMaxQueryRows];
  const float* score_rows[kMaxQueryRows];
  RowState states[kMaxQueryRows];
  for (int r = 0; r < num_rows; ++r) {
    const int head = kv_head * group + r % group;
    queries[r] = qkv.row(chunk.first_token + first + r / group) + head * head_dim;
    score_rows[r] = scores + r * kKvBlockTokens;
    states[r] = {-1e30f, 0.0f};
  }

  const int32_t first_position = chunk.position + first;
  const int32_t last_position = first_position + count - 1;
  for (int32_t block = 0; block <= last_position / kKvBlockTokens; ++block) {
    const float* layer = LayerOfBlock(kv, chunk.block_table[block]);
    const float* keys = layer + KeyOffset(shape, kv_head);
    const float* values = layer + ValueOffset(shape, kv_head);
    const int32_t block_begin = block * kKvBlockTokens;
    // Tokens before the block see none of its keys; their rows come first.
    const int skip = std::max(0, block_begin - first_position) * group;
    const int rows = num_rows - skip;
    MultiplyPanel(queries + skip, rows, {keys, kKvBlockTokens, head_dim, kKvBlockTokens},
                  /*accumulate=*/false, scores + skip * kKvBlockTokens, kKvBlockTokens);
    for (int r = skip; r < num_rows; ++r) {
      const int32_t num_keys = first_position + r / group + 1 - block_begin;
      const float factor = SoftmaxBlock(scale, std::min(num_keys, kKvBlockTokens),
                                        scores + r * kKvBlockTokens, &states[r]);
      if (block > 0) ScaleRow(factor, head_dim, sums + r * head_dim);
    }
    const int num_keys = std::min(last_position + 1 - block_begin, kKvBlockTokens);
    MultiplyPanel(score_rows + skip, rows, {values, head_dim, num_keys, head_dim},
                  /*accumulate=*/true, sums + skip * head_dim, head_dim);
  }

  for (int r = 0; r < num_rows; ++r) {
    float* sum = sums + r * head_dim;
    ScaleRow(1.0f / states[r].sum, head_dim, sum);
    const int head = kv_head * group + r % group;
    std::memcpy(out.row(chunk.first_token + first + r / group) + head * head_dim, sum,
                head_dim * sizeof(float));
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace wintserve::kernels::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace wintserve::kernels::cpu {

HWY_EXPORT(AttendTokensImpl);

void AttendTokens(const AttentionShape& shape, const SequenceChunk& chunk, int32_t first,
                  int32_t count, int kv_head, ConstRows qkv, const KvLayer& kv, float* scratch,
                  Rows out) {
  HWY_DYNAMIC_DISPATCH(AttendTokensImpl)
  (shape, chunk, first, count, kv_head, qkv, kv, scratch, out);
}

void RotatePairs(const float* cos_sin, int head_dim, float* head) {
  const float* cosines = cos_sin;
  const float* sines = cos_sin + head_dim / 2;
  for (int j = 0; j < head_dim / 2; ++j) {
    const float even = head[2 * j];
    const float odd = head[2 * j + 1];
    head[2 * j] = even * cosines[j] - odd * sines[j];
    head[2 * j + 1] = odd * cosines[j] + even * sines[j];
  }
}

void RopeAndAppendToken(const AttentionShape& shape, const float* cos_sin, const KvLayer& kv,
                        const SequenceChunk& chunk, int32_t position, float* qkv) {
  const int head_dim = shape.head_dim;
  for (int head = 0; head < shape.num_heads + shape.num_kv_heads; ++head) {
    RotatePairs(cos_sin, head_dim, qkv + head * head_dim);
  }
  const int32_t block = chunk.block_table[position / kKvBlockTokens];
  const int32_t slot = position % kKvBlockTokens;
  float* layer = LayerOfBlock(kv, block);
  for (int kv_head = 0; kv_head < shape.num_kv_heads; ++kv_head) {
    const float* k = qkv + (shape.num_heads + kv_head) * head_dim;
    const float* v = k + shape.num_kv_heads * head_dim;
    float* keys = layer + KeyOffset(shape, kv_head) + slot;
    for (int i = 0; i < head_dim; ++i) keys[i * kKvBlockTokens] = k[i];
    std::memcpy(layer + ValueOffset(shape, kv_head) + slot * head_dim, v, head_dim * sizeof(float));
  }
}

}  // namespace wintserve::kernels::cpu
#endif
