// The canonical host form of a weight matrix: what the checkpoint's layouts are unpacked to, what
// tensor parallelism slices, and what a backend repacks into its own layout. One matrix at a time
// exists in this form; it is not how weights are kept.
#pragma once

#include <cstdint>
#include <vector>

namespace wintserve::formats {

enum class WeightFormat { kFloat32, kBfloat16, kWint8, kWint4, kWint2 };

inline constexpr int kWint2GroupSize = 64;

// Order of the K rows inside each 64-row group of a WINT2 tensor.
enum class KOrder { kNatural, kMma64 };

// W [k, n]: k input features, n output features, y[n] = sum_k x[k] * W[k][n].
// All arrays are row-major with n contiguous. Which arrays are filled depends on `format`:
//
//   kFloat32   values_f32 [k, n]
//   kBfloat16  values_bf16 [k, n] (bit patterns)
//   kWint8     codes_i8 [k, n] in -128..127; channel_scale [n]
//   kWint4     codes_i8 [k, n] in -8..7, one code a byte; channel_scale [n]
//   kWint2     codes_u8 [k / 4, n]; local_scale [k / 64, n] in 0..15, one a byte;
//              channel_scale [n] (super_scales); code_scale, code_zp [n]; k_order
//
// channel_scale values are exactly representable in bf16.
// Decoded weights (b = bf16 rounding, nearest even):
//   wint8, wint4: b(q * channel_scale[n]);   wint2: b(q * b(local_scale * channel_scale[n]))
struct HostMatrix {
  WeightFormat format = WeightFormat::kFloat32;
  int64_t k = 0;
  int64_t n = 0;
  std::vector<float> values_f32;
  std::vector<uint16_t> values_bf16;
  std::vector<int8_t> codes_i8;
  std::vector<uint8_t> codes_u8;
  std::vector<uint8_t> local_scale;
  std::vector<float> channel_scale;
  std::vector<float> code_scale;
  std::vector<float> code_zp;
  KOrder k_order = KOrder::kMma64;
};

// A matrix of zeros, every array of `format` sized.
// REQUIRES: k, n > 0; kWint2: k is a multiple of kWint2GroupSize.
HostMatrix MakeHostMatrix(WeightFormat format, int64_t k, int64_t n);

// A rectangle of a stored matrix: rows [k_begin, k_end), columns [n_begin, n_end).
struct MatrixSlice {
  int64_t k_begin = 0;
  int64_t k_end = 0;
  int64_t n_begin = 0;
  int64_t n_end = 0;

  int64_t num_rows() const { return k_end - k_begin; }
  int64_t num_columns() const { return n_end - n_begin; }
};

// The decoded weights [k, n], rows in true K order: the scalar reference of every backend.
std::vector<float> DecodeToFloat(const HostMatrix& matrix);

}  // namespace wintserve::formats
