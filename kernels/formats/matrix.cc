#include "kernels/formats/matrix.h"

#include <algorithm>

#include "common/check.h"
#include "kernels/formats/bf16.h"
#include "kernels/formats/wint2.h"

namespace wintserve::formats {
namespace {

void DecodeChannelCodes(const HostMatrix& matrix, std::vector<float>& weights) {
  for (int64_t row = 0; row < matrix.k; ++row) {
    for (int64_t column = 0; column < matrix.n; ++column) {
      const int64_t i = row * matrix.n + column;
      weights[i] = RoundToBfloat16(matrix.codes_i8[i] * matrix.channel_scale[column]);
    }
  }
}

void DecodeWint2(const HostMatrix& matrix, std::vector<float>& weights) {
  for (int64_t byte_row = 0; byte_row < matrix.k / 4; ++byte_row) {
    const int64_t group = byte_row / (kWint2GroupSize / 4);
    const int first_row = static_cast<int>(byte_row % (kWint2GroupSize / 4)) * 4;
    for (int64_t column = 0; column < matrix.n; ++column) {
      const int32_t code = Wint2Code(matrix.codes_u8[byte_row * matrix.n + column],
                                     matrix.code_scale[column], matrix.code_zp[column]);
      const float scale = RoundToBfloat16(matrix.local_scale[group * matrix.n + column] *
                                          matrix.channel_scale[column]);
      for (int slot = 0; slot < 4; ++slot) {
        const int64_t row =
            group * kWint2GroupSize + Wint2TrueRow(first_row + slot, matrix.k_order);
        weights[row * matrix.n + column] = RoundToBfloat16(Wint2Value(code, slot) * scale);
      }
    }
  }
}

}  // namespace

HostMatrix MakeHostMatrix(WeightFormat format, int64_t k, int64_t n) {
  CHECK(k > 0 && n > 0, "k={} n={}", k, n);
  HostMatrix matrix;
  matrix.format = format;
  matrix.k = k;
  matrix.n = n;
  switch (format) {
    case WeightFormat::kFloat32:
      matrix.values_f32.resize(k * n);
      break;
    case WeightFormat::kBfloat16:
      matrix.values_bf16.resize(k * n);
      break;
    case WeightFormat::kWint8:
    case WeightFormat::kWint4:
      matrix.codes_i8.resize(k * n);
      matrix.channel_scale.resize(n);
      break;
    case WeightFormat::kWint2:
      CHECK(k % kWint2GroupSize == 0, "k={}", k);
      matrix.codes_u8.resize(k / 4 * n);
      matrix.local_scale.resize(k / kWint2GroupSize * n);
      matrix.channel_scale.resize(n);
      matrix.code_scale.resize(n);
      matrix.code_zp.resize(n);
      break;
  }
  return matrix;
}

std::vector<float> DecodeToFloat(const HostMatrix& matrix) {
  std::vector<float> weights(matrix.k * matrix.n);
  switch (matrix.format) {
    case WeightFormat::kFloat32:
      weights = matrix.values_f32;
      break;
    case WeightFormat::kBfloat16:
      std::transform(matrix.values_bf16.begin(), matrix.values_bf16.end(), weights.begin(),
                     Bfloat16ToFloat);
      break;
    case WeightFormat::kWint8:
    case WeightFormat::kWint4:
      DecodeChannelCodes(matrix, weights);
      break;
    case WeightFormat::kWint2:
      DecodeWint2(matrix, weights);
      break;
  }
  return weights;
}

}  // namespace wintserve::formats
