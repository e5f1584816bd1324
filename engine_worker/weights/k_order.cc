#include "engine_worker/weights/k_order.h"

#include <fmt/format.h>

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

// Each value less the mean of its 64-group.
std::vector<double> WithinGroups(const std::vector<double>& values) {
  std::vector<double> centred(values.size());
  for (size_t begin = 0; begin < values.size(); begin += formats::kWint2GroupSize) {
    const size_t end = std::min(values.size(), begin + formats::kWint2GroupSize);
    double mean = 0;
    for (size_t i = begin; i < end; ++i) mean += values[i] / static_cast<double>(end - begin);
    for (size_t i = begin; i < end; ++i) centred[i] = values[i] - mean;
  }
  return centred;
}

// Pearson's of what differs within the groups; 0 if either side is constant there.
double Correlation(const std::vector<double>& a, const std::vector<double>& b) {
  const std::vector<double> x = WithinGroups(a), y = WithinGroups(b);
  double xx = 0, yy = 0, xy = 0, aa = 0, bb = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    xx += x[i] * x[i];
    yy += y[i] * y[i];
    xy += x[i] * y[i];
    aa += a[i] * a[i];
    bb += b[i] * b[i];
  }
  // Of constants only the rounding of their means is left, which must not pass for a deviation.
  constexpr double kRounding = 1e-9;
  const auto is_constant = [](double sum, double whole) {
    return sum <= kRounding * kRounding * whole;
  };
  return is_constant(xx, aa) || is_constant(yy, bb) ? 0 : xy / std::sqrt(xx * yy);
}

// Of the rows of a float32 matrix.
std::vector<double> RowLogNorms(const HostMatrix& matrix) {
  std::vector<double> norms(matrix.k);
  for (int64_t row = 0; row < matrix.k; ++row) {
    double sum = 0;
    for (int64_t column = 0; column < matrix.n; ++column) {
      const double weight = matrix.values_f32[row * matrix.n + column];
      sum += weight * weight;
    }
    norms[row] = std::log(std::sqrt(sum) + kSmallestNorm);
  }
  return norms;
}

void Add(const std::vector<double>& known, const std::vector<double>& stored,
         KOrderCorrelations& sums) {
  sums.mma64 += Correlation(known, InTrueOrder(stored, KOrder::kMma64));
  sums.natural += Correlation(known, InTrueOrder(stored, KOrder::kNatural));
  sums.num_values += static_cast<int64_t>(known.size());
}

// Whether a check says more than chance does.
bool IsSignificant(const KOrderCorrelations& check) {
  constexpr double kDeviations = 4;
  return std::fabs(check.LeadOfNatural()) > kDeviations;
}

}  // namespace

double KOrderCorrelations::LeadOfNatural() const {
  return (std::fabs(natural) - std::fabs(mma64)) * std::sqrt(static_cast<double>(num_values));
}

KOrder KOrderEvidence::Decide() const {
  for (const KOrderCorrelations* check : {&neurons, &hidden}) {
    if (!IsSignificant(*check)) continue;
    return check->LeadOfNatural() > 0 ? KOrder::kNatural : KOrder::kMma64;
  }
  return KOrder::kMma64;
}

bool KOrderEvidence::is_conclusive() const {
  return IsSignificant(neurons) || IsSignificant(hidden);
}

bool KOrderEvidence::contradicts_itself() const {
  return IsSignificant(neurons) && IsSignificant(hidden) &&
         (neurons.LeadOfNatural() > 0) != (hidden.LeadOfNatural() > 0);
}

std::string KOrderEvidence::Describe() const {
  return fmt::format(
      "{}{} (norms of neurons correlate {:.3f} as mma64, {:.3f} as natural, those of hidden "
      "dimensions {:.3f} and {:.3f}; {} experts of {} layers)",
      Decide() == KOrder::kMma64 ? "mma64" : "natural", is_conclusive() ? "" : " by default",
      neurons.mma64, neurons.natural, hidden.mma64, hidden.natural, num_experts, num_layers);
}

void KOrderVote::Layer::AddExpert(const HostMatrix& gate_up, const HostMatrix& down) {
  const int64_t width = down.k;
  CHECK(gate_up.n == 2 * width, "n={} width={}", gate_up.n, width);
  CHECK(gate_up.k == static_cast<int64_t>(row_norms_.size()), "k={}", gate_up.k);
  const std::vector<double> columns =
      ColumnLogNorms(gate_up, std::min(gate_up.k, kMaxSampledWeights) / 4);
  std::vector<double> neurons(width);
  for (int64_t i = 0; i < width; ++i) neurons[i] = columns[i] + columns[width + i];
  Add(neurons, StoredRowLogNorms(down, std::min(down.n, kMaxSampledWeights)), neurons_);
  const std::vector<double> rows =
      StoredRowLogNorms(gate_up, std::min(gate_up.n, kMaxSampledWeights));
  for (size_t i = 0; i < rows.size(); ++i) row_norms_[i] += rows[i];
  ++num_experts_;
}

KOrderVote::Layer KOrderVote::BeginLayer(const HostMatrix& router) const {
  Layer layer;
  layer.router_norms_ = RowLogNorms(router);
  layer.row_norms_.resize(router.k);
  return layer;
}

void KOrderVote::EndLayer(const Layer& layer) {
  if (layer.num_experts_ == 0) return;
  Add(layer.router_norms_, layer.row_norms_, sums_.hidden);
  sums_.neurons.mma64 += layer.neurons_.mma64;
  sums_.neurons.natural += layer.neurons_.natural;
  sums_.neurons.num_values += layer.neurons_.num_values;
  sums_.num_experts += layer.num_experts_;
  ++sums_.num_layers;
}

KOrderEvidence KOrderVote::evidence() const {
  KOrderEvidence means = sums_;
  if (means.num_experts == 0) return means;
  means.neurons.mma64 /= means.num_experts;
  means.neurons.natural /= means.num_experts;
  means.hidden.mma64 /= means.num_layers;
  means.hidden.natural /= means.num_layers;
  return means;
}

}  // namespace wintserve
