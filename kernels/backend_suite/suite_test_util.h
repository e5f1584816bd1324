// Shared by the tests of this folder: operands on the device, float64 references, error bounds.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "common/check.h"
#include "kernels/backend.h"
#include "kernels/backend_suite/backend_under_test.h"
#include "kernels/formats/matrix.h"

namespace wintserve::kernels {

// One backend for all tests of a binary.
BackendUnderTest& UnderTest();
inline Backend& TheBackend() { return *UnderTest().backend; }
inline const ErrorModel& Errors() { return UnderTest().errors; }

template <typename T>
T Must(absl::StatusOr<T> value) {
  CHECK(value.ok(), "{}", value.status().ToString());
  return *std::move(value);
}

// Numbers in device memory.
template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(const std::vector<T>& values)
      : size_(std::ssize(values)), buffer_(Must(TheBackend().Allocate(size_bytes()))) {
    if (size_ > 0) TheBackend().CopyFromHost(buffer_->data(), values.data(), size_bytes());
  }
  T* data() const { return static_cast<T*>(buffer_->data()); }
  std::vector<T> ToHost() const {
    std::vector<T> values(size_);
    if (size_ > 0) {
      const absl::Status copied =
          TheBackend().CopyToHost(values.data(), buffer_->data(), size_bytes());
      CHECK(copied.ok(), "{}", copied.ToString());
    }
    return values;
  }

 private:
  int64_t size_bytes() const { return size_ * static_cast<int64_t>(sizeof(T)); }

  int64_t size_;
  std::unique_ptr<Buffer> buffer_;
};

// A matrix in host memory, dense.
struct HostRows {
  int64_t rows = 0;
  int64_t columns = 0;
  std::vector<float> values;

  const float* row(int64_t r) const { return values.data() + r * columns; }
  float* row(int64_t r) { return values.data() + r * columns; }
  float at(int64_t r, int64_t c) const { return values[r * columns + c]; }
};

HostRows RandomRows(int64_t rows, int64_t columns, std::mt19937* rng, float deviation = 1.0f);

// Rows on the device at the stride that a model uses, with NaN between and behind them.
class DeviceRows {
 public:
  explicit DeviceRows(const HostRows& host);
  // NaN everywhere, for an output.
  DeviceRows(int64_t rows, int64_t columns);
  Rows rows() const { return {array_.data(), stride_}; }
  // Fails the test if anything beside the rows was written.
  HostRows ToHost() const;

 private:
  static std::vector<float> Padded(const HostRows& host);

  int64_t rows_;
  int64_t columns_;
  int64_t stride_;
  DeviceArray<float> array_;
};

// A float64 result and how far the backend's may be from it.
struct Bounded {
  double value = 0;
  double error = 0;
};

// n additions change a result by at most this factor of the sum of its terms' magnitudes (Higham).
inline double Gamma(double n) {
  const double relative = n * Errors().addition;
  return relative / (1 - relative);
}

std::vector<Bounded> Exactly(const float* values, int64_t count);
void ExpectWithin(const Bounded& reference, float actual);

// A weight matrix: packed, and by definition.
class TestMatrix {
 public:
  // Weights of about 1 / sqrt(k); WINT2 columns whose codes are exact on every backend.
  TestMatrix(formats::WeightFormat format, int64_t k, int64_t n, MatrixUse use, std::mt19937* rng,
             formats::KOrder k_order = formats::KOrder::kMma64);

  const WeightMatrix& packed() const { return *packed_; }
  int64_t k() const { return host_.k; }
  int64_t n() const { return host_.n; }
  double weight(int64_t row, int64_t column) const { return weights_[row * host_.n + column]; }

  // x * W for one row of x that may be off already.
  std::vector<Bounded> Product(const std::vector<Bounded>& x) const;
  // The same in FastDeploy's arithmetic: x, weights and result are rounded to bfloat16.
  std::vector<double> FastDeployProduct(const float* x) const;

 private:
  // What a weight of value 1 code has in common with its neighbours: the scale; 0 if it has none.
  double ScaleOf(int64_t row, int64_t column) const;

  formats::HostMatrix host_;
  std::vector<double> weights_;
  std::vector<float> fast_deploy_weights_;
  std::unique_ptr<WeightMatrix> packed_;
};

struct TestMlp {
  TestMlp(formats::WeightFormat format, int64_t hidden, int64_t width, std::mt19937* rng);

  MlpWeights weights() const { return {&gate_up.packed(), &down.packed()}; }
  std::vector<Bounded> Output(const float* x) const;

  TestMatrix gate_up;
  TestMatrix down;
};

// `batch` on the device.
std::unique_ptr<DeviceBatch> FilledBatch(const Batch& batch);

}  // namespace wintserve::kernels
