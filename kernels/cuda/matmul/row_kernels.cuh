// The kernels around a product: activations into the order and precision of the B operand, pairs
// sorted by expert, and the experts' outputs added up.
#pragma once

#include <cstdint>

#include "kernels/cuda/device_ops.h"
#include "kernels/cuda/matmul/product_params.h"
#include "kernels/plan/product_plan.h"
#include "kernels/plan/weight_layout.h"

namespace wintserve::kernels::cuda {

inline constexpr int kRowWarps = kRowThreads / 32;
inline constexpr int kPrepareReductionBytes = kRowWarps * 4;

// The exponent e that brings a row's largest magnitude to [2^12, 2^13): 11 bits of all values down
// to 2^-26 of it fit a binary16, and the sum of 64 of them times the largest offset stays below
// 2^30, so that 2^-14 of it fits one. Limited so that 2^e and 2^-e are normal float32 numbers.
WINTSERVE_DEVICE int ExponentOfRow(float largest) {
  if (!(largest > 0)) return 0;
  const int exponent = 12 + 127 - static_cast<int>(FloatToBits(largest) >> 23);
  return exponent < 126 ? exponent : 126;
}

// Splits a correction into two binary16, and replaces it by what they add up to: 22 bits of it.
WINTSERVE_DEVICE void StoreCorrection(float correction, int group, ChunkCorrections* out) {
  const uint16_t high = FloatToHalf(correction * 0x1p-14f);
  const float high_value = HalfToFloat(high) * 0x1p14f;
  const uint16_t low = FloatToHalf(Add(correction, -high_value) * 0x1p-3f);
  out->halves[group] = high | static_cast<uint32_t>(low) << 16;
  out->values[group] = MultiplyAdd(0x1p3f, HalfToFloat(low), high_value);
}

// Four lanes exchange words so that lane t has word t of each: words[i] becomes lane i's word t.
WINTSERVE_DEVICE void TransposeQuad(uint32_t (&words)[4]) {
  const int t = ThreadIndex() % 4;
  WINTSERVE_UNROLL
  for (int step = 1; step < 4; step *= 2) {
    const bool upper = (t & step) != 0;
    WINTSERVE_UNROLL
    for (int i = 0; i < 4; ++i) {
      if ((i & step) != 0) continue;
      const uint32_t sent = upper ? words[i] : words[i + step];
      const auto received = static_cast<uint32_t>(ShuffleXor(static_cast<int>(sent), step));
      if (upper) {
        words[i] = received;
      } else {
        words[i + step] = received;
      }
    }
  }
}

// Block: one row. shared: kPrepareReductionBytes rounded up to 16, then cached_floats floats.
// A NaN stays in its row: it is not seen by the maximum and becomes a binary16 NaN.
WINTSERVE_DEVICE void PrepareRow(const PrepareParams& p, uint8_t* shared) {
  constexpr int kUnitValues = 8;  // of one pair and t: 16 bytes of the B operand
  const int row = BlockIndex();
  const int thread = ThreadIndex();
  const int lane = thread % 32;
  const int num_units = p.chunks * plan::kChunkRows / kUnitValues;
  const float* x = p.x + row * p.x_stride;
  auto* reduction = reinterpret_cast<float*>(shared);
  auto* cache = reinterpret_cast<float*>(shared + plan::DivideUp(kPrepareReductionBytes, 16) * 16);
  const bool cached = p.cached_floats >= num_units * kUnitValues;

  const auto load = [&](int unit, float(&values)[kUnitValues]) {
    const int group_begin = unit / 8 * plan::kGroupRows;
    WINTSERVE_UNROLL
    for (int i = 0; i < kUnitValues; ++i) {
      const plan::Position position = plan::PositionOfIndex(unit % 8 * kUnitValues + i);
      const int k = group_begin + plan::GroupRowOfPosition(position, p.k_order);
      values[i] = k < p.k ? x[k] : 0.0f;
    }
  };
  float largest = 0;
  for (int unit = thread; unit < num_units; unit += kRowThreads) {
    float values[kUnitValues];
    load(unit, values);
    WINTSERVE_UNROLL
    for (int i = 0; i < kUnitValues; ++i) {
      largest = Max(largest, Abs(values[i]));
      if (cached) cache[i * num_units + unit] = values[i];
    }
  }
  WINTSERVE_UNROLL
  for (int step = 16; step > 0; step /= 2) {
    largest = Max(largest, ShuffleXor(largest, step));
  }
  if (lane == 0) reduction[thread / 32] = largest;
  SyncBlock();
  WINTSERVE_UNROLL
  for (int warp = 0; warp < kRowWarps; ++warp) largest = Max(largest, reduction[warp]);
  const int exponent = ExponentOfRow(largest);
  const float scale = BitsToFloat(static_cast<uint32_t>(127 + exponent) << 23);
  if (thread == 0) {
    p.out.inverse_scale[row] = BitsToFloat(static_cast<uint32_t>(127 - exponent) << 23);
  }

  // Whole warps go round: 8 lanes share a group's sums.
  for (int base = 0; base < num_units; base += kRowThreads) {
    const int unit = base + thread;
    const bool active = unit < num_units;
    float values[kUnitValues] = {};
    if (active && cached) {
      WINTSERVE_UNROLL
      for (int i = 0; i < kUnitValues; ++i) values[i] = cache[i * num_units + unit];
    } else if (active) {
      load(unit, values);
    }
    uint32_t words[4];
    float sum_b0 = 0;
    float sum_b1 = 0;
    WINTSERVE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const uint16_t low = FloatToHalf(values[2 * i] * scale);
      const uint16_t high = FloatToHalf(values[2 * i + 1] * scale);
      words[i] = low | static_cast<uint32_t>(high) << 16;
      const float sum = Add(HalfToFloat(low), HalfToFloat(high));
      if (i % 2 == 0) {
        sum_b0 = Add(sum_b0, sum);
      } else {
        sum_b1 = Add(sum_b1, sum);
      }
    }
    WINTSERVE_UNROLL
    for (int step = 1; step < 8; step *= 2) {
      sum_b0 = Add(sum_b0, ShuffleXor(sum_b0, step));
      sum_b1 = Add(sum_b1, ShuffleXor(sum_b1, step));
    }
    if (p.order == plan::OperandOrder::kWgmma) TransposeQuad(words);
    if (!active) continue;
    uint16_t* out = p.out.values + (int64_t{row} * num_units + unit) * kUnitValues;
    StoreAligned(out, uint4{words[0], words[1], words[2], words[3]});
    if (unit % 8 == 0) {
      const float correction = -MultiplyAdd(p.offsets.b0, sum_b0, p.offsets.b1 * sum_b1);
      StoreCorrection(correction, unit / 8 % plan::kGroupsPerChunk,
                      &p.out.corrections[(int64_t{row} * num_units + unit) / 16]);
    }
  }
}

// Block e: expert e. Places its pairs behind those of all smaller experts, in ascending order.
// shared: kSortSharedBytes.
inline constexpr int kSortSharedBytes = 2 * kRowWarps * 4;

WINTSERVE_DEVICE void SortPairs(const SortParams& p, uint8_t* shared) {
  const int expert = BlockIndex();
  const int thread = ThreadIndex();
  const int lane = thread % 32;
  const int warp = thread / 32;
  auto* counts = reinterpret_cast<int32_t*>(shared);  // [2][kRowWarps]

  int smaller = 0;
  for (int pair = thread; pair < p.num_pairs; pair += kRowThreads) {
    smaller += p.expert_ids[pair] < expert ? 1 : 0;
  }
  WINTSERVE_UNROLL
  for (int step = 16; step > 0; step /= 2) smaller += ShuffleXor(smaller, step);
  if (lane == 0) counts[kRowWarps + warp] = smaller;
  SyncBlock();
  int place = 0;
  WINTSERVE_UNROLL
  for (int w = 0; w < kRowWarps; ++w) place += counts[kRowWarps + w];
  if (thread == 0) {
    p.first_token[expert] = place;
    if (expert == p.num_experts - 1) p.first_token[p.num_experts] = p.num_pairs;
  }

  // The two halves of `counts` in turn: the one that is written was read before the last barrier.
  int half = 0;
  for (int base = 0; base < p.num_pairs; base += kRowThreads) {
    const int pair = base + thread;
    const bool own = pair < p.num_pairs && p.expert_ids[pair] == expert;
    const uint32_t owners = Ballot(own);
    if (lane == 0) counts[half * kRowWarps + warp] = CountBits(owners);
    SyncBlock();
    int before = 0;
    int all = 0;
    WINTSERVE_UNROLL
    for (int w = 0; w < kRowWarps; ++w) {
      const int count = counts[half * kRowWarps + w];
      if (w < warp) before += count;
      all += count;
    }
    if (own) {
      const int own_place = place + before + CountBits(owners & ((1u << lane) - 1));
      p.place_of_pair[pair] = own_place;
      p.source_row[own_place] = pair / p.top_k;
    }
    place += all;
    half ^= 1;
  }
}

// Block: 256 columns of one row. shared: kCombineSharedBytes.
inline constexpr int kCombineSharedBytes = kMaxTopK * 8;

WINTSERVE_DEVICE void CombineExperts(const CombineParams& p, uint8_t* shared) {
  const int column_blocks = plan::DivideUp(p.columns, kRowThreads);
  const int row = BlockIndex() / column_blocks;
  const int column = BlockIndex() % column_blocks * kRowThreads + ThreadIndex();
  auto* places = reinterpret_cast<int32_t*>(shared);
  auto* weights = reinterpret_cast<float*>(places + kMaxTopK);
  const int choice = ThreadIndex();
  if (choice < p.top_k) {
    const int32_t* row_places = p.place_of_pair + int64_t{row} * p.top_k;
    const int place = row_places[choice];
    int rank = 0;
    for (int other = 0; other < p.top_k; ++other) rank += row_places[other] < place ? 1 : 0;
    places[rank] = place;
    weights[rank] = p.pair_weights[int64_t{row} * p.top_k + choice];
  }
  SyncBlock();
  if (column >= p.columns) return;
  float sum = 0;
  for (int i = 0; i < p.top_k; ++i) {
    sum = MultiplyAdd(weights[i], p.expert_out[int64_t{places[i]} * p.columns + column], sum);
  }
  if (p.shared_out != nullptr) {
    sum = Add(sum, p.shared_out[int64_t{row} * p.columns + column]);
  }
  p.y[row * p.y_stride + column] = sum;
}

}  // namespace wintserve::kernels::cuda
