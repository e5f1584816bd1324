// Weights to encode, and what the results are held against.
#pragma once

#include <cmath>
#include <cstdint>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include "kernels/formats/bf16.h"
#include "kernels/formats/matrix.h"
#include "tools/quantizer/encode/encode.h"

namespace wintserve::quantizer {

struct Weights {
  int64_t k = 0;
  int64_t n = 0;
  std::vector<float> values;

  Weights(int64_t rows, int64_t columns) : k(rows), n(columns), values(rows * columns) {}
  FloatMatrix view() const { return {values.data(), k, n}; }
  float& At(int64_t row, int64_t column) { return values[row * n + column]; }
};

// bf16 values; each column has a deviation of its own, as in a model. draw(rng): a standard number.
template <typename Draw>
Weights RandomWeights(int64_t k, int64_t n, unsigned seed, Draw draw) {
  std::mt19937 rng(seed);
  std::uniform_real_distribution<float> factor(0.7f, 1.3f);
  std::vector<float> deviations(n);
  for (float& deviation : deviations) deviation = 0.02f * factor(rng);
  Weights w(k, n);
  for (int64_t i = 0; i < k * n; ++i) {
    w.values[i] = formats::RoundToBfloat16(draw(rng) * deviations[i % n]);
  }
  return w;
}

inline Weights NormalWeights(int64_t k, int64_t n, unsigned seed) {
  return RandomWeights(k, n, seed, std::normal_distribution<float>());
}

// mixed_weights of tests/golden/make_quantizer_golden.py.
inline Weights MixedWeights(int64_t k, int64_t n) {
  Weights w(k, n);
  for (int64_t i = 0; i < k * n; ++i) {
    uint64_t z = static_cast<uint64_t>(i + 1) * 0x9E3779B97F4A7C15;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
    z = z ^ (z >> 31);
    const float uniform = static_cast<float>(z >> 40) * 0x1p-24f - 0.5f;
    const float factor = static_cast<float>(1 + i % n % 7) * 0x1p-5f;
    w.values[i] = formats::RoundToBfloat16(uniform * factor);
  }
  return w;
}

// Sum importance (W - W')^2 of one column, or with `decoded` of zeros what the column is worth.
inline double ColumnError(const Weights& w, const std::vector<float>& decoded, int64_t column,
                          const std::vector<float>& importance = {}) {
  double error = 0;
  for (int64_t row = 0; row < w.k; ++row) {
    const double h = importance.empty() ? 1.0 : importance[row];
    const int64_t i = row * w.n + column;
    error += h * std::pow(double{w.values[i]} - decoded[i], 2);
  }
  return error;
}

// Sum (W - W')^2 / sum W^2.
inline double NormalizedError(const Weights& w, const formats::HostMatrix& matrix) {
  const std::vector<float> decoded = formats::DecodeToFloat(matrix);
  const std::vector<float> zeros(decoded.size());
  double error = 0;
  double norm = 0;
  for (int64_t column = 0; column < w.n; ++column) {
    error += ColumnError(w, decoded, column);
    norm += ColumnError(w, zeros, column);
  }
  return error / norm;
}

inline nlohmann::json ReadGolden(const char* section) {
  std::ifstream stream("tests/golden/quantizer.json");
  return nlohmann::json::parse(stream)[section];
}

inline std::vector<uint8_t> FromHex(const std::string& hex) {
  std::vector<uint8_t> bytes;
  for (size_t i = 0; i < hex.size(); i += 2) {
    bytes.push_back(static_cast<uint8_t>(std::stoi(hex.substr(i, 2), nullptr, 16)));
  }
  return bytes;
}

inline std::vector<float> FromBfloat16Hex(const std::string& hex) {
  const std::vector<uint8_t> bytes = FromHex(hex);
  std::vector<float> values;
  for (size_t i = 0; i < bytes.size(); i += 2) {
    values.push_back(formats::Bfloat16ToFloat(static_cast<uint16_t>(bytes[i] | bytes[i + 1] << 8)));
  }
  return values;
}

}  // namespace wintserve::quantizer
