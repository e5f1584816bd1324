#include "engine_worker/weights/k_order.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/check.h"
#include "kernels/formats/wint2.h"

namespace wintserve {
namespace {

using formats::HostMatrix;
using formats::KOrder;

// A norm over this many weights is within 2 % (one in sqrt(2 * 1024)): more would only cost time.
constexpr int64_t kMaxSampledWeights = 1024;
constexpr double kSmallestNorm = 1e-12;  // keeps the logarithm of a zero neuron finite

// Squared local scale times squared code, summed over byte rows [0, num_byte_rows) of each column.
std::vector<double> ColumnLogNorms(const HostMatrix& matrix, int64_t num_byte_rows) {
  std::vector<double> sums(matrix.n, 0);
  for (int64_t byte_row = 0; byte_row < num_byte_rows; ++byte_row) {
    const int64_t group = byte_row * 4 / formats::kWint2GroupSize;
    for (int64_t column = 0; column < matrix.n; ++column) {
      const int32_t code = formats::Wint2Code(matrix.codes_u8[byte_row * matrix.n + column],
                                              matrix.code_scale[column], matrix.code_zp[column]);
      const int scale = matrix.local_scale[group * matrix.n + column];
      int square = 0;
      for (int slot = 0; slot < 4; ++slot) {
        const int value = formats::Wint2Value(code, slot);
        square += value * value;
      }
      sums[column] += square * scale * scale;
    }
  }
  for (int64_t column = 0; column < matrix.n; ++column) {
    sums[column] =
        std::log(std::sqrt(sums[column]) * std::fabs(matrix.channel_scale[column]) + kSmallestNorm);
  }
  return sums;
}

// Of each stored row, over the first num_columns columns.
std::vector<double> StoredRowLogNorms(const HostMatrix& matrix, int64_t num_columns) {
  std::vector<double> sums(matrix.k, 0);
  for (int64_t byte_row = 0; byte_row < matrix.k / 4; ++byte_row) {
    const int64_t group = byte_row * 4 / formats::kWint2GroupSize;
    for (int64_t column = 0; column < num_columns; ++column) {
      const int32_t code = formats::Wint2Code(matrix.codes_u8[byte_row * matrix.n + column],
                                              matrix.code_scale[column], matrix.code_zp[column]);
      const double scale = matrix.local_scale[group * matrix.n + column] *
                           static_cast<double>(matrix.channel_scale[column]);
      for (int slot = 0; slot < 4; ++slot) {
        const double weight = formats::Wint2Value(code, slot) * scale;
        sums[byte_row * 4 + slot] += weight * weight;
      }
    }
  }
  for (double& sum : sums) sum = std::log(std::sqrt(sum) + kSmallestNorm);
  return sums;
}

std::vector<double> InTrueOrder(const std::vector<double>& stored, KOrder order) {
  std::vector<double> rows(stored.size());
  for (size_t i = 0; i < stored.size(); ++i) {
    const int row = static_cast<int>(i % formats::kWint2GroupSize);
    rows[i - row + formats::Wint2TrueRow(row, order)] = stored[i];
  }
  return rows;
}

// Pearson's; 0 if either side is constant.
double Correlation(const std::vector<double>& a, const std::vector<double>& b) {
  double mean_a = 0, mean_b = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    mean_a += a[i] / a.size();
    mean_b += b[i] / b.size();
  }
  double aa = 0, bb = 0, ab = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    aa += (a[i] - mean_a) * (a[i] - mean_a);
    bb += (b[i] - mean_b) * (b[i] - mean_b);
    ab += (a[i] - mean_a) * (b[i] - mean_b);
  }
  // Of a constant only the rounding of its mean is left, which must not pass for a deviation.
  constexpr double kRounding = 1e-9;
  const auto is_constant = [&](double sum, double mean) {
    return sum <= kRounding * kRounding * mean * mean * static_cast<double>(a.size());
  };
  return is_constant(aa, mean_a) || is_constant(bb, mean_b) ? 0 : ab / std::sqrt(aa * bb);
}

}  // namespace

void KOrderVote::AddExpert(const HostMatrix& gate_up, const HostMatrix& down) {
  const int64_t width = down.k;
  CHECK(gate_up.n == 2 * width, "n={} width={}", gate_up.n, width);
  const std::vector<double> columns =
      ColumnLogNorms(gate_up, std::min(gate_up.k, kMaxSampledWeights) / 4);
  std::vector<double> neurons(width);
  for (int64_t i = 0; i < width; ++i) neurons[i] = columns[i] + columns[width + i];
  const std::vector<double> rows = StoredRowLogNorms(down, std::min(down.n, kMaxSampledWeights));
  natural_sum_ += Correlation(neurons, InTrueOrder(rows, KOrder::kNatural));
  mma64_sum_ += Correlation(neurons, InTrueOrder(rows, KOrder::kMma64));
  ++num_experts_;
  num_neurons_ += width;
}

double KOrderVote::natural_correlation() const {
  return num_experts_ == 0 ? 0 : natural_sum_ / static_cast<double>(num_experts_);
}

double KOrderVote::mma64_correlation() const {
  return num_experts_ == 0 ? 0 : mma64_sum_ / static_cast<double>(num_experts_);
}

KOrder KOrderVote::Decide() const {
  if (num_experts_ == 0) return KOrder::kMma64;
  // The mean of correlations of unrelated norms deviates from 0 by one in sqrt(neurons).
  const double four_sigma = 4 / std::sqrt(static_cast<double>(num_neurons_));
  const double lead = std::fabs(natural_correlation()) - std::fabs(mma64_correlation());
  return lead > four_sigma ? KOrder::kNatural : KOrder::kMma64;
}

}  // namespace wintserve
