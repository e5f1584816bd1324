// The way from the 64-row tiles in which WINT4 and WINT8 codes are stored to rows of a matrix.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>

#include "common/check.h"
#include "kernels/formats/byte_transpose.h"
#include "kernels/formats/matrix.h"

namespace wintserve::formats {

inline constexpr int kStoredTileRows = 64;

// Row inside a tile of the code at each position of one of its columns. index(k, row, column): of a
// code in a tensor of k rows.
template <typename Index>
constexpr std::array<uint8_t, kStoredTileRows> RowsOfPositions(const Index& index) {
  std::array<uint8_t, kStoredTileRows> rows{};
  for (int row = 0; row < kStoredTileRows; ++row) rows[index(kStoredTileRows, row, 0)] = row;
  return rows;
}

// Fills codes_i8 and channel_scale of matrix' columns from first_column on with `slice` of a stored
// tensor. codes(row, column, position): the 8 codes, one a byte, at positions position … position +
// 7 of the column's tile that begins at `row`.
template <typename Codes>
void UnpackTiles(const float* channel_scale, const MatrixSlice& slice, int64_t first_column,
                 const std::array<uint8_t, kStoredTileRows>& row_of_position, const Codes& codes,
                 HostMatrix& matrix) {
  constexpr int64_t kBlockColumns = 64;
  CHECK(matrix.k == slice.num_rows());
  std::copy_n(channel_scale + slice.n_begin, slice.num_columns(),
              matrix.channel_scale.begin() + first_column);
  // By way of a block in the L1 cache: rows of the matrix are far apart and evict each other.
  std::array<std::array<int8_t, kBlockColumns>, kStoredTileRows> block;
  for (int64_t first = slice.n_begin; first < slice.n_end; first += kBlockColumns) {
    const int64_t num_columns = std::min(kBlockColumns, slice.n_end - first);
    const int64_t begin_tile = slice.k_begin / kStoredTileRows * kStoredTileRows;
    for (int64_t tile_row = begin_tile; tile_row < slice.k_end; tile_row += kStoredTileRows) {
      for (int64_t i = 0; i < num_columns; i += 8) {
        for (int position = 0; position < kStoredTileRows; position += 8) {
          std::array<uint64_t, 8> words{};
          for (int64_t j = 0; j < std::min<int64_t>(8, num_columns - i); ++j) {
            words[j] = codes(tile_row, first + i + j, position);
          }
          TransposeBytes(&words);
          for (int j = 0; j < 8; ++j) {
            std::memcpy(&block[row_of_position[position + j]][i], &words[j], sizeof(words[j]));
          }
        }
      }
      const int64_t end_row = std::min(slice.k_end, tile_row + kStoredTileRows);
      for (int64_t row = std::max(slice.k_begin, tile_row); row < end_row; ++row) {
        std::memcpy(matrix.codes_i8.data() + (row - slice.k_begin) * matrix.n + first_column +
                        first - slice.n_begin,
                    block[row - tile_row].data(), num_columns);
      }
    }
  }
}

}  // namespace wintserve::formats
