// The kernels around a product: activations into the order and precision of the B operand, pairs
// sorted by expert, and the experts' outputs added up.
#pragma once

#include <cstdint>

#include "kernels/cuda/device_ops.h"
#include "kernels/cuda/matmul/product_params.h"
#include "kernels/plan/product_plan.h"
#include "kernels/plan/weight_layout.h"

namespace wintserve::kernels::cuda {

inline constexpr int kPrepareSharedBytes = kMaxRowWarps * 4;
// Units of a row are 8 values, of one pair and t: 16 bytes of the B operand.
inline constexpr int kUnitValues = 8;
// A thread keeps so many in registers; of a longer row it reads the rest twice.
inline constexpr int kThreadUnits = 4;

// A unit a thread as long as a block has so many: the row is one wait for memory.
WINTSERVE_HOST_DEVICE constexpr int PrepareThreads(int chunks) {
  const int units = chunks * plan::kChunkRows / kUnitValues;
  const int threads = plan::DivideUp(units, 32) * 32;
  return threads < 32 * kMaxRowWarps ? threads : 32 * kMaxRowWarps;
}

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

// The values of one unit of a row, 0 behind its end: two neighbours of the row at a time, which in
// both orders are an element b = 1 and the b = 0 behind it.
// kInPairs: x and p.k are even in floats, so that such two are one load.
template <bool kInPairs>
WINTSERVE_DEVICE void LoadUnit(const PrepareParams& p, const float* x, int unit,
                               float (&values)[kUnitValues]) {
  const int group_begin = unit / 8 * plan::kGroupRows;
  WINTSERVE_UNROLL
  for (int i = 0; i < kUnitValues; ++i) {
    const plan::Position position = plan::PositionOfIndex(unit % 8 * kUnitValues + i);
    if (position.b == 0) continue;
    const int earlier = i - plan::Position{.b = 1}.index();  // its b = 0
    const int k = group_begin + plan::GroupRowOfPosition(position, p.k_order);
    if constexpr (kInPairs) {
      float2 two = {0.0f, 0.0f};
      if (k < p.k) two = LoadAligned<float2>(x + k);
      values[i] = two.x;
      values[earlier] = two.y;
    } else {
      values[i] = k < p.k ? x[k] : 0.0f;
      values[earlier] = k + 1 < p.k ? x[k + 1] : 0.0f;
    }
  }
}

// Rounds a unit and stores it; the first of a group stores what the group's products subtract. For
// all lanes of a warp, of which eight share a group.
WINTSERVE_DEVICE void StoreUnit(const PrepareParams& p, int row, int unit, int num_units,
                                float scale, const float (&values)[kUnitValues]) {
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
  if (unit >= num_units) return;
  uint16_t* out = p.out.values + (int64_t{row} * num_units + unit) * kUnitValues;
  StoreAligned(out, uint4{words[0], words[1], words[2], words[3]});
  if (unit % 8 == 0) {
    const float correction = -MultiplyAdd(p.offsets.b0, sum_b0, p.offsets.b1 * sum_b1);
    StoreCorrection(correction, unit / 8 % plan::kGroupsPerChunk,
                    &p.out.corrections[(int64_t{row} * num_units + unit) / 16]);
  }
}

template <bool kInPairs>
WINTSERVE_DEVICE void PrepareRowBy(const PrepareParams& p, int row, const float* x,
                                   uint8_t* shared) {
  const int thread = ThreadIndex();
  const int lane = thread % 32;
  const int num_warps = p.threads / 32;
  const int num_units = p.chunks * plan::kChunkRows / kUnitValues;
  auto* reduction = reinterpret_cast<float*>(shared);

  float kept[kThreadUnits][kUnitValues] = {};
  float largest = 0;
  const auto add = [&](const float(&values)[kUnitValues]) {
    WINTSERVE_UNROLL
    for (int i = 0; i < kUnitValues; ++i) largest = Max(largest, Abs(values[i]));
  };
  WINTSERVE_UNROLL
  for (int i = 0; i < kThreadUnits; ++i) {
    if (i * p.threads >= num_units) break;
    if (thread + i * p.threads < num_units) {
      LoadUnit<kInPairs>(p, x, thread + i * p.threads, kept[i]);
    }
  }
  WINTSERVE_UNROLL
  for (int i = 0; i < kThreadUnits; ++i) add(kept[i]);
  for (int unit = thread + kThreadUnits * p.threads; unit < num_units; unit += p.threads) {
    float values[kUnitValues];
    LoadUnit<kInPairs>(p, x, unit, values);
    add(values);
  }
  WINTSERVE_UNROLL
  for (int step = 16; step > 0; step /= 2) {
    largest = Max(largest, ShuffleXor(largest, step));
  }
  if (lane == 0) reduction[thread / 32] = largest;
  SyncBlock();
  largest = lane < num_warps ? reduction[lane] : 0.0f;
  WINTSERVE_UNROLL
  for (int step = 16; step > 0; step /= 2) {
    largest = Max(largest, ShuffleXor(largest, step));
  }
  const int exponent = ExponentOfRow(largest);
  const float scale = BitsToFloat(static_cast<uint32_t>(127 + exponent) << 23);
  if (thread == 0) {
    p.out.inverse_scale[row] = BitsToFloat(static_cast<uint32_t>(127 - exponent) << 23);
  }

  // Whole warps go round.
  WINTSERVE_UNROLL
  for (int i = 0; i < kThreadUnits; ++i) {
    if (i * p.threads >= num_units) return;
    StoreUnit(p, row, thread + i * p.threads, num_units, scale, kept[i]);
  }
  for (int base = kThreadUnits * p.threads; base < num_units; base += p.threads) {
    float values[kUnitValues] = {};
    if (base + thread < num_units) LoadUnit<kInPairs>(p, x, base + thread, values);
    StoreUnit(p, row, base + thread, num_units, scale, values);
  }
}

// One row, by a block of p.threads. shared: kPrepareSharedBytes.
// A NaN stays in its row: it is not seen by the maximum and becomes a binary16 NaN.
WINTSERVE_DEVICE void PrepareRow(const PrepareParams& p, int row, uint8_t* shared) {
  const float* x = p.x + row * p.x_stride;
  if (p.k % 2 == 0 && reinterpret_cast<uintptr_t>(x) % sizeof(float2) == 0) {
    PrepareRowBy<true>(p, row, x, shared);
  } else {
    PrepareRowBy<false>(p, row, x, shared);
  }
}

// Places the pairs of an expert behind those of all smaller ones, in ascending order, by a block of
// p.threads. shared: kSortSharedBytes.
inline constexpr int kSortSharedBytes = 2 * kMaxRowWarps * 4;

WINTSERVE_DEVICE void SortPairs(const SortParams& p, int expert, uint8_t* shared) {
  const int thread = ThreadIndex();
  const int lane = thread % 32;
  const int warp = thread / 32;
  const int num_warps = p.threads / 32;
  auto* counts = reinterpret_cast<int32_t*>(shared);  // [2][kMaxRowWarps]

  int smaller = 0;
  for (int pair = thread; pair < p.num_pairs; pair += p.threads) {
    smaller += p.expert_ids[pair] < expert ? 1 : 0;
  }
  WINTSERVE_UNROLL
  for (int step = 16; step > 0; step /= 2) smaller += ShuffleXor(smaller, step);
  if (lane == 0) counts[kMaxRowWarps + warp] = smaller;
  SyncBlock();
  int place = 0;
  for (int w = 0; w < num_warps; ++w) place += counts[kMaxRowWarps + w];
  if (thread == 0) {
    p.first_token[expert] = place;
    if (expert == p.num_experts - 1) p.first_token[p.num_experts] = p.num_pairs;
  }

  // The two halves of `counts` in turn: the one that is written was read before the last barrier.
  int half = 0;
  for (int base = 0; base < p.num_pairs; base += p.threads) {
    const int pair = base + thread;
    const bool own = pair < p.num_pairs && p.expert_ids[pair] == expert;
    const uint32_t owners = Ballot(own);
    if (lane == 0) counts[half * kMaxRowWarps + warp] = CountBits(owners);
    SyncBlock();
    int before = 0;
    int all = 0;
    for (int w = 0; w < num_warps; ++w) {
      const int count = counts[half * kMaxRowWarps + w];
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

// The first num_rows blocks prepare a row each, the others sort an expert's pairs.
inline constexpr int kSortAndPrepareSharedBytes =
    kSortSharedBytes > kPrepareSharedBytes ? kSortSharedBytes : kPrepareSharedBytes;

WINTSERVE_DEVICE void SortAndPrepare(const SortParams& sort, const PrepareParams& prepare,
                                     int num_rows, uint8_t* shared) {
  if (BlockIndex() < num_rows) {
    PrepareRow(prepare, BlockIndex(), shared);
  } else {
    SortPairs(sort, BlockIndex() - num_rows, shared);
  }
}

// Block: 256 columns of one row. shared: kCombineSharedBytes. Waits for the kernel before it, which
// has made expert_out or shared_out; what else it reads is older.
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
    const int place = LoadFresh(row_places + choice);
    int rank = 0;
    for (int other = 0; other < p.top_k; ++other) {
      rank += LoadFresh(row_places + other) < place ? 1 : 0;
    }
    places[rank] = place;
    weights[rank] = LoadFromL2(p.pair_weights + int64_t{row} * p.top_k + choice);
  }
  SyncBlock();
  BeginAfterPreviousKernel();
  if (column >= p.columns) return;
  constexpr int kAtOnce = 8;  // loads under way
  float sum = 0;
  for (int begin = 0; begin < p.top_k; begin += kAtOnce) {
    float outs[kAtOnce];
    WINTSERVE_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      const bool exists = begin + i < p.top_k;
      outs[i] = exists ? p.expert_out[int64_t{places[begin + i]} * p.columns + column] : 0.0f;
    }
    WINTSERVE_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      if (begin + i < p.top_k) sum = MultiplyAdd(weights[begin + i], outs[i], sum);
    }
  }
  if (p.shared_out != nullptr) {
    sum = Add(sum, p.shared_out[int64_t{row} * p.columns + column]);
  }
  p.y[row * p.y_stride + column] = sum;
}

}  // namespace wintserve::kernels::cuda
