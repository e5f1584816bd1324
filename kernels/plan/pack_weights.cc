#include "kernels/plan/pack_weights.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <string_view>

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

// Columns of the host matrix at the 16 rows of a tile; -1 for padding.
using TileColumns = std::array<int64_t, kTileColumns>;

TileColumns ColumnsOfTile(const WeightLayout& layout, int64_t tile) {
  TileColumns columns;
  for (int row = 0; row < kTileColumns; ++row) columns[row] = layout.ColumnOfTileRow(tile, row);
  return columns;
}

// Byte of a unit where the 16 bytes of the lane of (row of a tile, t) begin.
int LaneOffset(int tile_row, int t) { return (tile_row % 8 * 4 + t) * 16; }

// The k row inside the group at each position.
std::array<int, kGroupRows> RowsOfPositions(KOrder order) {
  std::array<int, kGroupRows> rows;
  for (int i = 0; i < kGroupRows; ++i) rows[i] = GroupRowOfPosition(PositionOfIndex(i), order);
  return rows;
}

// Packs the records of one tile.
class TilePacker {
 public:
  TilePacker(const HostMatrix& matrix, const WeightLayout& layout)
      : m_(matrix), layout_(layout), row_of_position_(RowsOfPositions(layout.k_order)) {}

  void Pack(const TileColumns& columns, const std::array<int, kTileColumns>& exponents,
            uint8_t* records) const {
    for (int64_t group = 0; group < layout_.chunks() * kGroupsPerChunk; ++group) {
      uint8_t* record = records + group / kGroupsPerChunk * ChunkBytes(m_.format);
      const int in_chunk = static_cast<int>(group % kGroupsPerChunk);
      switch (m_.format) {
        case WeightFormat::kWint2:
          PackWint2(columns, group, in_chunk, record, record + kUnitBytes);
          break;
        case WeightFormat::kWint4:
          PackWint4(columns, group, record + in_chunk * kUnitBytes);
          break;
        case WeightFormat::kWint8:
          PackWint8(columns, group, record + in_chunk * 2 * kUnitBytes);
          break;
        default:
          PackBfloat16(columns, exponents, group, record + in_chunk * 4 * kUnitBytes);
      }
    }
  }

 private:
  // Whole bytes move: a byte's four weights stand together in the layout as well.
  void PackWint2(const TileColumns& columns, int64_t group, int in_chunk, uint8_t* unit,
                 uint8_t* scales) const {
    if (group * kGroupRows >= m_.k) return;
    for (int byte = 0; byte < kGroupRows / 4; ++byte) {
      const uint8_t* source = m_.codes_u8.data() + (group * (kGroupRows / 4) + byte) * m_.n;
      const int t = byte / 4;
      for (int row = 0; row < kTileColumns; ++row) {
        if (columns[row] < 0) continue;
        unit[LaneOffset(row, t) + (2 * in_chunk + row / 8) * 4 + byte % 4] = source[columns[row]];
      }
    }
    const uint8_t* source = m_.local_scale.data() + group * m_.n;
    for (int row = 0; row < kTileColumns; ++row) {
      if (columns[row] < 0) continue;
      scales[row % 8 * 2 + row / 8] |=
          static_cast<uint8_t>((source[columns[row]] & 15) << (4 * in_chunk));
    }
  }

  void PackWint4(const TileColumns& columns, int64_t group, uint8_t* unit) const {
    ForEachWeight(columns, group, [&](const Position& p, int row, int64_t source) {
      const int nibble = 4 * p.half + 2 * p.select + p.b;
      const int code = source < 0 ? 8 : m_.codes_i8[source] + 8;
      unit[LaneOffset(row, p.t) + (2 * (row / 8) + p.pair) * 4 + nibble / 2] |=
          static_cast<uint8_t>(code << (nibble % 2 * 4));
    });
  }

  void PackWint8(const TileColumns& columns, int64_t group, uint8_t* units) const {
    ForEachWeight(columns, group, [&](const Position& p, int row, int64_t source) {
      units[p.pair * kUnitBytes + LaneOffset(row, p.t) + (2 * (row / 8) + p.select) * 4 + 2 * p.b +
            p.half] = static_cast<uint8_t>(source < 0 ? 128 : m_.codes_i8[source] + 128);
    });
  }

  void PackBfloat16(const TileColumns& columns, const std::array<int, kTileColumns>& exponents,
                    int64_t group, uint8_t* units) const {
    ForEachWeight(columns, group, [&](const Position& p, int row, int64_t source) {
      uint16_t half = 0;
      if (source >= 0) {
        const double weight = formats::Bfloat16ToFloat(m_.values_bf16[source]);
        half = FloatToFloat16(static_cast<float>(std::ldexp(weight, exponents[row])));
      }
      std::memcpy(units + (2 * p.pair + p.select) * kUnitBytes + LaneOffset(row, p.t) +
                      (2 * p.b + row / 8) * 4 + 2 * p.half,
                  &half, sizeof(half));
    });
  }

  // fn(position, row of the tile, index into the host matrix or -1 for padding)
  template <typename Fn>
  void ForEachWeight(const TileColumns& columns, int64_t group, const Fn& fn) const {
    for (int index = 0; index < kGroupRows; ++index) {
      const Position position = PositionOfIndex(index);
      const int64_t k = group * kGroupRows + row_of_position_[index];
      for (int row = 0; row < kTileColumns; ++row) {
        fn(position, row, k < m_.k && columns[row] >= 0 ? k * m_.n + columns[row] : -1);
      }
    }
  }

  const HostMatrix& m_;
  const WeightLayout& layout_;
  const std::array<int, kGroupRows> row_of_position_;
};

// 2^e brings the largest finite weight of a column to [2^14, 2^15), unless 2^-e were subnormal.
int ExponentOfColumn(const HostMatrix& matrix, int64_t column) {
  float largest = 0;
  for (int64_t row = 0; row < matrix.k; ++row) {
    const float weight =
        std::fabs(formats::Bfloat16ToFloat(matrix.values_bf16[row * matrix.n + column]));
    if (std::isfinite(weight)) largest = std::max(largest, weight);
  }
  if (largest == 0) return 0;
  return std::min(14 - std::ilogb(largest), 126);
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
  CodeLineErrors errors;
  const TilePacker packer(matrix, layout);
  auto* infos = reinterpret_cast<ColumnInfo*>(out);
  for (int64_t tile = 0; tile < layout.tiles(); ++tile) {
    const TileColumns columns = ColumnsOfTile(layout, tile);
    std::array<int, kTileColumns> exponents{};
    for (int row = 0; row < kTileColumns; ++row) {
      const int64_t column = columns[row];
      if (column < 0) continue;
      ColumnInfo& info = infos[tile * kTileColumns + row];
      if (matrix.format == WeightFormat::kBfloat16) {
        exponents[row] = ExponentOfColumn(matrix, column);
        info.scale = std::ldexp(1.0f, -exponents[row]);
        continue;
      }
      info.scale = matrix.channel_scale[column];
      if (matrix.format != WeightFormat::kWint2) continue;
      const CodeLine line = FindCodeLine(matrix.code_scale[column], matrix.code_zp[column]);
      info.multiplier = line.multiplier;
      info.offset = line.offset;
      errors.num_columns += line.num_wrong_bytes > 0 ? 1 : 0;
      errors.num_bytes += line.num_wrong_bytes;
    }
    packer.Pack(columns, exponents,
                out + layout.records_offset() + tile * layout.chunks() * ChunkBytes(matrix.format));
  }
  return errors;
}

}  // namespace wintserve::kernels::plan
