#include "tools/quantizer/forward/row_weights.h"

#include "common/check.h"

namespace wintserve::quantizer {

double MeanSquareOfSum(const float* residual, const float* added, int64_t columns) {
  double sum = 0;
  for (int64_t c = 0; c < columns; ++c) {
    const float value = residual[c] + added[c];
    sum += double{value} * value;
  }
  return sum / static_cast<double>(columns);
}

std::vector<float> RowWeights(std::span<const double> mean_squares, double epsilon) {
  CHECK(epsilon > 0, "epsilon={}", epsilon);
  double sum = 0;
  for (const double mean_square : mean_squares) sum += 1 / (mean_square + epsilon);
  const double mean = sum / static_cast<double>(mean_squares.size());
  std::vector<float> weights;
  weights.reserve(mean_squares.size());
  for (const double mean_square : mean_squares) {
    weights.push_back(static_cast<float>(1 / ((mean_square + epsilon) * mean)));
  }
  return weights;
}

}  // namespace wintserve::quantizer
