#include "kernels/formats/wint8.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "common/check.h"
#include "kernels/formats/byte_transpose.h"

namespace wintserve::formats {
namespace {

constexpr int kTileRows = 64;
constexpr int64_t kBlockColumns = 64;

// Row inside a 64-row tile of the byte at a position of one column's 64 bytes.
constexpr std::array<uint8_t, kTileRows> MakeRowOfPosition() {
  std::array<uint8_t, kTileRows> rows{};
  for (int row = 0; row < kTileRows; ++row) rows[Wint8ByteIndex(kTileRows, row, 0)] = row;
  return rows;
}
constexpr std::array<uint8_t, kTileRows> kRowOfPosition = MakeRowOfPosition();

}  // namespace

void UnpackWint8(const Wint8Tensors& stored, const MatrixSlice& slice, int64_t first_column,
                 HostMatrix& matrix) {
  CHECK(matrix.format == WeightFormat::kWint8 && matrix.k == slice.num_rows());
  std::copy_n(stored.channel_scale + slice.n_begin, slice.num_columns(),
              matrix.channel_scale.begin() + first_column);
  // By way of a block in the L1 cache: rows of the matrix are far apart and evict each other.
  std::array<std::array<int8_t, kBlockColumns>, kTileRows> block;
  for (int64_t first = slice.n_begin; first < slice.n_end; first += kBlockColumns) {
    const int64_t num_columns = std::min(kBlockColumns, slice.n_end - first);
    for (int64_t tile = slice.k_begin / kTileRows; tile * kTileRows < slice.k_end; ++tile) {
      const int64_t first_row = std::max(slice.k_begin, tile * kTileRows);
      const int64_t end_row = std::min(slice.k_end, (tile + 1) * kTileRows);
      for (int64_t i = 0; i < num_columns; i += 8) {
        for (int position = 0; position < kTileRows; position += 8) {
          std::array<uint64_t, 8> words{};
          for (int64_t j = 0; j < std::min<int64_t>(8, num_columns - i); ++j) {
            const int64_t column = first + i + j;
            const uint8_t* source =
                stored.codes + Wint8ByteIndex(stored.k, tile * kTileRows, column);
            words[j] = LoadWord(source + position) ^ 0x8080808080808080;
          }
          TransposeBytes(&words);
          for (int j = 0; j < 8; ++j) {
            std::memcpy(&block[kRowOfPosition[position + j]][i], &words[j], sizeof(words[j]));
          }
        }
      }
      for (int64_t row = first_row; row < end_row; ++row) {
        std::memcpy(matrix.codes_i8.data() + (row - slice.k_begin) * matrix.n + first_column +
                        first - slice.n_begin,
                    block[row % kTileRows].data(), num_columns);
      }
    }
  }
}

std::vector<uint8_t> PackWint8(const HostMatrix& matrix) {
  CHECK(matrix.format == WeightFormat::kWint8 && matrix.k % 64 == 0 && matrix.n % 2 == 0);
  std::vector<uint8_t> bytes(matrix.k * matrix.n);
  for (int64_t row = 0; row < matrix.k; ++row) {
    for (int64_t column = 0; column < matrix.n; ++column) {
      bytes[Wint8ByteIndex(matrix.k, row, column)] =
          static_cast<uint8_t>(matrix.codes_i8[row * matrix.n + column] + 128);
    }
  }
  return bytes;
}

}  // namespace wintserve::formats
