// Rotary embedding of queries and keys, and the way of keys and values into the KV cache.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/cuda/attention/attention_params.h"
#include "kernels/cuda/device_ops.h"
#include "kernels/plan/half.h"
#include "kernels/plan/kv_layout.h"

namespace wintserve::kernels::cuda {

inline constexpr int kAppendWarps = 8;

// kLaneDims numbers of a head that one lane holds, and how they are stored.
template <plan::KvCacheKind kKind, int kHeadDim>
class HeadOfToken {
 public:
  static constexpr int kLaneDims = kHeadDim / 32;
  static_assert(kLaneDims == 2 || kLaneDims == 4);

  WINTSERVE_DEVICE HeadOfToken(const float* head, int lane) : lane_(lane) {
    if constexpr (kLaneDims == 4) {
      const float4 v = reinterpret_cast<const float4*>(head)[lane];
      values_[0] = v.x;
      values_[1] = v.y;
      values_[2] = v.z;
      values_[3] = v.w;
    } else {
      const float2 v = reinterpret_cast<const float2*>(head)[lane];
      values_[0] = v.x;
      values_[1] = v.y;
    }
  }

  // Adjacent pairs (a, b) become (a cos - b sin, b cos + a sin), rounded as on the CPU.
  //   cos_sin [kHeadDim]   cosines, then sines
  WINTSERVE_DEVICE void Rotate(const float* cos_sin) {
    WINTSERVE_UNROLL
    for (int j = 0; j < kLaneDims / 2; ++j) {
      const int pair = lane_ * kLaneDims / 2 + j;
      const float cosine = cos_sin[pair];
      const float sine = cos_sin[kHeadDim / 2 + pair];
      const float even = values_[2 * j];
      const float odd = values_[2 * j + 1];
      values_[2 * j] = Subtract(Multiply(even, cosine), Multiply(odd, sine));
      values_[2 * j + 1] = Add(Multiply(odd, cosine), Multiply(even, sine));
    }
  }

  WINTSERVE_DEVICE void Store(float* head) const {
    if constexpr (kLaneDims == 4) {
      reinterpret_cast<float4*>(head)[lane_] =
          float4{values_[0], values_[1], values_[2], values_[3]};
    } else {
      reinterpret_cast<float2*>(head)[lane_] = float2{values_[0], values_[1]};
    }
  }

  // To row `token` (0 … 63) of a tile of the cache.
  WINTSERVE_DEVICE void StoreToTile(unsigned char* tile, int token) const {
    unsigned char* to = tile + plan::KvElementOffset(kKind, kHeadDim, token, lane_ * kLaneDims);
    if constexpr (kKind == plan::KvCacheKind::kBfloat16) {
      if constexpr (kLaneDims == 4) {
        *reinterpret_cast<uint2*>(to) =
            uint2{PackBfloat16(values_[0], values_[1]), PackBfloat16(values_[2], values_[3])};
      } else {
        *reinterpret_cast<uint32_t*>(to) = PackBfloat16(values_[0], values_[1]);
      }
    } else {
      StoreCodes(tile, token, to);
    }
  }

 private:
  // One scale for the row, rounded up, so that no code leaves -127 … 127.
  WINTSERVE_DEVICE void StoreCodes(unsigned char* tile, int token, unsigned char* to) const {
    constexpr float kLargestCode = 127.0f;
    float largest = 0.0f;
    WINTSERVE_UNROLL
    for (int i = 0; i < kLaneDims; ++i) largest = fmaxf(largest, fabsf(values_[i]));
    WINTSERVE_UNROLL
    for (int mask = 1; mask < 32; mask *= 2) largest = fmaxf(largest, ShuffleXor(largest, mask));

    const uint16_t half = plan::FloatToHalfRoundUp(Divide(largest, kLargestCode));
    const float scale = plan::HalfToFloat(half);
    const float inverse = half == 0 ? 0.0f : Divide(1.0f, scale);
    uint32_t codes = 0;
    WINTSERVE_UNROLL
    for (int i = 0; i < kLaneDims; ++i) {
      // The limits also hold what no scale reaches, and a NaN.
      const float code = fminf(fmaxf(Multiply(values_[i], inverse), -kLargestCode), kLargestCode);
      codes |= (static_cast<uint32_t>(static_cast<int32_t>(rintf(code))) & 0xFF) << (8 * i);
    }
    if constexpr (kLaneDims == 4) {
      *reinterpret_cast<uint32_t*>(to) = codes;
    } else {
      *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(codes);
    }
    if (lane_ == 0) {
      *reinterpret_cast<uint16_t*>(tile + plan::KvScaleOffset(kHeadDim, token)) = half;
    }
  }

  const int lane_;
  float values_[kLaneDims];
};

// A warp for each token and head: the q heads, the k heads, the v heads.
template <plan::KvCacheKind kKind, int kHeadDim>
WINTSERVE_KERNEL(kAppendWarps * 32)
RopeAndAppendKvKernel(WINTSERVE_PARAMS AppendKvParams p) {
  BeginAfterPreviousKernel();
  const int lane = ThreadIndex() % 32;
  const int64_t index = int64_t{BlockIndex()} * kAppendWarps + ThreadIndex() / 32;
  const int num_heads = p.num_heads + 2 * p.num_kv_heads;
  const int64_t token = index / num_heads;
  const auto head = static_cast<int>(index % num_heads);
  if (token >= p.sequences.num_tokens) return;
  const int32_t sequence = p.sequences.token_sequence[token];
  if (sequence < 0) return;

  float* from = p.qkv + token * p.qkv_stride + head * kHeadDim;
  HeadOfToken<kKind, kHeadDim> values(from, lane);
  const bool is_value = head >= p.num_heads + p.num_kv_heads;
  if (!is_value) values.Rotate(p.cos_sin + token * p.cos_sin_stride);
  if (head < p.num_heads) {
    values.Store(from);
    return;
  }
  const auto chunk_offset = static_cast<int32_t>(token) - p.sequences.first_token[sequence];
  const int32_t position = p.sequences.position[sequence] + chunk_offset;
  const int64_t block =
      p.sequences
          .block_tables[sequence * p.sequences.block_table_stride + position / plan::kKvTileTokens];
  unsigned char* tile = p.kv.pool + block * p.kv.block_stride_bytes + p.kv.layer_offset_bytes +
                        plan::KvTileOffset(kKind, p.num_kv_heads, kHeadDim,
                                           is_value ? plan::KvPart::kValue : plan::KvPart::kKey,
                                           (head - p.num_heads) % p.num_kv_heads);
  values.StoreToTile(tile, position % plan::kKvTileTokens);
}

}  // namespace wintserve::kernels::cuda
