// Random matrices of every format and their weights by definition, for tests of the CUDA layouts.
#pragma once

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "kernels/formats/bf16.h"
#include "kernels/formats/matrix.h"
#include "kernels/formats/wint2.h"
#include "kernels/plan/code_line.h"

namespace wintserve::kernels::plan {

// Weights near 1 / sqrt(k), codes over their whole range.
inline formats::HostMatrix RandomWeights(formats::WeightFormat format, int64_t k, int64_t n,
                                         formats::KOrder k_order, std::mt19937* rng) {
  using formats::WeightFormat;
  formats::HostMatrix m = formats::MakeHostMatrix(format, k, n);
  m.k_order = k_order;
  const auto uniform = [rng](float low, float high) {
    return std::uniform_real_distribution<float>(low, high)(*rng);
  };
  const float size = 1.0f / std::sqrt(static_cast<float>(k));
  const float largest = format == WeightFormat::kWint2   ? 32 * 15
                        : format == WeightFormat::kWint8 ? 128
                                                         : 8;
  for (float& value : m.values_f32) value = uniform(-size, size);
  for (uint16_t& bits : m.values_bf16) bits = formats::FloatToBfloat16(uniform(-size, size));
  const int low = format == WeightFormat::kWint8 ? -128 : -8;
  for (int8_t& code : m.codes_i8) {
    code = static_cast<int8_t>(std::uniform_int_distribution<int>(low, -low - 1)(*rng));
  }
  for (uint8_t& code : m.codes_u8) code = static_cast<uint8_t>((*rng)() >> 24);
  for (uint8_t& scale : m.local_scale) scale = static_cast<uint8_t>((*rng)() >> 28);
  for (float& scale : m.channel_scale) {
    scale = formats::RoundToBfloat16(uniform(0.5f, 2.0f) * size / largest);
  }
  for (int64_t column = 0; column < static_cast<int64_t>(m.code_scale.size()); ++column) {
    m.code_scale[column] = uniform(110.0f, 128.0f);
    m.code_zp[column] = uniform(0.0f, 32767.0f - 255 * m.code_scale[column]);
  }
  return m;
}

// The same, with code maps that an integer line represents exactly. Some columns fall and have
// negative codes.
inline formats::HostMatrix ExactlyPackedMatrix(formats::WeightFormat format, int64_t k, int64_t n,
                                               formats::KOrder k_order, std::mt19937* rng) {
  formats::HostMatrix m = RandomWeights(format, k, n, k_order, rng);
  std::uniform_real_distribution<float> scale(-130.0f, 130.0f);
  std::uniform_real_distribution<float> zp(-9000.0f, 9000.0f);
  for (int64_t column = 0; column < static_cast<int64_t>(m.code_scale.size()); ++column) {
    while (column % 3 == 0 ||
           FindCodeLine(m.code_scale[column], m.code_zp[column]).num_wrong_bytes > 0) {
      m.code_scale[column] = scale(*rng);
      m.code_zp[column] = zp(*rng);
      if (FindCodeLine(m.code_scale[column], m.code_zp[column]).num_wrong_bytes == 0) break;
    }
  }
  return m;
}

// code * scale [k, n] without rounding, rows in true order.
inline std::vector<double> UnroundedWeights(const formats::HostMatrix& m) {
  using formats::WeightFormat;
  std::vector<double> weights(m.k * m.n);
  for (int64_t row = 0; row < m.k; ++row) {
    for (int64_t column = 0; column < m.n; ++column) {
      const int64_t i = row * m.n + column;
      if (m.format == WeightFormat::kFloat32) weights[i] = m.values_f32[i];
      if (m.format == WeightFormat::kBfloat16) {
        weights[i] = formats::Bfloat16ToFloat(m.values_bf16[i]);
      }
      if (m.format == WeightFormat::kWint8 || m.format == WeightFormat::kWint4) {
        weights[i] = double{m.channel_scale[column]} * m.codes_i8[i];
      }
    }
  }
  if (m.format != WeightFormat::kWint2) return weights;
  for (int64_t stored = 0; stored < m.k; ++stored) {
    const int64_t group = stored / formats::kWint2GroupSize;
    const int64_t row =
        group * formats::kWint2GroupSize +
        formats::Wint2TrueRow(static_cast<int>(stored % formats::kWint2GroupSize), m.k_order);
    for (int64_t column = 0; column < m.n; ++column) {
      const int32_t code = formats::Wint2Code(m.codes_u8[stored / 4 * m.n + column],
                                              m.code_scale[column], m.code_zp[column]);
      weights[row * m.n + column] = double{m.channel_scale[column]} *
                                    m.local_scale[group * m.n + column] *
                                    formats::Wint2Value(code, static_cast<int>(stored % 4));
    }
  }
  return weights;
}

}  // namespace wintserve::kernels::plan
