// The weights of a formats::DummyMatrix by definition, and the bytes that the CUDA products read of
// them: the same arithmetic makes a host matrix on the CPU and the packed layout on a GPU.
//
// Every number is cut from 64 bits of a counter hash, SplitMix64's output function (Steele, Lea and
// Flood, "Fast splittable pseudorandom number generators", 2014) of the seed and the place (row,
// column) in the whole matrix:
//   float32, bfloat16   uniform in [-1, 1) * sqrt(3) * deviation
//   WINT8, WINT4        codes -127 … 127 and -7 … 7, a scale a column
//   WINT2               any byte, local scales 1 … 15, a signed super scale a column, and one of
//                       kNumDummyCodeMaps maps from byte to code, all of them exact on every
//                       backend (code_line.h): codes stay within 0 … 32767
// A column's scale is 0.5 to 1.5 times the one that gives the deviation. It has a sign in WINT2,
// whose values have a mean of -1/2: without it their mean would add up over the layers.
#pragma once

#include <array>
#include <bit>
#include <cstdint>

#include "kernels/formats/bf16.h"
#include "kernels/formats/dummy_matrix.h"
#include "kernels/formats/matrix.h"
#include "kernels/plan/float16.h"
#include "kernels/plan/host_device.h"
#include "kernels/plan/weight_layout.h"

namespace wintserve::kernels::plan {

inline constexpr int kNumDummyCodeMaps = 64;

struct DummyCodeMap {
  float code_scale = 0;  // of the format
  float code_zp = 0;
  uint32_t multiplier = 0;  // of its integer line
  uint32_t offset = 0;
};
struct DummyCodeMaps {
  DummyCodeMap maps[kNumDummyCodeMaps];
};

// Searched for once in a process, some milliseconds. Threading: any.
const DummyCodeMaps& SharedDummyCodeMaps();

WINTSERVE_HOST_DEVICE constexpr uint64_t HashOfCounter(uint64_t seed, uint64_t counter) {
  uint64_t z = seed + (counter + 1) * 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

// Exact multiples of 2^-23, so that no compiler's contraction can change a bit.
WINTSERVE_HOST_DEVICE constexpr float UniformFromMinusOneToOne(uint64_t bits) {
  return static_cast<float>(static_cast<int32_t>(bits >> 40) - (1 << 23)) * 0x1p-23f;
}
WINTSERVE_HOST_DEVICE constexpr float UniformFromHalfToThreeHalves(uint64_t bits) {
  return static_cast<float>(static_cast<int32_t>(bits >> 41) + (1 << 22)) * 0x1p-23f;
}

// Reads the weights of a slice; rows and columns are the slice's own. Trivially copyable, so that a
// kernel takes it by value.
class DummyWeights {
 public:
  explicit DummyWeights(const formats::DummyMatrix& matrix);

  WINTSERVE_HOST_DEVICE constexpr const formats::DummyMatrix& matrix() const { return m_; }

  WINTSERVE_HOST_DEVICE constexpr float Float32(int64_t row, int64_t column) const {
    return UniformFromMinusOneToOne(BitsAt(value_seed_, row + m_.first_row, WholeColumn(column))) *
           unit_;
  }
  WINTSERVE_HOST_DEVICE constexpr uint16_t Bfloat16(int64_t row, int64_t column) const {
    return formats::FloatToBfloat16(Float32(row, column));
  }
  // WINT8 and WINT4.
  WINTSERVE_HOST_DEVICE constexpr int32_t Code(int64_t row, int64_t column) const {
    const uint64_t bits = BitsAt(value_seed_, row + m_.first_row, WholeColumn(column));
    const uint32_t largest = m_.format == formats::WeightFormat::kWint8 ? 127 : 7;
    return static_cast<int32_t>(static_cast<uint32_t>(bits >> 32) % (2 * largest + 1)) -
           static_cast<int32_t>(largest);
  }
  // WINT2: rows 4 * byte_row … + 3 in stored order.
  WINTSERVE_HOST_DEVICE constexpr uint8_t Byte(int64_t byte_row, int64_t column) const {
    return static_cast<uint8_t>(
        BitsAt(value_seed_, byte_row + m_.first_row / 4, WholeColumn(column)) >> 56);
  }
  WINTSERVE_HOST_DEVICE constexpr uint8_t LocalScale(int64_t group, int64_t column) const {
    const uint64_t bits =
        BitsAt(local_scale_seed_, group + m_.first_row / kGroupRows, WholeColumn(column));
    return static_cast<uint8_t>(1 + static_cast<uint32_t>(bits >> 32) % 15);
  }
  // Of a column's codes; WINT2: the super scale.
  WINTSERVE_HOST_DEVICE constexpr float Scale(int64_t column) const {
    const uint64_t bits = BitsAt(column_seed_, 0, WholeColumn(column));
    const bool is_negative = m_.format == formats::WeightFormat::kWint2 && (bits & 1) != 0;
    const float scale = formats::RoundToBfloat16(UniformFromHalfToThreeHalves(bits) * unit_);
    return is_negative ? -scale : scale;
  }
  WINTSERVE_HOST_DEVICE constexpr int CodeMap(int64_t column) const {
    return static_cast<int>(BitsAt(column_seed_, 0, WholeColumn(column)) >> 1) &
           (kNumDummyCodeMaps - 1);
  }

 private:
  WINTSERVE_HOST_DEVICE constexpr uint64_t BitsAt(uint64_t seed, int64_t row,
                                                  int64_t column) const {
    const int64_t first = m_.transposed ? column : row;
    const int64_t second = m_.transposed ? row : column;
    return HashOfCounter(seed, static_cast<uint64_t>(first) << 32 | static_cast<uint64_t>(second));
  }
  WINTSERVE_HOST_DEVICE constexpr int64_t WholeColumn(int64_t column) const {
    int range = 0;
    while (range + 1 < m_.num_ranges && column >= m_.ranges[range].count) {
      column -= m_.ranges[range++].count;
    }
    return m_.ranges[range].first + column;
  }

  formats::DummyMatrix m_;
  uint64_t value_seed_ = 0;
  uint64_t local_scale_seed_ = 0;
  uint64_t column_seed_ = 0;
  float unit_ = 0;  // floats: the largest; codes: the scale that gives the deviation
};

// The canonical form. REQUIRES: of WINT2, k is a multiple of 64.
formats::HostMatrix MakeDummyHostMatrix(const formats::DummyMatrix& matrix);

// REQUIRES: not kFloat32; of WINT2, k is a multiple of 64; of a gate-up matrix, n is even.
WeightLayout LayOutDummyWeights(const formats::DummyMatrix& matrix, bool gate_up);

// A packed matrix in pieces of 16 bytes: the ColumnInfos, then the records.
inline constexpr int kPieceBytes = 16;
struct alignas(16) Piece {
  uint32_t words[4] = {};
};
static_assert(sizeof(Piece) == kPieceBytes && sizeof(ColumnInfo) == kPieceBytes);

WINTSERVE_HOST_DEVICE constexpr int PiecesPerRecord(formats::WeightFormat format) {
  return ChunkBytes(format) / kPieceBytes;
}

// Of a bfloat16 column, by the bits of its largest magnitude: pack_weights' choice of e, as 2^-e.
WINTSERVE_HOST_DEVICE constexpr float Bfloat16ColumnScale(uint16_t largest) {
  if (largest < 0x80) return 1;  // nothing but zeros
  const int exponent = 14 - ((largest >> 7) - 127);
  return std::bit_cast<float>(static_cast<uint32_t>(127 - (exponent < 126 ? exponent : 126)) << 23);
}

// column: of the slice, or -1 for padding. largest: of a bfloat16 matrix, the largest magnitude of
// the column as bits.
WINTSERVE_HOST_DEVICE constexpr ColumnInfo DummyColumnInfo(const DummyWeights& weights,
                                                           const DummyCodeMaps& maps,
                                                           int64_t column, uint16_t largest) {
  ColumnInfo info;
  if (column < 0) return info;
  const formats::WeightFormat format = weights.matrix().format;
  if (format == formats::WeightFormat::kBfloat16) {
    info.scale = Bfloat16ColumnScale(largest);
    return info;
  }
  info.scale = weights.Scale(column);
  if (format == formats::WeightFormat::kWint2) {
    const DummyCodeMap& map = maps.maps[weights.CodeMap(column)];
    info.multiplier = map.multiplier;
    info.offset = map.offset;
  }
  return info;
}

// The words of a lane's 16 bytes (weight_layout.h), of one column: -1 for padding.
class DummyWords {
 public:
  WINTSERVE_HOST_DEVICE constexpr DummyWords(const DummyWeights& weights, int64_t k, int64_t chunk,
                                             int64_t column, int t)
      : weights_(weights), k_(k), chunk_(chunk), column_(column), t_(t) {}

  WINTSERVE_HOST_DEVICE constexpr uint32_t Wint2(int group) const {
    uint32_t word = 0;
    for (int byte = 0; byte < 4; ++byte) {
      const int64_t byte_row = chunk_ * (kChunkRows / 4) + group * (kGroupRows / 4) + 4 * t_ + byte;
      if (column_ < 0 || 4 * byte_row >= k_) continue;
      word |= uint32_t{weights_.Byte(byte_row, column_)} << (8 * byte);
    }
    return word;
  }
  WINTSERVE_HOST_DEVICE constexpr uint32_t Wint4(int group, int pair) const {
    uint32_t word = 0;
    for (int nibble = 0; nibble < 8; ++nibble) {
      const Position position = {pair, t_, (nibble >> 1) & 1, nibble & 1, nibble >> 2};
      word |= static_cast<uint32_t>(Code(group, position) + 8) << (4 * nibble);
    }
    return word;
  }
  WINTSERVE_HOST_DEVICE constexpr uint32_t Wint8(int group, int pair, int select) const {
    uint32_t word = 0;
    for (int byte = 0; byte < 4; ++byte) {
      const Position position = {pair, t_, select, byte >> 1, byte & 1};
      word |= static_cast<uint32_t>(Code(group, position) + 128) << (8 * byte);
    }
    return word;
  }
  // scale: the column's 2^-e.
  WINTSERVE_HOST_DEVICE constexpr uint32_t Bfloat16(int group, int mma, int b, float scale) const {
    uint32_t word = 0;
    for (int half = 0; half < 2; ++half) {
      const int64_t row = Row(group, {mma / 2, t_, mma % 2, b, half});
      if (column_ < 0 || row >= k_) continue;
      const float weight = formats::Bfloat16ToFloat(weights_.Bfloat16(row, column_));
      word |= uint32_t{FloatToFloat16(weight / scale)} << (16 * half);
    }
    return word;
  }

 private:
  WINTSERVE_HOST_DEVICE constexpr int64_t Row(int group, const Position& position) const {
    return chunk_ * kChunkRows + group * kGroupRows +
           GroupRowOfPosition(position, formats::KOrder::kMma64);
  }
  WINTSERVE_HOST_DEVICE constexpr int32_t Code(int group, const Position& position) const {
    const int64_t row = Row(group, position);
    return column_ < 0 || row >= k_ ? 0 : weights_.Code(row, column_);
  }

  const DummyWeights& weights_;
  const int64_t k_;
  const int64_t chunk_;
  const int64_t column_;
  const int t_;
};

// The local scales at the end of a WINT2 record.
WINTSERVE_HOST_DEVICE constexpr Piece DummyLocalScales(const DummyWeights& weights,
                                                       const WeightLayout& layout, int64_t tile,
                                                       int64_t chunk) {
  Piece out;
  for (int byte = 0; byte < kLocalScaleBytes; ++byte) {
    const int64_t column = layout.ColumnOfTileRow(tile, byte / 2 + byte % 2 * 8);
    uint32_t scales = 0;
    for (int g = 0; g < kGroupsPerChunk; ++g) {
      const int64_t group = chunk * kGroupsPerChunk + g;
      if (column < 0 || group * kGroupRows >= layout.k) continue;
      scales |= uint32_t{weights.LocalScale(group, column)} << (4 * g);
    }
    out.words[byte / 4] |= scales << (8 * (byte % 4));
  }
  return out;
}

// Piece `piece` of the record of a tile's chunk. infos: the matrix' ColumnInfos [tile][row], of
// which only bfloat16 reads the scale.
WINTSERVE_HOST_DEVICE constexpr Piece DummyPiece(const DummyWeights& weights,
                                                 const WeightLayout& layout,
                                                 const ColumnInfo* infos, int64_t tile,
                                                 int64_t chunk, int piece) {
  using formats::WeightFormat;
  constexpr int kLanes = kUnitBytes / kPieceBytes;
  if (piece >= kLanes * UnitsPerChunk(layout.format)) {
    return DummyLocalScales(weights, layout, tile, chunk);
  }
  const int unit = piece / kLanes;
  const int lane = piece % kLanes;
  Piece out;
  for (int upper = 0; upper < 2; ++upper) {
    const int tile_row = lane / 4 + 8 * upper;
    const int64_t column = layout.ColumnOfTileRow(tile, tile_row);
    const DummyWords words(weights, layout.k, chunk, column, lane % 4);
    for (int i = 0; i < 2; ++i) {
      if (layout.format == WeightFormat::kWint2) {
        out.words[2 * i + upper] = words.Wint2(/*group=*/i);
      } else if (layout.format == WeightFormat::kWint4) {
        out.words[2 * upper + i] = words.Wint4(/*group=*/unit, /*pair=*/i);
      } else if (layout.format == WeightFormat::kWint8) {
        out.words[2 * upper + i] = words.Wint8(/*group=*/unit / 2, /*pair=*/unit % 2, /*select=*/i);
      } else {
        const float scale = infos[tile * kTileColumns + tile_row].scale;
        out.words[2 * i + upper] = words.Bfloat16(/*group=*/unit / 4, /*mma=*/unit % 4, i, scale);
      }
    }
  }
  return out;
}

}  // namespace wintserve::kernels::plan
