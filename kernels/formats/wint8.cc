#include "kernels/formats/wint8.h"

#include <algorithm>
#include <array>

#include "common/check.h"

namespace wintserve::formats {
namespace {

constexpr int kTileRows = 64;

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
  for (int64_t tile = slice.k_begin / kTileRows; tile * kTileRows < slice.k_end; ++tile) {
    for (int64_t column = slice.n_begin; column < slice.n_end; ++column) {
      const uint8_t* source = stored.codes + Wint8ByteIndex(stored.k, tile * kTileRows, column);
      int8_t* target = matrix.codes_i8.data() + first_column + column - slice.n_begin;
      for (int position = 0; position < kTileRows; ++position) {
        const int64_t row = tile * kTileRows + kRowOfPosition[position];
        if (row < slice.k_begin || row >= slice.k_end) continue;
        target[(row - slice.k_begin) * matrix.n] = static_cast<int8_t>(source[position] - 128);
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
