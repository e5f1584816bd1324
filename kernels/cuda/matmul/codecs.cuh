// What differs between the formats of weights in a product: how a lane's packed words become the A
// operand of mma.m16n8k16 (plan/weight_layout.h), and how a group's sum joins the total.
//
// Decoded weights are exact: integers of up to 10 bits in a binary16, or bfloat16 weights that fit
// one. A product's error comes from
//   activations  rounded to 11 significant bits of a binary16 once (PrepareRows); bfloat16 has 8
//   sums         float32 accumulation of an mma over 64 k: the terms carry the offset of the format
//                (at most 1024 + 128 against codes of 74 root mean square for WINT8, 512 + 32
//                against 18 for WINT2), so roundings are up to 30 times those of a plain float32
//                dot product of 64 terms. They are taken back group by group, so that they do not
//                grow with k or with a mean of the activations.
//   scales       one float32 rounding each
// Altogether about 2^-12 / sqrt(3) relative to sqrt(sum of squares), below a quarter of what
// bfloat16 activations alone cost.
#pragma once

#include <cstdint>

#include "kernels/cuda/device_ops.h"
#include "kernels/formats/matrix.h"
#include "kernels/plan/weight_layout.h"

namespace wintserve::kernels::cuda {

// Rows g and g + 8 of a tile, as a lane needs them.
struct LaneColumns {
  uint32_t multiplier[2];
  uint32_t offset[2];
  float scale[2];
};

// columns: the ColumnInfos of the tile.
WINTSERVE_DEVICE LaneColumns LoadLaneColumns(const uint8_t* columns, int g) {
  LaneColumns lane;
  WINTSERVE_UNROLL
  for (int upper = 0; upper < 2; ++upper) {
    const uint4 info = LoadConstant(
        reinterpret_cast<const uint4*>(columns + (g + 8 * upper) * sizeof(plan::ColumnInfo)));
    lane.multiplier[upper] = info.x;
    lane.offset[upper] = info.y;
    lane.scale[upper] = BitsToFloat(info.z);
  }
  return lane;
}

// total += correction + a * b over the 64 k of a group. a [mma][register], b [mma][register];
// correction and total: accumulators.
WINTSERVE_DEVICE void AddGroup(const uint32_t (&a)[4][4], const uint32_t (&b)[4][2],
                               const float (&correction)[4], float (&total)[4]) {
  WINTSERVE_UNROLL
  for (int i = 0; i < 4; ++i) total[i] = Add(total[i], correction[i]);
  WINTSERVE_UNROLL
  for (int m = 0; m < 4; ++m) MatrixMultiplyAddHalves(a[m], b[m], total, total);
}

struct Wint2Codec {
  static constexpr formats::WeightFormat kFormat = formats::WeightFormat::kWint2;
  static constexpr bool kHasLocalScales = true;
  static constexpr bool kHasCorrections = true;

  // Operands of the decoding that do not change. With a `zero` that the compiler takes for a
  // variable they stay in registers; else it moves them there before each use.
  struct Constants {
    uint32_t weight_base[2];  // binary16 exponents: pairs of 512 and of 64
    uint32_t nibble_base[4];  // float32 exponents: 2^(23 - o) for the nibble at bit o
  };
  static WINTSERVE_DEVICE Constants MakeConstants(uint32_t zero) {
    return {{0x60006000 + zero, 0x54005400 + zero},
            {0x4B000000 + zero, 0x49000000 + zero, 0x47000000 + zero, 0x45000000 + zero}};
  }

  // What a lane keeps of a chunk for both groups. lane_units: its 16 bytes of the chunk's first
  // unit, in shared memory.
  using Packed = uint4;
  static WINTSERVE_DEVICE Packed LoadPacked(const uint8_t* lane_units) {
    return LoadAligned<uint4>(lane_units);
  }

  // The group's local scales of the lane's rows are for codecs that scale each weight.
  static WINTSERVE_DEVICE void Decode(const Packed& packed, int group, const LaneColumns& columns,
                                      const float (&)[2], const Constants& constants,
                                      uint32_t (&a)[4][4]) {
    WINTSERVE_UNROLL
    for (int upper = 0; upper < 2; ++upper) {
      const uint32_t bytes =
          group == 0 ? (upper == 0 ? packed.x : packed.y) : (upper == 0 ? packed.z : packed.w);
      DecodePair<0>(bytes, columns, constants, upper, a);
      DecodePair<1>(bytes, columns, constants, upper, a);
    }
  }

  // scale[group][upper]; row_scales: the two bytes of the lane's rows in shared memory. OR-ing an
  // exponent to a nibble at bit o gives the float32 2^(23 - o) + nibble.
  static WINTSERVE_DEVICE void LoadLocalScales(const uint8_t* row_scales,
                                               const Constants& constants, float (&scale)[2][2]) {
    const uint32_t nibbles = LoadAligned<uint16_t>(row_scales);
    const auto& base = constants.nibble_base;
    const auto value = [](uint32_t bits, float from) { return BitsToFloat(bits) - from; };
    scale[0][0] = value(AndOr<0x000F>(nibbles, base[0]), 0x1p23f);
    scale[1][0] = value(AndOr<0x00F0>(nibbles, base[1]), 0x1p19f);
    scale[0][1] = value(AndOr<0x0F00>(nibbles, base[2]), 0x1p15f);
    scale[1][1] = value(AndOr<0xF000>(nibbles, base[3]), 0x1p11f);
  }

  static WINTSERVE_DEVICE void Accumulate(const uint32_t (&a)[4][4], const uint32_t (&b)[4][2],
                                          const float (&correction)[4], const float (&scale)[2],
                                          float (&total)[4]) {
    float sum[4];
    MatrixMultiplyAddHalves(a[0], b[0], correction, sum);
    WINTSERVE_UNROLL
    for (int m = 1; m < 4; ++m) MatrixMultiplyAddHalves(a[m], b[m], sum, sum);
    total[0] = MultiplyAdd(scale[0], sum[0], total[0]);
    total[1] = MultiplyAdd(scale[0], sum[1], total[1]);
    total[2] = MultiplyAdd(scale[1], sum[2], total[2]);
    total[3] = MultiplyAdd(scale[1], sum[3], total[3]);
  }

 private:
  // Bytes 2 * pair and 2 * pair + 1 of a row. The line's value holds the code in bits 17 … 31, so
  // that the upper halves of two values, side by side, are two lanes of code << 1 (and a bit of
  // the fraction). Weights 3 and 2 of the codes then stand at bits 1 and 4 of the lanes, and after
  // a shift by 6 weights 1 and 0 do. A 6-bit integer at bit o of a binary16's fraction with the
  // exponent of 1024 >> o is (1024 >> o) + integer.
  template <int pair>
  static WINTSERVE_DEVICE void DecodePair(uint32_t bytes, const LaneColumns& columns,
                                          const Constants& constants, int upper,
                                          uint32_t (&a)[4][4]) {
    const uint32_t low =
        ByteOf<2 * pair>(bytes) * columns.multiplier[upper] + columns.offset[upper];
    const uint32_t high =
        ByteOf<2 * pair + 1>(bytes) * columns.multiplier[upper] + columns.offset[upper];
    const uint32_t codes = PermuteBytes<0x7632>(low, high);
    const uint32_t shifted = codes >> 6;
    a[2 * pair][upper] = AndOr<0x007E007E>(codes, constants.weight_base[0]);
    a[2 * pair][2 + upper] = AndOr<0x03F003F0>(codes, constants.weight_base[1]);
    a[2 * pair + 1][upper] = AndOr<0x007E007E>(shifted, constants.weight_base[0]);
    a[2 * pair + 1][2 + upper] = AndOr<0x03F003F0>(shifted, constants.weight_base[1]);
  }
};

// What the formats without local scales share.
struct PlainCodec {
  static constexpr bool kHasLocalScales = false;

  struct Constants {};
  static WINTSERVE_DEVICE Constants MakeConstants(uint32_t) { return {}; }

  // The lane's bytes stay in shared memory until they are decoded.
  using Packed = const uint8_t*;
  static WINTSERVE_DEVICE Packed LoadPacked(const uint8_t* lane_units) { return lane_units; }
};

// Of codes that are decoded with an offset.
struct OffsetCodec : PlainCodec {
  static constexpr bool kHasCorrections = true;

  static WINTSERVE_DEVICE void Accumulate(const uint32_t (&a)[4][4], const uint32_t (&b)[4][2],
                                          const float (&correction)[4], const float (&)[2],
                                          float (&total)[4]) {
    AddGroup(a, b, correction, total);
  }
};

struct Wint4Codec : OffsetCodec {
  static constexpr formats::WeightFormat kFormat = formats::WeightFormat::kWint4;

  // Nibbles at bits 2 and 6 of a binary16's fraction: 256 + code and 16 + code.
  static WINTSERVE_DEVICE void Decode(const Packed& packed, int group, const LaneColumns&,
                                      const float (&)[2], const Constants&, uint32_t (&a)[4][4]) {
    const uint4 words = LoadAligned<uint4>(packed + group * plan::kUnitBytes);
    const uint32_t word[4] = {words.x, words.y, words.z, words.w};
    WINTSERVE_UNROLL
    for (int upper = 0; upper < 2; ++upper) {
      WINTSERVE_UNROLL
      for (int pair = 0; pair < 2; ++pair) {
        const uint32_t first = word[2 * upper + pair] << 2;
        const uint32_t second = word[2 * upper + pair] >> 6;
        a[2 * pair][upper] = AndOr<0x003C003C>(first, 0x5C005C00);
        a[2 * pair][2 + upper] = AndOr<0x03C003C0>(first, 0x4C004C00);
        a[2 * pair + 1][upper] = AndOr<0x003C003C>(second, 0x5C005C00);
        a[2 * pair + 1][2 + upper] = AndOr<0x03C003C0>(second, 0x4C004C00);
      }
    }
  }
};

struct Wint8Codec : OffsetCodec {
  static constexpr formats::WeightFormat kFormat = formats::WeightFormat::kWint8;

  // A byte in the low bits of a binary16's fraction with 0x64 above it: 1024 + code.
  static WINTSERVE_DEVICE void Decode(const Packed& packed, int group, const LaneColumns&,
                                      const float (&)[2], const Constants&, uint32_t (&a)[4][4]) {
    WINTSERVE_UNROLL
    for (int pair = 0; pair < 2; ++pair) {
      const uint4 words = LoadAligned<uint4>(packed + (2 * group + pair) * plan::kUnitBytes);
      const uint32_t word[4] = {words.x, words.y, words.z, words.w};
      WINTSERVE_UNROLL
      for (int upper = 0; upper < 2; ++upper) {
        WINTSERVE_UNROLL
        for (int select = 0; select < 2; ++select) {
          const uint32_t bytes = word[2 * upper + select];
          a[2 * pair + select][upper] = PermuteBytes<0x4140>(bytes, 0x64646464);
          a[2 * pair + select][2 + upper] = PermuteBytes<0x4342>(bytes, 0x64646464);
        }
      }
    }
  }
};

struct Bfloat16Codec : PlainCodec {
  static constexpr formats::WeightFormat kFormat = formats::WeightFormat::kBfloat16;
  static constexpr bool kHasCorrections = false;

  static WINTSERVE_DEVICE void Decode(const Packed& packed, int group, const LaneColumns&,
                                      const float (&)[2], const Constants&, uint32_t (&a)[4][4]) {
    WINTSERVE_UNROLL
    for (int m = 0; m < 4; ++m) {
      const uint4 words = LoadAligned<uint4>(packed + (4 * group + m) * plan::kUnitBytes);
      a[m][0] = words.x;
      a[m][1] = words.y;
      a[m][2] = words.z;
      a[m][3] = words.w;
    }
  }

  static WINTSERVE_DEVICE void Accumulate(const uint32_t (&a)[4][4], const uint32_t (&b)[4][2],
                                          const float (&)[4], const float (&)[2],
                                          float (&total)[4]) {
    WINTSERVE_UNROLL
    for (int m = 0; m < 4; ++m) MatrixMultiplyAddHalves(a[m], b[m], total, total);
  }
};

}  // namespace wintserve::kernels::cuda
