#include "kernels/plan/pack_weights.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <string_view>
#include <vector>

#include "common/check.h"
#include "common/status_macros.h"
#include "fmt/format.h"
#include "kernels/formats/bf16.h"
#include "kernels/plan/code_line.h"
#include "kernels/plan/float16.h"

namespace wintserve::kernels::plan {
namespace {

using formats::HostMatrix;
using formats::KOrder;
using formats::WeightFormat;

std::string_view FormatName(WeightFormat format) {
  switch (format) {
    case WeightFormat::kFloat32:
      return "float32";
    case WeightFormat::kBfloat16:
      return "bfloat16";
    case WeightFormat::kWint8:
      return "wint8";
    case WeightFormat::kWint4:
      return "wint4";
    case WeightFormat::kWint2:
      return "wint2";
  }
  CHECK(false, "format={}", static_cast<int>(format));
}

absl::Status CheckShape(const HostMatrix& matrix, bool gate_up) {
  const std::string_view format = FormatName(matrix.format);
  if (matrix.format == WeightFormat::kFloat32) {
    return absl::InvalidArgumentError(
        "a float32 matrix has no CUDA product; allowed are bfloat16, wint8, wint4 and wint2");
  }
  if (matrix.k <= 0 || (matrix.format == WeightFormat::kWint2 && matrix.k % kGroupRows != 0)) {
    return absl::InvalidArgumentError(fmt::format(
        "a {} matrix has k = {}; it must be {}", format, matrix.k,
        matrix.format == WeightFormat::kWint2 ? "a positive multiple of 64" : "positive"));
  }
  if (matrix.n <= 0 || (gate_up && matrix.n % 2 != 0)) {
    return absl::InvalidArgumentError(fmt::format("a {} {} matrix has n = {}; it must be {}",
                                                  format, gate_up ? "gate-up" : "linear", matrix.n,
                                                  gate_up ? "even and positive" : "positive"));
  }
  return absl::OkStatus();
}

absl::Status CheckColumns(const HostMatrix& matrix) {
  for (size_t column = 0; column < matrix.channel_scale.size(); ++column) {
    const float scale = matrix.channel_scale[column];
    // Sums of a product reach 2^50 before they are scaled.
    if (!(std::fabs(scale) <= 0x1p70f)) {
      return absl::InvalidArgumentError(
          fmt::format("{} scale of column {} is {}; allowed are magnitudes up to 2^70",
                      FormatName(matrix.format), column, scale));
    }
  }
  for (size_t column = 0; column < matrix.code_scale.size(); ++column) {
    const float scale = matrix.code_scale[column];
    const float zp = matrix.code_zp[column];
    if (!(255 * std::fabs(scale) + std::fabs(zp) <= 0x1p22f - 1)) {
      return absl::InvalidArgumentError(fmt::format(
          "wint2 codes of column {} (code_scale {}, code_zp {}) exceed 2^22", column, scale, zp));
    }
  }
  return absl::OkStatus();
}

// Columns of the host matrix at the rows of a tile: two runs of 8 rows, cut at the matrix' end.
struct TileColumns {
  struct Run {
    int64_t first = 0;
    int count = 0;
  };
  std::array<Run, 2> runs;
};

TileColumns ColumnsOfTile(const WeightLayout& layout, int64_t tile) {
  TileColumns columns;
  for (int half = 0; half < 2; ++half) {
    TileColumns::Run& run = columns.runs[half];
    run.first = std::max<int64_t>(layout.ColumnOfTileRow(tile, 8 * half), 0);
    while (run.count < 8 && layout.ColumnOfTileRow(tile, 8 * half + run.count) >= 0) ++run.count;
  }
  return columns;
}

// One value a row of the tile, from a row of the host matrix; `padding` where there is no column.
template <typename T>
std::array<T, kTileColumns> GatherRows(const T* row, const TileColumns& columns, T padding) {
  std::array<T, kTileColumns> values;
  for (int half = 0; half < 2; ++half) {
    const TileColumns::Run& run = columns.runs[half];
    if (run.count == 8) {
      std::memcpy(values.data() + 8 * half, row + run.first, 8 * sizeof(T));
      continue;
    }
    for (int i = 0; i < 8; ++i) values[8 * half + i] = i < run.count ? row[run.first + i] : padding;
  }
  return values;
}

// Byte of a unit where the 16 bytes of the lane of (row of a tile, t) begin.
constexpr int LaneOffset(int tile_row, int t) { return (tile_row % 8 * 4 + t) * 16; }

void StoreWord(uint8_t* to, uint32_t word) { std::memcpy(to, &word, sizeof(word)); }

// The bfloat16 weight * 2^exponent as a binary16.
uint16_t ScaledFloat16(uint16_t bfloat16, int exponent) {
  const int scaled = ((bfloat16 >> 7) & 255) - 112 + exponent;
  if (scaled > 0 && scaled < 31 && (bfloat16 & 0x7F80) != 0) {
    // Normal before and after: 3 zeros behind the 7 fraction bits.
    return static_cast<uint16_t>((bfloat16 & 0x8000) | scaled << 10 | (bfloat16 & 0x7F) << 3);
  }
  const double weight = formats::Bfloat16ToFloat(bfloat16);
  return FloatToFloat16(static_cast<float>(std::ldexp(weight, exponent)));
}

// Packs one group of 64 rows of k of one tile.
class GroupPacker {
 public:
  // exponents: of the columns, for bfloat16.
  GroupPacker(const HostMatrix& matrix, const WeightLayout& layout,
              const std::vector<int16_t>& exponents)
      : m_(matrix), exponents_(exponents) {
    for (int i = 0; i < kGroupRows; ++i) {
      row_of_position_[i] = GroupRowOfPosition(PositionOfIndex(i), layout.k_order);
    }
  }

  // record: of the group's chunk.
  void Pack(const TileColumns& columns, int64_t group, uint8_t* record) const {
    const int in_chunk = static_cast<int>(group % kGroupsPerChunk);
    switch (m_.format) {
      case WeightFormat::kWint2:
        if (group * kGroupRows < m_.k) PackWint2(columns, group, in_chunk, record);
        return;
      case WeightFormat::kWint4:
        return PackWint4(columns, group, record + in_chunk * kUnitBytes);
      case WeightFormat::kWint8:
        return PackWint8(columns, group, record + in_chunk * 2 * kUnitBytes);
      default:
        return PackBfloat16(columns, group, record + in_chunk * 4 * kUnitBytes);
    }
  }

 private:
  using Bytes = std::array<uint8_t, kTileColumns>;
  using Words = std::array<uint32_t, kTileColumns>;

  // Whole bytes move: a byte's four weights stand together in the layout as well.
  void PackWint2(const TileColumns& columns, int64_t group, int in_chunk, uint8_t* record) const {
    for (int t = 0; t < 4; ++t) {
      Words words{};
      for (int byte = 0; byte < 4; ++byte) {
        const int64_t source = group * (kGroupRows / 4) + 4 * t + byte;
        const Bytes bytes = GatherRows<uint8_t>(&m_.codes_u8[source * m_.n], columns, 0);
        for (int row = 0; row < kTileColumns; ++row) words[row] |= bytes[row] << (8 * byte);
      }
      for (int row = 0; row < kTileColumns; ++row) {
        StoreWord(record + LaneOffset(row, t) + (2 * in_chunk + row / 8) * 4, words[row]);
      }
    }
    const Bytes scales = GatherRows<uint8_t>(&m_.local_scale[group * m_.n], columns, 0);
    for (int row = 0; row < kTileColumns; ++row) {
      record[kUnitBytes + row % 8 * 2 + row / 8] |=
          static_cast<uint8_t>((scales[row] & 15) << (4 * in_chunk));
    }
  }

  void PackWint4(const TileColumns& columns, int64_t group, uint8_t* unit) const {
    for (int pair = 0; pair < 2; ++pair) {
      for (int t = 0; t < 4; ++t) {
        Words words{};
        for (int i = 0; i < 8; ++i) {
          const Position p = PositionOfIndex(32 * pair + 8 * t + i);
          AddCodes(columns, group, p, 8, 4 * (4 * p.half + 2 * p.select + p.b), &words);
        }
        for (int row = 0; row < kTileColumns; ++row) {
          StoreWord(unit + LaneOffset(row, t) + (2 * (row / 8) + pair) * 4, words[row]);
        }
      }
    }
  }

  void PackWint8(const TileColumns& columns, int64_t group, uint8_t* units) const {
    for (int first = 0; first < kGroupRows; first += 4) {
      Words words{};
      for (int i = 0; i < 4; ++i) {
        const Position p = PositionOfIndex(first + i);
        AddCodes(columns, group, p, 128, 8 * (2 * p.b + p.half), &words);
      }
      const Position p = PositionOfIndex(first);
      for (int row = 0; row < kTileColumns; ++row) {
        StoreWord(
            units + p.pair * kUnitBytes + LaneOffset(row, p.t) + (2 * (row / 8) + p.select) * 4,
            words[row]);
      }
    }
  }

  void PackBfloat16(const TileColumns& columns, int64_t group, uint8_t* units) const {
    const auto exponents = GatherRows<int16_t>(exponents_.data(), columns, 0);
    for (int first = 0; first < kGroupRows; first += 2) {
      Words words{};
      for (int half = 0; half < 2; ++half) {
        const int64_t k = group * kGroupRows + row_of_position_[first + half];
        if (k >= m_.k) continue;
        const auto values = GatherRows<uint16_t>(&m_.values_bf16[k * m_.n], columns, 0);
        for (int row = 0; row < kTileColumns; ++row) {
          words[row] |= uint32_t{ScaledFloat16(values[row], exponents[row])} << (16 * half);
        }
      }
      const Position p = PositionOfIndex(first);
      for (int row = 0; row < kTileColumns; ++row) {
        StoreWord(units + (2 * p.pair + p.select) * kUnitBytes + LaneOffset(row, p.t) +
                      (2 * p.b + row / 8) * 4,
                  words[row]);
      }
    }
  }

  // words[row] |= (code + offset) << shift with the codes at a position.
  void AddCodes(const TileColumns& columns, int64_t group, const Position& p, int offset, int shift,
                Words* words) const {
    const int64_t k = group * kGroupRows + row_of_position_[p.index()];
    std::array<int8_t, kTileColumns> codes{};
    if (k < m_.k) codes = GatherRows<int8_t>(&m_.codes_i8[k * m_.n], columns, 0);
    for (int row = 0; row < kTileColumns; ++row) {
      (*words)[row] |= static_cast<uint32_t>(codes[row] + offset) << shift;
    }
  }

  const HostMatrix& m_;
  const std::vector<int16_t>& exponents_;
  std::array<int, kGroupRows> row_of_position_;
};

// For each column of a bfloat16 matrix the e that brings its largest finite weight to
// [2^14, 2^15), unless 2^-e were subnormal.
std::vector<int16_t> ExponentsOfColumns(const HostMatrix& matrix) {
  std::vector<uint16_t> largest(matrix.n);  // magnitudes are ordered as their patterns are
  for (int64_t row = 0; row < matrix.k; ++row) {
    const uint16_t* values = &matrix.values_bf16[row * matrix.n];
    for (int64_t column = 0; column < matrix.n; ++column) {
      const auto magnitude = static_cast<uint16_t>(values[column] & 0x7FFF);
      if (magnitude < 0x7F80) largest[column] = std::max(largest[column], magnitude);
    }
  }
  std::vector<int16_t> exponents(matrix.n);
  for (int64_t column = 0; column < matrix.n; ++column) {
    if (largest[column] == 0) continue;
    const int exponent = 14 - std::ilogb(formats::Bfloat16ToFloat(largest[column]));
    exponents[column] = static_cast<int16_t>(std::min(exponent, 126));
  }
  return exponents;
}

ColumnInfo MakeColumnInfo(const HostMatrix& matrix, int64_t column, int exponent,
                          CodeLineErrors* errors) {
  ColumnInfo info;
  if (matrix.format == WeightFormat::kBfloat16) {
    info.scale = std::ldexp(1.0f, -exponent);
    return info;
  }
  info.scale = matrix.channel_scale[column];
  if (matrix.format != WeightFormat::kWint2) return info;
  const CodeLine line = FindCodeLine(matrix.code_scale[column], matrix.code_zp[column]);
  info.multiplier = line.multiplier;
  info.offset = line.offset;
  errors->num_columns += line.num_wrong_bytes > 0 ? 1 : 0;
  errors->num_bytes += line.num_wrong_bytes;
  return info;
}

}  // namespace

absl::StatusOr<WeightLayout> LayOutWeights(const HostMatrix& matrix, bool gate_up) {
  RETURN_IF_ERROR(CheckShape(matrix, gate_up));
  RETURN_IF_ERROR(CheckColumns(matrix));
  WeightLayout layout;
  layout.format = matrix.format;
  layout.k_order = matrix.format == WeightFormat::kWint2 ? matrix.k_order : KOrder::kMma64;
  layout.gate_up = gate_up;
  layout.k = matrix.k;
  layout.n = matrix.n;
  return layout;
}

CodeLineErrors PackWeights(const HostMatrix& matrix, const WeightLayout& layout, uint8_t* out) {
  std::memset(out, 0, layout.size_bytes());
  std::vector<int16_t> exponents(matrix.n);
  if (matrix.format == WeightFormat::kBfloat16) exponents = ExponentsOfColumns(matrix);
  CodeLineErrors errors;
  std::vector<TileColumns> columns;
  for (int64_t tile = 0; tile < layout.tiles(); ++tile) {
    columns.push_back(ColumnsOfTile(layout, tile));
    for (int row = 0; row < kTileColumns; ++row) {
      const int64_t column = layout.ColumnOfTileRow(tile, row);
      if (column < 0) continue;
      const ColumnInfo info = MakeColumnInfo(matrix, column, exponents[column], &errors);
      std::memcpy(out + (tile * kTileColumns + row) * sizeof(info), &info, sizeof(info));
    }
  }
  // All tiles of a group after one another, because 64 rows of the host matrix fit a cache.
  const GroupPacker packer(matrix, layout, exponents);
  uint8_t* records = out + layout.records_offset();
  for (int64_t group = 0; group < layout.chunks() * kGroupsPerChunk; ++group) {
    for (int64_t tile = 0; tile < layout.tiles(); ++tile) {
      const int64_t record = tile * layout.chunks() + group / kGroupsPerChunk;
      packer.Pack(columns[tile], group, records + record * ChunkBytes(matrix.format));
    }
  }
  return errors;
}

}  // namespace wintserve::kernels::plan
