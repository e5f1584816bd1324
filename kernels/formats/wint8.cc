#include "kernels/formats/wint8.h"

#include "common/check.h"
#include "kernels/formats/tile_unpack.h"

namespace wintserve::formats {
namespace {

constexpr auto kRowOfPosition = RowsOfPositions(Wint8ByteIndex);

}  // namespace

void UnpackWint8(const Wint8Tensors& stored, const MatrixSlice& slice, int64_t first_column,
                 HostMatrix& matrix) {
  CHECK(matrix.format == WeightFormat::kWint8);
  const auto codes = [&stored](int64_t row, int64_t column, int position) {
    return LoadWord(stored.codes + Wint8ByteIndex(stored.k, row, column) + position) ^
           0x8080808080808080;
  };
  UnpackTiles(stored.channel_scale, slice, first_column, kRowOfPosition, codes, matrix);
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
