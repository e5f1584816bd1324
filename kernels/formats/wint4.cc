#include "kernels/formats/wint4.h"

#include <cstring>

#include "common/check.h"
#include "kernels/formats/tile_unpack.h"

namespace wintserve::formats {
namespace {

constexpr auto kRowOfPosition = RowsOfPositions(Wint4NibbleIndex);

// Eight codes, one a byte, from eight nibbles.
uint64_t CodesOfNibbles(const uint8_t* bytes) {
  uint32_t nibbles;
  std::memcpy(&nibbles, bytes, sizeof(nibbles));
  uint64_t word = nibbles;
  word = (word | word << 16) & 0x0000FFFF0000FFFF;
  word = (word | word << 8) & 0x00FF00FF00FF00FF;
  word = (word | word << 4) & 0x0F0F0F0F0F0F0F0F;
  // Less 8: the highest bit flipped, the sign extended.
  word ^= 0x0808080808080808;
  return word | (word & 0x0808080808080808) * 30;
}

}  // namespace

void UnpackWint4(const Wint4Tensors& stored, const MatrixSlice& slice, int64_t first_column,
                 HostMatrix& matrix) {
  CHECK(matrix.format == WeightFormat::kWint4);
  const auto codes = [&stored](int64_t row, int64_t column, int position) {
    return CodesOfNibbles(stored.codes + (Wint4NibbleIndex(stored.k, row, column) + position) / 2);
  };
  UnpackTiles(stored.channel_scale, slice, first_column, kRowOfPosition, codes, matrix);
}

std::vector<uint8_t> PackWint4(const HostMatrix& matrix) {
  CHECK(matrix.format == WeightFormat::kWint4 && matrix.k % 64 == 0 && matrix.n % 4 == 0);
  std::vector<uint8_t> bytes(matrix.k * matrix.n / 2);
  for (int64_t row = 0; row < matrix.k; ++row) {
    for (int64_t column = 0; column < matrix.n; ++column) {
      const int64_t nibble = Wint4NibbleIndex(matrix.k, row, column);
      const int code = matrix.codes_i8[row * matrix.n + column] + 8;
      bytes[nibble / 2] |= static_cast<uint8_t>(code << (nibble % 2 * 4));
    }
  }
  return bytes;
}

}  // namespace wintserve::formats
