// Inputs of the products' tests on the emulated device, and how the products see them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "kernels/plan/float16.h"

namespace wintserve::kernels::cuda {

inline std::vector<float> RandomRows(int64_t count, std::mt19937* rng) {
  std::normal_distribution<float> normal(0.3f, 1.0f);  // a mean, which the corrections take back
  std::vector<float> values(count);
  for (float& value : values) value = normal(*rng);
  return values;
}

// A row as the products see it: values of a binary16 under the row's power of two.
inline std::vector<double> RoundRow(const float* x, int64_t k) {
  float largest = 0;
  for (int64_t i = 0; i < k; ++i) largest = std::max(largest, std::fabs(x[i]));
  const int exponent = largest > 0 ? std::min(12 - std::ilogb(largest), 126) : 0;
  std::vector<double> row(k);
  for (int64_t i = 0; i < k; ++i) {
    const auto scaled = static_cast<float>(std::ldexp(x[i], exponent));
    row[i] = std::ldexp(plan::Float16ToFloat(plan::FloatToFloat16(scaled)), -exponent);
  }
  return row;
}

}  // namespace wintserve::kernels::cuda
