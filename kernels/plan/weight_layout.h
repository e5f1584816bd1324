// How a CUDA kernel keeps a weight matrix W [k, n]: as the A operand of mma.m16n8k16, so that 16
// output columns are the rows of the operand and the tokens its columns. One layout a format serves
// every number of tokens.
//
// A tile is 16 output columns. Its rows 0 … 15 are
//   linear    columns 16 * tile + row
//   gate-up   row < 8: gate column 8 * tile + row;  row >= 8: up column 8 * tile + row - 8
// so that one thread of an mma holds gate and up of the same column. A chunk is 128 rows of k, two
// groups of 64. Columns beyond n and rows beyond k are zero weights, and the number of tiles is
// even.
//
// Bytes of a matrix: ColumnInfo [tile][row], then a record [tile][chunk]: units of 512 bytes each,
// and for WINT2 the local scales of 16 columns and two groups: byte 2g is row g, byte 2g + 1 row
// g + 8; the first group in the low nibble.
//
// A unit is one 16-byte load of every lane of a warp. Lane 4g + t (g = 0 … 7, t = 0 … 3) loads the
// weights that its part of the A operand holds: rows g and g + 8 of the tile, 16 of the 64 k of a
// group. Those are multiplied in four mma; A register 2 * b + upper of mma m = 2 * pair + select
// holds, for row g + 8 * upper, the k at the positions (below) of pair, t, select, b. The 16 bytes
// of a lane are four words:
//   WINT2   1 unit a chunk;  word 2 * group + upper: byte 2 * pair + half is the codeword whose
//           weights 3, 2, 1, 0 stand at (select, b) = (0, 0), (0, 1), (1, 0), (1, 1)
//   WINT4   2 units, one a group;  word 2 * upper + pair: nibble 4 * half + 2 * select + b is
//           code + 8
//   WINT8   4 units, 2 * group + pair;  word 2 * upper + select: byte 2 * b + half is code + 128
//   BF16    8 units, 4 * group + m;  word 2 * b + upper: half `half` is the weight * 2^e as an
//           IEEE binary16, e so that the column's largest is in [2^14, 2^15). That is exact for
//           weights down to 2^-31 of the largest and off by at most 2^-39 of it below.
#pragma once

#include <cstdint>

#include "kernels/formats/matrix.h"
#include "kernels/formats/wint2.h"
#include "kernels/plan/host_device.h"

namespace wintserve::kernels::plan {

inline constexpr int kTileColumns = 16;
inline constexpr int kChunkRows = 128;
inline constexpr int kGroupRows = 64;
inline constexpr int kGroupsPerChunk = kChunkRows / kGroupRows;
inline constexpr int kUnitBytes = 512;
inline constexpr int kLocalScaleBytes = 16;  // of a record

// The place of a k row inside its 64-group in activations that are prepared for a product: the B
// operand's order. Position bits from the highest: pair, t (2 bits), select, b, half.
struct Position {
  int pair = 0;
  int t = 0;
  int select = 0;
  int b = 0;
  int half = 0;

  constexpr int index() const { return 32 * pair + 8 * t + 4 * select + 2 * b + half; }
};

WINTSERVE_HOST_DEVICE constexpr Position PositionOfIndex(int index) {
  return {index >> 5, (index >> 3) & 3, (index >> 2) & 1, (index >> 1) & 1, index & 1};
}

// Stored row of a WINT2 group (4 * byte + weight of the byte) at a position.
WINTSERVE_HOST_DEVICE constexpr int StoredRowOfPosition(const Position& p) {
  return 16 * p.t + 4 * (2 * p.pair + p.half) + 3 - 2 * p.select - p.b;
}

// The k row inside the group at a position. Formats other than WINT2 keep kMma64, so that one
// preparation serves products of several formats.
WINTSERVE_HOST_DEVICE constexpr int GroupRowOfPosition(const Position& p, formats::KOrder order) {
  const int stored_row = StoredRowOfPosition(p);
  if (order == formats::KOrder::kNatural) return stored_row;
  const int weight = stored_row % 4;
  return 16 * (stored_row / 4 % 4) + 8 * (weight >> 1) + 2 * (stored_row / 16) + (weight & 1);
}

// What a product needs of one output column.
struct alignas(16) ColumnInfo {
  uint32_t multiplier = 0;  // WINT2: code = (byte * multiplier + offset) >> 17, see code_line.h
  uint32_t offset = 0;
  float scale = 0;  // WINT2: super scale; WINT4, WINT8: channel scale; BF16: 2^-e
  uint32_t unused = 0;
};
static_assert(sizeof(ColumnInfo) == 16);

WINTSERVE_HOST_DEVICE constexpr int UnitsPerChunk(formats::WeightFormat format) {
  switch (format) {
    case formats::WeightFormat::kWint2:
      return 1;
    case formats::WeightFormat::kWint4:
      return 2;
    case formats::WeightFormat::kWint8:
      return 4;
    default:
      return 8;
  }
}

// Bytes of a record.
WINTSERVE_HOST_DEVICE constexpr int ChunkBytes(formats::WeightFormat format) {
  return UnitsPerChunk(format) * kUnitBytes +
         (format == formats::WeightFormat::kWint2 ? kLocalScaleBytes : 0);
}

// Decoded weights carry an offset that depends on b only (an mma takes 512 + code + 32, say, for
// code): every sum over a group must be corrected by
//   -(b0 * sum of the activations at b = 0 + b1 * sum of those at b = 1).
struct Offsets {
  float b0 = 0;
  float b1 = 0;

  constexpr bool operator==(const Offsets&) const = default;
};

constexpr Offsets OffsetsOf(formats::WeightFormat format) {
  switch (format) {
    case formats::WeightFormat::kWint2:
      return {512 + 32, 64 + 32};
    case formats::WeightFormat::kWint4:
      return {256 + 8, 16 + 8};
    case formats::WeightFormat::kWint8:
      return {1024 + 128, 1024 + 128};
    default:
      return {};
  }
}

struct WeightLayout {
  formats::WeightFormat format = formats::WeightFormat::kWint2;  // not kFloat32
  formats::KOrder k_order = formats::KOrder::kMma64;
  bool gate_up = false;  // n columns: the gate half, then the up half
  int64_t k = 0;
  int64_t n = 0;

  // Columns of a product's output: n, of a gate-up matrix one half.
  constexpr int64_t width() const { return gate_up ? n / 2 : n; }
  constexpr int64_t tiles() const {
    const int64_t columns = gate_up ? kTileColumns / 2 : kTileColumns;
    return (width() + 2 * columns - 1) / (2 * columns) * 2;
  }
  constexpr int64_t chunks() const { return (k + kChunkRows - 1) / kChunkRows; }
  // Where the records begin.
  constexpr int64_t records_offset() const {
    return tiles() * kTileColumns * static_cast<int64_t>(sizeof(ColumnInfo));
  }
  constexpr int64_t size_bytes() const {
    return records_offset() + tiles() * chunks() * ChunkBytes(format);
  }

  // Column of the host matrix at a row of a tile; -1 for padding.
  constexpr int64_t ColumnOfTileRow(int64_t tile, int row) const {
    if (!gate_up) {
      const int64_t column = tile * kTileColumns + row;
      return column < n ? column : -1;
    }
    const int64_t column = tile * (kTileColumns / 2) + row % (kTileColumns / 2);
    return column < width() ? column + (row < kTileColumns / 2 ? 0 : width()) : -1;
  }
};

}  // namespace wintserve::kernels::plan
