#include "kernels/formats/wint2.h"

#include <algorithm>

#include "common/check.h"

namespace wintserve::formats {

void UnpackWint2(const Wint2Tensors& stored, const MatrixSlice& slice, int64_t first_column,
                 HostMatrix& matrix) {
  CHECK(matrix.format == WeightFormat::kWint2 && matrix.k == slice.num_rows());
  CHECK(slice.k_begin % kWint2GroupSize == 0 && slice.k_end % kWint2GroupSize == 0);
  const int64_t num_columns = slice.num_columns();
  std::copy_n(stored.super_scale + slice.n_begin, num_columns,
              matrix.channel_scale.begin() + first_column);
  std::copy_n(stored.code_scale + slice.n_begin, num_columns,
              matrix.code_scale.begin() + first_column);
  std::copy_n(stored.code_zp + slice.n_begin, num_columns, matrix.code_zp.begin() + first_column);
  for (int64_t row = 0; row < slice.num_rows() / 4; ++row) {
    std::copy_n(stored.codes + (slice.k_begin / 4 + row) * stored.n + slice.n_begin, num_columns,
                matrix.codes_u8.begin() + row * matrix.n + first_column);
  }
  // The nibble goes by the group's index in the stored tensor, wherever the slice begins.
  const int64_t first_group = slice.k_begin / kWint2GroupSize;
  for (int64_t group = 0; group < slice.num_rows() / kWint2GroupSize; ++group) {
    const int64_t stored_group = first_group + group;
    const int shift = stored_group % 2 == 0 ? 4 : 0;
    const uint8_t* source = stored.local_scale + stored_group / 2 * stored.n + slice.n_begin;
    uint8_t* target = matrix.local_scale.data() + group * matrix.n + first_column;
    for (int64_t column = 0; column < num_columns; ++column) {
      target[column] = (source[column] >> shift) & 15;
    }
  }
}

std::vector<uint8_t> PackWint2LocalScale(const HostMatrix& matrix) {
  CHECK(matrix.format == WeightFormat::kWint2 && matrix.k % (2 * kWint2GroupSize) == 0);
  const int64_t num_pairs = matrix.k / (2 * kWint2GroupSize);
  std::vector<uint8_t> bytes(num_pairs * matrix.n);
  for (int64_t pair = 0; pair < num_pairs; ++pair) {
    const uint8_t* even = matrix.local_scale.data() + 2 * pair * matrix.n;
    const uint8_t* odd = even + matrix.n;
    for (int64_t column = 0; column < matrix.n; ++column) {
      bytes[pair * matrix.n + column] = static_cast<uint8_t>(even[column] << 4 | odd[column]);
    }
  }
  return bytes;
}

}  // namespace wintserve::formats
