#include "tools/quantizer/output/weight_error.h"

#include <algorithm>
#include <array>
#include <map>
#include <utility>
#include <vector>

#include "common/check.h"
#include "kernels/formats/bf16.h"
#include "kernels/formats/wint2.h"

namespace wintserve::quantizer {
namespace {

using formats::HostMatrix;
using formats::RoundToBfloat16;
using formats::WeightFormat;

constexpr int64_t kBlockRows = formats::kWint2GroupSize;

// The 256 codewords of every code map of a matrix; few columns differ in theirs.
class Codewords {
 public:
  explicit Codewords(const HostMatrix& matrix) : table_of_column_(matrix.n) {
    std::map<std::pair<float, float>, int> tables;
    for (int64_t column = 0; column < matrix.n; ++column) {
      const std::pair map = {matrix.code_scale[column], matrix.code_zp[column]};
      const auto [it, is_new] = tables.emplace(map, static_cast<int>(tables_.size()));
      table_of_column_[column] = it->second;
      if (is_new) tables_.push_back(Decode(map.first, map.second));
    }
  }
  const std::array<int8_t, 4>& Of(int64_t column, uint8_t byte) const {
    return tables_[table_of_column_[column]][byte];
  }

 private:
  using Table = std::array<std::array<int8_t, 4>, 256>;

  static Table Decode(float code_scale, float code_zp) {
    Table table;
    for (int byte = 0; byte < 256; ++byte) {
      const int32_t code = formats::Wint2Code(static_cast<uint8_t>(byte), code_scale, code_zp);
      for (int slot = 0; slot < 4; ++slot) {
        table[byte][slot] = static_cast<int8_t>(formats::Wint2Value(code, slot));
      }
    }
    return table;
  }

  std::vector<int> table_of_column_;
  std::vector<Table> tables_;
};

// Rows [first_row, first_row + kBlockRows) in true K order, decoded.
class BlockDecoder {
 public:
  explicit BlockDecoder(const HostMatrix& matrix) : matrix_(matrix) {
    if (matrix.format == WeightFormat::kWint2) codewords_.emplace_back(matrix);
  }

  void Decode(int64_t first_row, int64_t num_rows, std::vector<float>* weights) const {
    const int64_t n = matrix_.n;
    weights->resize(num_rows * n);
    if (matrix_.format == WeightFormat::kWint2) return DecodeGroup(first_row, weights);
    for (int64_t i = 0; i < num_rows * n; ++i) {
      const int64_t at = first_row * n + i;
      (*weights)[i] = Weight(at, i % n);
    }
  }

 private:
  float Weight(int64_t at, int64_t column) const {
    switch (matrix_.format) {
      case WeightFormat::kFloat32:
        return matrix_.values_f32[at];
      case WeightFormat::kBfloat16:
        return formats::Bfloat16ToFloat(matrix_.values_bf16[at]);
      default:
        return RoundToBfloat16(matrix_.codes_i8[at] * matrix_.channel_scale[column]);
    }
  }

  void DecodeGroup(int64_t first_row, std::vector<float>* weights) const {
    const int64_t n = matrix_.n;
    const int64_t group = first_row / kBlockRows;
    std::vector<float> scales(n);
    for (int64_t column = 0; column < n; ++column) {
      scales[column] =
          RoundToBfloat16(matrix_.local_scale[group * n + column] * matrix_.channel_scale[column]);
    }
    for (int stored_row = 0; stored_row < kBlockRows; stored_row += 4) {
      const uint8_t* bytes = matrix_.codes_u8.data() + (first_row + stored_row) / 4 * n;
      std::array<float*, 4> rows;
      for (int slot = 0; slot < 4; ++slot) {
        rows[slot] =
            weights->data() + formats::Wint2TrueRow(stored_row + slot, matrix_.k_order) * n;
      }
      for (int64_t column = 0; column < n; ++column) {
        const std::array<int8_t, 4>& word = codewords_.front().Of(column, bytes[column]);
        for (int slot = 0; slot < 4; ++slot) {
          rows[slot][column] = RoundToBfloat16(word[slot] * scales[column]);
        }
      }
    }
  }

  const HostMatrix& matrix_;
  std::vector<Codewords> codewords_;  // one or none
};

}  // namespace

WeightError MeasureWeightError(const HostMatrix& source, const HostMatrix& quantized,
                               kernels::cpu::ThreadPool& pool) {
  CHECK(source.k == quantized.k && source.n == quantized.n, "k={} n={}", source.k, source.n);
  const BlockDecoder before(source);
  const BlockDecoder after(quantized);
  const int64_t num_blocks = (source.k + kBlockRows - 1) / kBlockRows;
  std::vector<WeightError> sums(num_blocks);
  std::vector<std::vector<float>> weights(pool.num_threads());
  std::vector<std::vector<float>> decoded(pool.num_threads());
  pool.Run(num_blocks, source.k * source.n, [&](int64_t block, int thread) {
    const int64_t first_row = block * kBlockRows;
    const int64_t num_rows = std::min(kBlockRows, source.k - first_row);
    before.Decode(first_row, num_rows, &weights[thread]);
    after.Decode(first_row, num_rows, &decoded[thread]);
    WeightError& sum = sums[block];
    for (size_t i = 0; i < weights[thread].size(); ++i) {
      const double weight = weights[thread][i];
      const double difference = weight - decoded[thread][i];
      sum.error += difference * difference;
      sum.norm += weight * weight;
    }
  });
  WeightError total;
  for (const WeightError& sum : sums) total.Add(sum);
  return total;
}

}  // namespace wintserve::quantizer
