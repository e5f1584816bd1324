#include "kernels/plan/pack_weights.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <memory>
#include <string_view>
#include <vector>

#include "common/check.h"
#include "common/status_macros.h"
#include "fmt/format.h"
#include "kernels/cpu/thread_pool.h"
#include "kernels/formats/bf16.h"
#include "kernels/formats/format_name.h"
#include "kernels/plan/code_line.h"
#include "kernels/plan/float16.h"

namespace wintserve::kernels::plan {
namespace {

using formats::FormatName;
using formats::HostMatrix;
using formats::KOrder;
using formats::WeightFormat;

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

// Tiles that are packed together: their rows of k are read in runs of 256 or 512 bytes, which
// memory delivers at full speed, and their chunk of the host matrix fits a cache.
constexpr int kBlockTiles = 16;
constexpr int kBlockColumns = kBlockTiles * kTileColumns;
// Finding the lines of 16 columns, in multiply-adds of the time.
constexpr int64_t kWorkOfTileInfos = 16 * 4096;

void StoreWord(uint8_t* to, uint32_t word) { std::memcpy(to, &word, sizeof(word)); }

// A value, or a word, for each row of a tile.
template <typename T>
using TileRows = std::array<T, kTileColumns>;

// Words made of four bytes, the first lowest.
TileRows<uint32_t> WordsOfBytes(const uint8_t* b0, const uint8_t* b1, const uint8_t* b2,
                                const uint8_t* b3) {
  TileRows<uint32_t> words;
  for (int row = 0; row < kTileColumns; ++row) {
    words[row] =
        b0[row] | uint32_t{b1[row]} << 8 | uint32_t{b2[row]} << 16 | uint32_t{b3[row]} << 24;
  }
  return words;
}

TileRows<uint32_t> WordsOfHalves(const TileRows<uint16_t>& low, const TileRows<uint16_t>& high) {
  TileRows<uint32_t> words;
  for (int row = 0; row < kTileColumns; ++row) words[row] = low[row] | uint32_t{high[row]} << 16;
  return words;
}

// The 16 bytes of lanes 4g + t, g = 0 … 7: the g-th of each of four runs of words.
void StoreLanes(const uint32_t* w0, const uint32_t* w1, const uint32_t* w2, const uint32_t* w3,
                int t, uint8_t* unit) {
  for (int g = 0; g < 8; ++g) {
    uint8_t* lane = unit + (4 * g + t) * 16;
    StoreWord(lane, w0[g]);
    StoreWord(lane + 4, w1[g]);
    StoreWord(lane + 8, w2[g]);
    StoreWord(lane + 12, w3[g]);
  }
}

// The bfloat16 weights * 2^exponents as binary16.
TileRows<uint16_t> ScaledFloat16(const uint16_t* bfloat16, const int16_t* exponents) {
  TileRows<uint16_t> halves;
  TileRows<uint16_t> is_special;
  uint16_t any_special = 0;
  for (int row = 0; row < kTileColumns; ++row) {
    // Normal before and after: 3 zeros behind the 7 fraction bits. Or zero.
    const uint16_t bits = bfloat16[row];
    const auto exponent = static_cast<uint16_t>((bits >> 7) & 255);
    const auto scaled = static_cast<uint16_t>(exponent - 112 + exponents[row]);
    const auto magnitude = static_cast<uint16_t>(scaled << 10 | (bits & 0x7F) << 3);
    const uint16_t nonzero = (bits & 0x7FFF) != 0 ? 0xFFFF : 0;
    const uint16_t subnormal = exponent == 0 ? 0xFFFF : 0;
    const uint16_t out_of_range = static_cast<uint16_t>(scaled - 1) > 29 ? 0xFFFF : 0;
    halves[row] = static_cast<uint16_t>((bits & 0x8000) | (magnitude & nonzero));
    is_special[row] = static_cast<uint16_t>(nonzero & (subnormal | out_of_range));
    any_special |= is_special[row];
  }
  if (any_special == 0) return halves;
  for (int row = 0; row < kTileColumns; ++row) {
    if (is_special[row] == 0) continue;
    const double weight = formats::Bfloat16ToFloat(bfloat16[row]);
    halves[row] = FloatToFloat16(static_cast<float>(std::ldexp(weight, exponents[row])));
  }
  return halves;
}

// Rows of the host matrix at the positions of a group.
constexpr std::array<int, kGroupRows> kRowOfPosition = [] {
  std::array<int, kGroupRows> rows{};
  for (int i = 0; i < kGroupRows; ++i) {
    rows[i] = GroupRowOfPosition(PositionOfIndex(i), KOrder::kMma64);
  }
  return rows;
}();

// Where a tile's chunk lies in a block: kBlockColumns values a row, beyond the matrix zeros.
template <typename T>
const T* RowAt(const T* tile, int group, const Position& p) {
  return tile + (group * kGroupRows + kRowOfPosition[p.index()]) * kBlockColumns;
}

// Whole bytes move: a byte's four weights stand together in the layout as well. Below the 32 rows
// of bytes stand two of local scales.
void PackWint2(const uint8_t* tile, uint8_t* record) {
  for (int t = 0; t < 4; ++t) {
    std::array<TileRows<uint32_t>, 2> words;
    for (int group = 0; group < 2; ++group) {
      const uint8_t* bytes = tile + (16 * group + 4 * t) * kBlockColumns;
      words[group] = WordsOfBytes(bytes, bytes + kBlockColumns, bytes + 2 * kBlockColumns,
                                  bytes + 3 * kBlockColumns);
    }
    StoreLanes(&words[0][0], &words[0][8], &words[1][0], &words[1][8], t, record);
  }
  const uint8_t* first = tile + kChunkRows / 4 * kBlockColumns;
  const uint8_t* second = first + kBlockColumns;
  for (int row = 0; row < kTileColumns; ++row) {
    record[kUnitBytes + row % 8 * 2 + row / 8] =
        static_cast<uint8_t>((first[row] & 15) | (second[row] & 15) << 4);
  }
}

void PackWint4(const uint8_t* tile, uint8_t* record) {
  for (int group = 0; group < 2; ++group) {
    for (int t = 0; t < 4; ++t) {
      std::array<TileRows<uint32_t>, 2> words;
      for (int pair = 0; pair < 2; ++pair) {
        std::array<TileRows<uint8_t>, 4> bytes;
        for (int i = 0; i < 4; ++i) {
          const Position low = {.pair = pair, .t = t, .select = i % 2, .b = 0, .half = i / 2};
          const Position high = {.pair = pair, .t = t, .select = i % 2, .b = 1, .half = i / 2};
          const uint8_t* low_codes = RowAt(tile, group, low);
          const uint8_t* high_codes = RowAt(tile, group, high);
          for (int row = 0; row < kTileColumns; ++row) {
            // code + 8, modulo 16
            bytes[i][row] =
                static_cast<uint8_t>(((low_codes[row] & 15) | (high_codes[row] & 15) << 4) ^ 0x88);
          }
        }
        words[pair] =
            WordsOfBytes(bytes[0].data(), bytes[1].data(), bytes[2].data(), bytes[3].data());
      }
      StoreLanes(&words[0][0], &words[1][0], &words[0][8], &words[1][8], t,
                 record + group * kUnitBytes);
    }
  }
}

void PackWint8(const uint8_t* tile, uint8_t* record) {
  for (int group = 0; group < 2; ++group) {
    for (int pair = 0; pair < 2; ++pair) {
      for (int t = 0; t < 4; ++t) {
        std::array<TileRows<uint32_t>, 2> words;
        for (int select = 0; select < 2; ++select) {
          const auto at = [&](int b, int half) {
            return RowAt(tile, group,
                         {.pair = pair, .t = t, .select = select, .b = b, .half = half});
          };
          words[select] = WordsOfBytes(at(0, 0), at(0, 1), at(1, 0), at(1, 1));
          for (uint32_t& word : words[select]) word ^= 0x80808080;  // code + 128, modulo 256
        }
        StoreLanes(&words[0][0], &words[1][0], &words[0][8], &words[1][8], t,
                   record + (2 * group + pair) * kUnitBytes);
      }
    }
  }
}

// exponents: of the tile's rows.
void PackBfloat16(const uint16_t* tile, const int16_t* exponents, uint8_t* record) {
  for (int group = 0; group < 2; ++group) {
    for (int mma = 0; mma < 4; ++mma) {
      for (int t = 0; t < 4; ++t) {
        std::array<TileRows<uint32_t>, 2> words;
        for (int b = 0; b < 2; ++b) {
          const auto halves = [&](int half) {
            return ScaledFloat16(
                RowAt(tile, group,
                      {.pair = mma / 2, .t = t, .select = mma % 2, .b = b, .half = half}),
                exponents);
          };
          words[b] = WordsOfHalves(halves(0), halves(1));
        }
        StoreLanes(&words[0][0], &words[0][8], &words[1][0], &words[1][8], t,
                   record + (4 * group + mma) * kUnitBytes);
      }
    }
  }
}

// Packs blocks of kBlockTiles tiles of one chunk.
class BlockPacker {
 public:
  // exponents: of the columns, for bfloat16.
  BlockPacker(const HostMatrix& matrix, const WeightLayout& layout,
              const std::vector<int16_t>& exponents)
      : m_(matrix), layout_(layout), exponents_(exponents) {}

  // A copy of the block's part of the host matrix, in the order of the tiles' rows.
  struct Scratch {
    alignas(64) std::array<uint16_t, kChunkRows * kBlockColumns> rows;
    std::array<int16_t, kBlockColumns> exponents;
  };

  void Pack(int64_t chunk, int64_t first_tile, uint8_t* records, Scratch* scratch) const {
    const int num_tiles =
        static_cast<int>(std::min<int64_t>(kBlockTiles, layout_.tiles() - first_tile));
    const bool is_bfloat16 = m_.format == WeightFormat::kBfloat16;
    auto* bytes = reinterpret_cast<uint8_t*>(scratch->rows.data());
    if (m_.format == WeightFormat::kWint2) {
      CopyRows(m_.codes_u8.data(), m_.k / 4, chunk * 32, 32, first_tile, num_tiles, bytes);
      CopyRows(m_.local_scale.data(), m_.k / kGroupRows, chunk * kGroupsPerChunk, kGroupsPerChunk,
               first_tile, num_tiles, bytes + 32 * kBlockColumns);
    } else if (is_bfloat16) {
      CopyRows(m_.values_bf16.data(), m_.k, chunk * kChunkRows, kChunkRows, first_tile, num_tiles,
               scratch->rows.data());
      CopyRows(exponents_.data(), 1, 0, 1, first_tile, num_tiles, scratch->exponents.data());
    } else {
      CopyRows(reinterpret_cast<const uint8_t*>(m_.codes_i8.data()), m_.k, chunk * kChunkRows,
               kChunkRows, first_tile, num_tiles, bytes);
    }
    for (int tile = 0; tile < num_tiles; ++tile) {
      const int first = tile * kTileColumns;
      uint8_t* record =
          records + ((first_tile + tile) * layout_.chunks() + chunk) * ChunkBytes(m_.format);
      switch (m_.format) {
        case WeightFormat::kWint2:
          PackWint2(bytes + first, record);
          break;
        case WeightFormat::kWint4:
          PackWint4(bytes + first, record);
          break;
        case WeightFormat::kWint8:
          PackWint8(bytes + first, record);
          break;
        default:
          PackBfloat16(&scratch->rows[first], &scratch->exponents[first], record);
      }
    }
  }

 private:
  // Rows first_row … of `from` [total_rows, n] at the columns of the tiles; zeros beyond.
  template <typename T>
  void CopyRows(const T* from, int64_t total_rows, int64_t first_row, int num_rows,
                int64_t first_tile, int num_tiles, T* to) const {
    for (int i = 0; i < num_rows; ++i, to += kBlockColumns) {
      const int64_t row = first_row + i;
      if (row >= total_rows) {
        std::memset(to, 0, kBlockColumns * sizeof(T));
      } else {
        CopyRow(from + row * m_.n, first_tile, num_tiles, to);
      }
    }
  }

  template <typename T>
  void CopyRow(const T* row, int64_t first_tile, int num_tiles, T* to) const {
    const int64_t step = layout_.gate_up ? kTileColumns / 2 : kTileColumns;
    const int64_t first = first_tile * step;
    const bool is_whole = first + num_tiles * step <= layout_.width();
    if (is_whole && !layout_.gate_up) {
      std::memcpy(to, row + first, num_tiles * kTileColumns * sizeof(T));
    } else if (is_whole) {
      constexpr int kHalf = kTileColumns / 2;
      const T* gate = row + first;
      const T* up = gate + layout_.width();
      for (int tile = 0; tile < num_tiles; ++tile) {
        std::memcpy(to + tile * kTileColumns, gate + tile * kHalf, kHalf * sizeof(T));
        std::memcpy(to + tile * kTileColumns + kHalf, up + tile * kHalf, kHalf * sizeof(T));
      }
    } else {
      for (int i = 0; i < num_tiles * kTileColumns; ++i) {
        const int64_t column =
            layout_.ColumnOfTileRow(first_tile + i / kTileColumns, i % kTileColumns);
        to[i] = column < 0 ? T{0} : row[column];
      }
    }
  }

  const HostMatrix& m_;
  const WeightLayout& layout_;
  const std::vector<int16_t>& exponents_;
};

// For columns [begin, end) of a bfloat16 matrix the e that brings the largest finite weight to
// [2^14, 2^15), unless 2^-e were subnormal.
void FindExponents(const HostMatrix& matrix, int64_t begin, int64_t end, int16_t* exponents) {
  std::fill(exponents + begin, exponents + end, 0);
  int16_t* largest = exponents;  // magnitudes are ordered as their patterns are
  for (int64_t row = 0; row < matrix.k; ++row) {
    const uint16_t* values = &matrix.values_bf16[row * matrix.n];
    for (int64_t column = begin; column < end; ++column) {
      const auto magnitude = static_cast<int16_t>(values[column] & 0x7FFF);
      const int16_t finite = magnitude < 0x7F80 ? magnitude : int16_t{0};
      largest[column] = std::max(largest[column], finite);
    }
  }
  for (int64_t column = begin; column < end; ++column) {
    if (largest[column] == 0) continue;
    const float weight = formats::Bfloat16ToFloat(static_cast<uint16_t>(largest[column]));
    exponents[column] = static_cast<int16_t>(std::min(14 - std::ilogb(weight), 126));
  }
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

// Of all tiles, with padding.
CodeLineErrors WriteColumnInfos(const HostMatrix& matrix, const WeightLayout& layout,
                                const std::vector<int16_t>& exponents, cpu::ThreadPool* pool,
                                uint8_t* out) {
  std::vector<CodeLineErrors> errors(layout.tiles());
  pool->Run(layout.tiles(), layout.tiles() * kWorkOfTileInfos, [&](int64_t tile, int) {
    for (int row = 0; row < kTileColumns; ++row) {
      const int64_t column = layout.ColumnOfTileRow(tile, row);
      const ColumnInfo info =
          column < 0 ? ColumnInfo{}
                     : MakeColumnInfo(matrix, column, exponents[column], &errors[tile]);
      std::memcpy(out + (tile * kTileColumns + row) * sizeof(info), &info, sizeof(info));
    }
  });
  CodeLineErrors sum;
  for (const CodeLineErrors& of_tile : errors) {
    sum.num_columns += of_tile.num_columns;
    sum.num_bytes += of_tile.num_bytes;
  }
  return sum;
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

CodeLineErrors PackWeights(const HostMatrix& matrix, const WeightLayout& layout, uint8_t* out,
                           cpu::ThreadPool* pool) {
  cpu::ThreadPool caller_alone(1);
  if (pool == nullptr) pool = &caller_alone;
  std::vector<int16_t> exponents(matrix.n);
  if (matrix.format == WeightFormat::kBfloat16) {
    const int64_t num_blocks = (matrix.n + kBlockColumns - 1) / kBlockColumns;
    pool->Run(num_blocks, matrix.k * matrix.n, [&](int64_t block, int) {
      FindExponents(matrix, block * kBlockColumns, std::min(matrix.n, (block + 1) * kBlockColumns),
                    exponents.data());
    });
  }
  const CodeLineErrors errors = WriteColumnInfos(matrix, layout, exponents, pool, out);

  const BlockPacker packer(matrix, layout, exponents);
  std::vector<std::unique_ptr<BlockPacker::Scratch>> scratch;
  for (int thread = 0; thread < pool->num_threads(); ++thread) {
    scratch.push_back(std::make_unique_for_overwrite<BlockPacker::Scratch>());
  }
  uint8_t* records = out + layout.records_offset();
  const int64_t row_blocks = (layout.tiles() + kBlockTiles - 1) / kBlockTiles;
  pool->Run(layout.chunks() * row_blocks, matrix.k * matrix.n, [&](int64_t item, int thread) {
    packer.Pack(item / row_blocks, item % row_blocks * kBlockTiles, records, scratch[thread].get());
  });
  return errors;
}

}  // namespace wintserve::kernels::plan
