#include "kernels/cuda/matmul/matmul_cuda_test_util.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "common/check.h"
#include "kernels/formats/bf16.h"
#include "kernels/plan/float16.h"
#include "kernels/plan/pack_weights.h"
#include "kernels/plan/random_weights_test_util.h"

namespace wintserve::kernels::cuda {

using formats::HostMatrix;
using formats::WeightFormat;

const Gpu& TheGpu() {
  static const Gpu* gpu = [] {
    auto properties = UseDevice(0);
    CHECK(properties.ok(), "{}", properties.status().ToString());
    InitMatmul();
    auto stream = CreateStream();
    CHECK(stream.ok(), "{}", stream.status().ToString());
    return new Gpu{*std::move(properties), *std::move(stream)};
  }();
  return *gpu;
}

cudaStream_t TheStream() { return TheGpu().stream.get(); }

bool HasWgmma() { return TheGpu().properties.compute_capability() == 90; }

MatmulOptions OptionsFor() {
  const DeviceProperties& gpu = TheGpu().properties;
  return MatmulOptionsFor(gpu.num_multiprocessors, gpu.compute_capability());
}

MatmulOptions OptionsFor(const NamedPlanner& planner) {
  MatmulOptions options = OptionsFor();
  options.planner = planner.planner;
  options.wgmma_planner = planner.wgmma_planner;
  return options;
}

TestMatrix MakeTestMatrix(HostMatrix host, bool gate_up) {
  TestMatrix matrix;
  const auto layout = plan::LayOutWeights(host, gate_up);
  CHECK(layout.ok(), "{}", layout.status().ToString());
  std::vector<uint8_t> bytes(layout->size_bytes());
  CHECK(plan::PackWeights(host, *layout, bytes.data()).num_bytes == 0);
  matrix.bytes = DeviceArray<uint8_t>(bytes);
  matrix.device = {*layout, matrix.bytes.data()};
  matrix.weights = plan::UnroundedWeights(host);
  matrix.rounded = formats::DecodeToFloat(host);
  matrix.units.resize(host.k * host.n);
  for (int64_t k = 0; k < host.k && !host.channel_scale.empty(); ++k) {
    for (int64_t c = 0; c < host.n; ++c) {
      const float local = host.format == WeightFormat::kWint2
                              ? static_cast<float>(host.local_scale[k / 64 * host.n + c])
                              : 1.0f;
      matrix.units[k * host.n + c] = local * host.channel_scale[c];
    }
  }
  matrix.host = std::move(host);
  return matrix;
}

std::vector<float> RandomRows(int64_t count, std::mt19937* rng) {
  std::normal_distribution<float> normal(0.2f, 1.0f);
  std::vector<float> values(count);
  for (float& value : values) value = normal(*rng);
  return values;
}

std::vector<double> RoundToFloat16Rows(const std::vector<float>& x, int64_t k) {
  std::vector<double> rounded(x.size());
  for (size_t first = 0; first < x.size(); first += k) {
    float largest = 0;
    for (int64_t i = 0; i < k; ++i) largest = std::max(largest, std::fabs(x[first + i]));
    const int exponent = largest > 0 ? std::min(12 - std::ilogb(largest), 126) : 0;
    const float scale = std::ldexp(1.0f, exponent);
    const double inverse_scale = std::ldexp(1.0, -exponent);
    for (int64_t i = 0; i < k; ++i) {
      rounded[first + i] =
          inverse_scale * plan::Float16ToFloat(plan::FloatToFloat16(x[first + i] * scale));
    }
  }
  return rounded;
}

std::vector<float> RoundToBfloat16Rows(std::vector<float> x) {
  for (float& value : x) value = formats::RoundToBfloat16(value);
  return x;
}

Reference ReferenceProduct(const ReferenceTokens& tokens, const DeviceArray<double>& x,
                           const DeviceArray<double>& w, const DeviceArray<float>& units, int64_t k,
                           int64_t n) {
  DeviceArray<double> y(tokens.num_tokens * n);
  DeviceArray<double> magnitudes(tokens.num_tokens * n);
  DeviceArray<double> unit_magnitudes(tokens.num_tokens * n);
  LaunchReferenceProduct(tokens, static_cast<int>(k), static_cast<int>(n), x.data(), w.data(),
                         units.data(), y.data(), magnitudes.data(), unit_magnitudes.data(),
                         TheStream());
  return {y.Download(TheStream()), magnitudes.Download(TheStream()),
          unit_magnitudes.Download(TheStream())};
}

std::vector<float> RoundedProduct(const ReferenceTokens& tokens, const DeviceArray<float>& x,
                                  const DeviceArray<float>& w, int64_t k, int64_t n) {
  DeviceArray<float> y(tokens.num_tokens * n);
  LaunchRoundedProduct(tokens, static_cast<int>(k), static_cast<int>(n), x.data(), w.data(),
                       y.data(), TheStream());
  return y.Download(TheStream());
}

Errors ErrorsOf(const std::vector<float>& got, const std::vector<double>& expected) {
  Errors errors;
  for (size_t i = 0; i < got.size(); ++i) {
    const double error = std::fabs(got[i] - expected[i]);
    // A NaN fails every comparison and would not raise a maximum.
    errors.largest = std::isnan(error) ? INFINITY : std::max(errors.largest, error);
    errors.root_mean_square += error * error;
  }
  errors.root_mean_square = std::sqrt(errors.root_mean_square / static_cast<double>(got.size()));
  return errors;
}

}  // namespace wintserve::kernels::cuda
