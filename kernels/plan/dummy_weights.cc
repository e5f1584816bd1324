#include "kernels/plan/dummy_weights.h"

#include <cmath>

#include "common/check.h"
#include "kernels/plan/code_line.h"

namespace wintserve::kernels::plan {
namespace {

using formats::DummyMatrix;
using formats::HostMatrix;
using formats::WeightFormat;

// Root mean squares of what the hash draws.
constexpr double kFactorRms = 1.0408;      // uniform in 0.5 … 1.5
constexpr double kLocalScaleRms = 9.0921;  // 1 … 15
constexpr double kWint2Rms = 18.48;        // -32 … 31
constexpr double kWint4Rms = 4.3205;       // -7 … 7
constexpr double kWint8Rms = 73.612;       // -127 … 127

double UnitOf(WeightFormat format, double deviation) {
  switch (format) {
    case WeightFormat::kWint2:
      return deviation / (kWint2Rms * kLocalScaleRms * kFactorRms);
    case WeightFormat::kWint4:
      return deviation / (kWint4Rms * kFactorRms);
    case WeightFormat::kWint8:
      return deviation / (kWint8Rms * kFactorRms);
    default:
      return deviation * std::sqrt(3.0);
  }
}

DummyCodeMaps FindCodeMaps() {
  DummyCodeMaps found;
  uint64_t counter = 0;
  for (DummyCodeMap& map : found.maps) {
    CodeLine line;
    do {
      const uint64_t bits = HashOfCounter(/*seed=*/0, counter++);
      const auto slope = static_cast<float>(bits >> 48) * 0x1p-16f;
      const auto shift = static_cast<float>((bits >> 32) & 0xFFFF) * 0x1p-16f;
      map.code_scale = 110.0f + 18.0f * slope;
      map.code_zp = shift * (32767.0f - 255.0f * map.code_scale);
      line = FindCodeLine(map.code_scale, map.code_zp);
    } while (line.num_wrong_bytes > 0);
    map.multiplier = line.multiplier;
    map.offset = line.offset;
  }
  return found;
}

}  // namespace

const DummyCodeMaps& SharedDummyCodeMaps() {
  static const DummyCodeMaps maps = FindCodeMaps();
  return maps;
}

DummyWeights::DummyWeights(const DummyMatrix& matrix)
    : m_(matrix),
      value_seed_(HashOfCounter(matrix.seed, 0)),
      local_scale_seed_(HashOfCounter(matrix.seed, 1)),
      column_seed_(HashOfCounter(matrix.seed, 2)),
      unit_(static_cast<float>(UnitOf(matrix.format, matrix.deviation))) {
  int64_t num_columns = 0;
  for (int i = 0; i < m_.num_ranges; ++i) num_columns += m_.ranges[i].count;
  CHECK(m_.k > 0 && m_.n > 0 && num_columns == m_.n, "k={} n={} columns={}", m_.k, m_.n,
        num_columns);
  CHECK(m_.format != WeightFormat::kWint2 || (m_.k | m_.first_row) % kGroupRows == 0,
        "k={} first_row={}", m_.k, m_.first_row);
}

HostMatrix MakeDummyHostMatrix(const DummyMatrix& matrix) {
  const DummyWeights weights(matrix);
  HostMatrix m = formats::MakeHostMatrix(matrix.format, matrix.k, matrix.n);
  const auto fill = [&](auto& values, int64_t rows, const auto& value_at) {
    if (values.empty()) return;
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t column = 0; column < m.n; ++column) {
        values[row * m.n + column] = value_at(row, column);
      }
    }
  };
  fill(m.values_f32, m.k, [&](int64_t r, int64_t c) { return weights.Float32(r, c); });
  fill(m.values_bf16, m.k, [&](int64_t r, int64_t c) { return weights.Bfloat16(r, c); });
  fill(m.codes_i8, m.k,
       [&](int64_t r, int64_t c) { return static_cast<int8_t>(weights.Code(r, c)); });
  fill(m.codes_u8, m.k / 4, [&](int64_t r, int64_t c) { return weights.Byte(r, c); });
  fill(m.local_scale, m.k / kGroupRows,
       [&](int64_t r, int64_t c) { return weights.LocalScale(r, c); });
  fill(m.channel_scale, 1, [&](int64_t, int64_t c) { return weights.Scale(c); });
  const DummyCodeMaps& maps = SharedDummyCodeMaps();
  fill(m.code_scale, 1,
       [&](int64_t, int64_t c) { return maps.maps[weights.CodeMap(c)].code_scale; });
  fill(m.code_zp, 1, [&](int64_t, int64_t c) { return maps.maps[weights.CodeMap(c)].code_zp; });
  return m;
}

WeightLayout LayOutDummyWeights(const DummyMatrix& matrix, bool gate_up) {
  CHECK(matrix.format != WeightFormat::kFloat32);
  CHECK(!gate_up || matrix.n % 2 == 0, "n={}", matrix.n);
  WeightLayout layout;
  layout.format = matrix.format;
  layout.gate_up = gate_up;
  layout.k = matrix.k;
  layout.n = matrix.n;
  return layout;
}

}  // namespace wintserve::kernels::plan
