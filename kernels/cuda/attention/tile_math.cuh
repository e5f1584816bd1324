// The arithmetic of one warp on one tile: 16 query rows against the 64 keys of a block. Lane l
// works on rows g = l / 4 ("plane 0") and g + 8 ("plane 1"); t = l % 4 is its place in the row's
// quad.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/cuda/device_ops.h"
#include "kernels/plan/attention_plan.h"
#include "kernels/plan/kv_layout.h"

namespace wintserve::kernels::cuda {

using plan::kKvTileTokens;
using plan::KvCacheKind;

inline constexpr int kLanes = 32;
inline constexpr int kWarpRows = plan::kAttentionWarpRows;
inline constexpr int kRowBlocks = kKvTileTokens / 8;  // of eight keys, columns of a product

// Queries are bfloat16 like the keys, as a sum of two: the first alone would cost as much accuracy
// as rounding the softmax weights does.
inline constexpr int kQueryLimbs = 2;

// Scores, then weights, of one tile. Column block n, element e: key 8n + 2t + e % 2 and row
// g + 8 (e / 2).
struct ScoreTile {
  float values[kRowBlocks][4];
};

// Sums of weighted values of a lane's two rows. Numbers 2n and 2n + 1 of a row belong to column
// block n of the product; OutputDim says which dims that is.
template <int kHeadDim>
struct RowSums {
  static constexpr int kNumbers = kHeadDim / 4;
  float values[2][kNumbers];
  float maximum[2];  // of the scores, in units of log2; minus infinity: no key yet
  float sum[2];      // of the weights

  WINTSERVE_DEVICE void Clear() {
    WINTSERVE_UNROLL
    for (int plane = 0; plane < 2; ++plane) {
      maximum[plane] = -INFINITY;
      sum[plane] = 0.0f;
      WINTSERVE_UNROLL
      for (int i = 0; i < kNumbers; ++i) values[plane][i] = 0.0f;
    }
  }
};

// Shared memory rows of a warp's queries, one limb after the other: [16][head_dim] bfloat16.
constexpr int QueryLimbBytes(int head_dim) { return kWarpRows * 2 * head_dim; }
constexpr int QueryBytes(int head_dim) { return kQueryLimbs * QueryLimbBytes(head_dim); }

// The 8-bit codes of four neighbouring dims, a byte each, as two pairs of bfloat16: bytes 0 and 2,
// bytes 1 and 3. A code is its lower seven bits - 128 * its sign: with the exponent of 128, whose
// last mantissa bit counts 1, the former is 128 + bits and the latter -(128 + 128 * sign).
WINTSERVE_DEVICE uint2 WidenCodes(uint32_t codes) {
  const auto widen = [](uint32_t c) {
    return AddBfloat16Pairs(AndOr<0x007F007Fu>(c, 0x43004300u), AndOr<0x00800080u>(c, 0xC300C300u));
  };
  return {widen(codes), widen(codes >> 8)};
}

// So an 8-bit chunk of 16 dims becomes two chunks of eight bfloat16: of the dims d % 4 = 0, 2 and
// of those d % 4 = 1, 3. A sum over dims may take them in any order, if queries have the same;
// among values it decides where a result belongs (OutputDim).
template <KvCacheKind kKind>
WINTSERVE_DEVICE int OutputDim(int number, int t) {
  const int block = number / 2;
  const int column = 2 * t + number % 2;
  if (kKind == KvCacheKind::kBfloat16) return 8 * block + column;
  return 16 * (block / 2) + 2 * column + block % 2;
}

// Column blocks whose key fragments are in registers at a time.
inline constexpr int kKeyBlocksAtOnce = 4;

// b operands of 16 dims (step k) and 32 keys, from column block first_block on.
//   kTile: how the tile in shared memory looks; a widened one is bfloat16.
template <KvCacheKind kTile, int kHeadDim>
WINTSERVE_DEVICE void LoadKeyFragments(uint32_t tile, int lane, int k, int first_block,
                                       uint32_t (&b)[kKeyBlocksAtOnce][2]) {
  constexpr int kRowBytes = plan::KvRowBytes(kTile, kHeadDim);
  const int matrix = lane / 8;
  if constexpr (kTile == KvCacheKind::kBfloat16) {
    // Matrices: keys 0-7 and 8-15, each of dims 0-7 and 8-15 of the step.
    const int key = 8 * (matrix / 2) + lane % 8;
    const uint32_t address =
        (tile + plan::KvRowOffset(kRowBytes, key)) ^ ((matrix % 2) << 4) ^ (k << 5);
    WINTSERVE_UNROLL
    for (int n = 0; n < kKeyBlocksAtOnce; n += 2) {
      uint32_t m[4];
      LoadMatrices(address + 8 * (first_block + n) * kRowBytes, m);
      b[n][0] = m[0];
      b[n][1] = m[1];
      b[n + 1][0] = m[2];
      b[n + 1][1] = m[3];
    }
  } else {
    // Matrices: four times eight keys, of the step's one chunk.
    const int key = lane;
    const uint32_t address = (tile + plan::KvRowOffset(kRowBytes, key)) ^ (k << 4);
    uint32_t m[4];
    LoadMatrices(address + 8 * first_block * kRowBytes, m);
    WINTSERVE_UNROLL
    for (int n = 0; n < 4; ++n) {
      const uint2 pairs = WidenCodes(m[n]);
      b[n][0] = pairs.x;
      b[n][1] = pairs.y;
    }
  }
}

// scores = queries [16, head_dim] * keys [64, head_dim] transposed
template <KvCacheKind kTile, int kHeadDim>
WINTSERVE_DEVICE void MultiplyKeys(uint32_t queries, uint32_t tile, int lane, ScoreTile& scores) {
  constexpr int kQueryRowBytes = 2 * kHeadDim;
  WINTSERVE_UNROLL
  for (int n = 0; n < kRowBlocks; ++n) {
    WINTSERVE_UNROLL
    for (int e = 0; e < 4; ++e) scores.values[n][e] = 0.0f;
  }
  // Matrices: rows 0-7 and 8-15 of dims 0-7, then of dims 8-15 of a step.
  const uint32_t query_row =
      (queries + plan::KvRowOffset(kQueryRowBytes, lane % 16)) ^ ((lane / 16) << 4);
  WINTSERVE_UNROLL
  for (int k = 0; k < kHeadDim / 16; ++k) {
    uint32_t a[kQueryLimbs][4];
    WINTSERVE_UNROLL
    for (int limb = 0; limb < kQueryLimbs; ++limb) {
      LoadMatrices((query_row ^ (k << 5)) + limb * QueryLimbBytes(kHeadDim), a[limb]);
    }
    WINTSERVE_UNROLL
    for (int first = 0; first < kRowBlocks; first += kKeyBlocksAtOnce) {
      uint32_t b[kKeyBlocksAtOnce][2];
      LoadKeyFragments<kTile, kHeadDim>(tile, lane, k, first, b);
      WINTSERVE_UNROLL
      for (int limb = 0; limb < kQueryLimbs; ++limb) {
        WINTSERVE_UNROLL
        for (int n = 0; n < kKeyBlocksAtOnce; ++n) {
          float(&c)[4] = scores.values[first + n];
          MatrixMultiplyAdd(a[limb], b[n][0], b[n][1], c[0], c[1], c[2], c[3]);
        }
      }
    }
  }
}

// values *= the scales [64] of the columns' keys, at shared memory `scales`.
WINTSERVE_DEVICE void MultiplyScales(uint32_t scales, int lane, ScoreTile& tile) {
  WINTSERVE_UNROLL
  for (int n = 0; n < kRowBlocks; ++n) {
    const float2 scale = UnpackHalves(LoadShared(scales + 2 * (8 * n + 2 * (lane % 4))));
    float(&v)[4] = tile.values[n];
    v[0] = Multiply(v[0], scale.x);
    v[1] = Multiply(v[1], scale.y);
    v[2] = Multiply(v[2], scale.x);
    v[3] = Multiply(v[3], scale.y);
  }
}

// Hides from each row the keys behind its own position.
WINTSERVE_DEVICE void MaskScores(int32_t first_key, const int32_t (&row_position)[2], int lane,
                                 ScoreTile& scores) {
  WINTSERVE_UNROLL
  for (int n = 0; n < kRowBlocks; ++n) {
    WINTSERVE_UNROLL
    for (int e = 0; e < 4; ++e) {
      const int32_t key = first_key + 8 * n + 2 * (lane % 4) + e % 2;
      if (key > row_position[e / 2]) scores.values[n][e] = -INFINITY;
    }
  }
}

// Turns scores into weights 2^(score - maximum) under the segment's maximum so far, brings the sums
// to it and adds the weights to the lane's share of their sum.
template <int kHeadDim>
WINTSERVE_DEVICE void SoftmaxStep(ScoreTile& scores, RowSums<kHeadDim>& rows) {
  float factor[2];
  WINTSERVE_UNROLL
  for (int plane = 0; plane < 2; ++plane) {
    float maximum = rows.maximum[plane];
    WINTSERVE_UNROLL
    for (int n = 0; n < kRowBlocks; ++n) {
      maximum = fmaxf(maximum, fmaxf(scores.values[n][2 * plane], scores.values[n][2 * plane + 1]));
    }
    maximum = fmaxf(maximum, ShuffleXor(maximum, 1));
    maximum = fmaxf(maximum, ShuffleXor(maximum, 2));
    // A row may have seen no key yet; the difference of two infinities is no number.
    const float reference = maximum == -INFINITY ? 0.0f : maximum;
    factor[plane] = Exp2(Subtract(rows.maximum[plane], reference));
    rows.maximum[plane] = maximum;
    float sum = 0.0f;
    WINTSERVE_UNROLL
    for (int n = 0; n < kRowBlocks; ++n) {
      WINTSERVE_UNROLL
      for (int e = 2 * plane; e < 2 * plane + 2; ++e) {
        scores.values[n][e] = Exp2(Subtract(scores.values[n][e], reference));
        sum = Add(sum, scores.values[n][e]);
      }
    }
    rows.sum[plane] = MultiplyAdd(rows.sum[plane], factor[plane], sum);
  }
  // Once the maximum has settled all factors are 1.
  if (Ballot(factor[0] != 1.0f || factor[1] != 1.0f) == 0) return;
  WINTSERVE_UNROLL
  for (int i = 0; i < RowSums<kHeadDim>::kNumbers; ++i) {
    rows.values[0][i] = Multiply(rows.values[0][i], factor[0]);
    rows.values[1][i] = Multiply(rows.values[1][i], factor[1]);
  }
}

// sums += weights [16, 64], rounded to bfloat16, * values [64, head_dim]
template <KvCacheKind kTile, int kHeadDim>
WINTSERVE_DEVICE void MultiplyValues(const ScoreTile& weights, uint32_t tile, int lane,
                                     RowSums<kHeadDim>& rows) {
  constexpr int kRowBytes = plan::KvRowBytes(kTile, kHeadDim);
  // Matrices: keys 0-7 and 8-15 of a step, each of two chunks of dims.
  const int matrix = lane / 8;
  const uint32_t lane_row =
      (tile + plan::KvRowOffset(kRowBytes, 8 * (matrix % 2) + lane % 8)) ^ ((matrix / 2) << 4);
  const auto multiply = [&rows](const uint32_t(&a)[4], uint32_t b0, uint32_t b1, int block) {
    float* plane0 = &rows.values[0][2 * block];
    float* plane1 = &rows.values[1][2 * block];
    MatrixMultiplyAdd(a, b0, b1, plane0[0], plane0[1], plane1[0], plane1[1]);
  };
  WINTSERVE_UNROLL
  for (int k = 0; k < kKvTileTokens / 16; ++k) {
    const float(&left)[4] = weights.values[2 * k];
    const float(&right)[4] = weights.values[2 * k + 1];
    const uint32_t a[4] = {PackBfloat16(left[0], left[1]), PackBfloat16(left[2], left[3]),
                           PackBfloat16(right[0], right[1]), PackBfloat16(right[2], right[3])};
    WINTSERVE_UNROLL
    for (int chunks = 0; chunks < kRowBytes / 16; chunks += 2) {
      uint32_t m[4];
      LoadMatricesTransposed((lane_row ^ (chunks << 4)) + 16 * k * kRowBytes, m);
      if constexpr (kTile == KvCacheKind::kBfloat16) {
        multiply(a, m[0], m[1], chunks);
        multiply(a, m[2], m[3], chunks + 1);
      } else {
        WINTSERVE_UNROLL
        for (int i = 0; i < 2; ++i) {
          // A 16-bit element was two dims of one key, so bytes 0 and 2 are two keys of the first.
          const uint2 keys_low = WidenCodes(m[2 * i]);
          const uint2 keys_high = WidenCodes(m[2 * i + 1]);
          multiply(a, keys_low.x, keys_high.x, 2 * (chunks + i));
          multiply(a, keys_low.y, keys_high.y, 2 * (chunks + i) + 1);
        }
      }
    }
  }
}

// The lanes' shares of a row's sum of weights, added up in every lane.
template <int kHeadDim>
WINTSERVE_DEVICE void FinishSums(RowSums<kHeadDim>& rows) {
  WINTSERVE_UNROLL
  for (int plane = 0; plane < 2; ++plane) {
    float sum = rows.sum[plane];
    sum = Add(sum, ShuffleXor(sum, 1));
    rows.sum[plane] = Add(sum, ShuffleXor(sum, 2));
  }
}

// total = total and `segment` together, for one row. The total may be empty, or the segment, not
// both.
template <int kNumbers>
WINTSERVE_DEVICE void MergeRow(const float (&values)[kNumbers], float maximum, float sum,
                               float (&total)[kNumbers], float& total_maximum, float& total_sum) {
  const float together = fmaxf(total_maximum, maximum);
  const float total_factor = Exp2(Subtract(total_maximum, together));
  const float factor = Exp2(Subtract(maximum, together));
  total_maximum = together;
  total_sum = MultiplyAdd(sum, factor, Multiply(total_sum, total_factor));
  WINTSERVE_UNROLL
  for (int i = 0; i < kNumbers; ++i) {
    total[i] = MultiplyAdd(values[i], factor, Multiply(total[i], total_factor));
  }
}

}  // namespace wintserve::kernels::cuda
