#include "kernels/backend_suite/suite_test_util.h"

#include "kernels/formats/bf16.h"
#include "kernels/plan/random_weights_test_util.h"
#include "kernels/plan/weight_layout.h"

namespace wintserve::kernels {

using formats::WeightFormat;

BackendUnderTest& UnderTest() {
  // Lives until the process ends: CUDA may be gone before static destructors run.
  static auto* const under_test = new BackendUnderTest(MakeBackendUnderTest());
  return *under_test;
}

HostRows RandomRows(int64_t rows, int64_t columns, std::mt19937* rng, float deviation) {
  std::normal_distribution<float> normal(0.0f, deviation);
  HostRows host = {rows, columns, std::vector<float>(rows * columns)};
  for (float& value : host.values) value = normal(*rng);
  return host;
}

DeviceRows::DeviceRows(const HostRows& host)
    : rows_(host.rows),
      columns_(host.columns),
      stride_(PaddedStride(host.columns)),
      array_(Padded(host)) {}

DeviceRows::DeviceRows(int64_t rows, int64_t columns)
    : DeviceRows({rows, columns, std::vector<float>(rows * columns, std::nanf(""))}) {}

std::vector<float> DeviceRows::Padded(const HostRows& host) {
  const int64_t stride = PaddedStride(host.columns);
  std::vector<float> values(host.rows * stride, std::nanf(""));
  for (int64_t r = 0; r < host.rows; ++r) {
    std::copy_n(host.row(r), host.columns, values.begin() + r * stride);
  }
  return values;
}

HostRows DeviceRows::ToHost() const {
  const std::vector<float> values = array_.ToHost();
  HostRows host = {rows_, columns_, std::vector<float>(rows_ * columns_)};
  for (int64_t r = 0; r < rows_; ++r) {
    const auto row = values.begin() + r * stride_;
    std::copy_n(row, columns_, host.row(r));
    EXPECT_TRUE(std::all_of(row + columns_, row + stride_, [](float v) { return v != v; }))
        << "written behind row " << r;
  }
  return host;
}

std::vector<Bounded> Exactly(const float* values, int64_t count) {
  std::vector<Bounded> exact(count);
  for (int64_t i = 0; i < count; ++i) exact[i].value = values[i];
  return exact;
}

void ExpectWithin(const Bounded& reference, float actual) {
  // Below the smallest normal number the relative model ends. Written so that a NaN fails.
  const bool within = std::fabs(actual - reference.value) <= reference.error + 1e-37;
  EXPECT_TRUE(within) << "got " << actual << ", want " << reference.value << " +- "
                      << reference.error;
}

TestMatrix::TestMatrix(WeightFormat format, int64_t k, int64_t n, MatrixUse use, std::mt19937* rng,
                       formats::KOrder k_order)
    : host_(plan::ExactlyPackedMatrix(format, k, n, k_order, rng)),
      weights_(plan::UnroundedWeights(host_)),
      fast_deploy_weights_(formats::DecodeToFloat(host_)),
      packed_(Must(TheBackend().Pack(host_, use))) {}

double TestMatrix::ScaleOf(int64_t row, int64_t column) const {
  if (host_.channel_scale.empty()) return 0;
  const double local = host_.format == WeightFormat::kWint2
                           ? host_.local_scale[row / formats::kWint2GroupSize * host_.n + column]
                           : 1;
  return std::fabs(local * host_.channel_scale[column]);
}

std::vector<Bounded> TestMatrix::Product(const std::vector<Bounded>& x) const {
  double largest_x = 0;
  for (const Bounded& value : x) {
    largest_x = std::max(largest_x, std::fabs(value.value) + value.error);
  }
  const plan::Offsets offsets = plan::OffsetsOf(host_.format);
  const double offset = Errors().has_code_offsets ? std::max(offsets.b0, offsets.b1) : 0;
  std::vector<Bounded> y(host_.n);
  for (int64_t column = 0; column < host_.n; ++column) {
    double largest_w = 0;
    for (int64_t row = 0; row < host_.k; ++row) {
      largest_w = std::max(largest_w, std::fabs(weight(row, column)));
    }
    const double w_error = host_.format == WeightFormat::kBfloat16
                               ? Errors().bfloat16_weight_of_largest * largest_w
                               : 0;
    Bounded& sum = y[column];
    double magnitudes = 0;         // of the terms
    double offset_magnitudes = 0;  // of what is added to them and taken off again, group by group
    for (int64_t row = 0; row < host_.k; ++row) {
      const double w = weight(row, column);
      const double x_magnitude = std::fabs(x[row].value) + x[row].error;
      const double x_error = x[row].error + Errors().activation_relative * x_magnitude +
                             Errors().activation_of_largest * largest_x;
      sum.value += x[row].value * w;
      sum.error += x_error * (std::fabs(w) + w_error) + x_magnitude * w_error;
      magnitudes += (x_magnitude + x_error) * (std::fabs(w) + w_error);
      offset_magnitudes += (x_magnitude + x_error) * 2 * offset * ScaleOf(row, column);
    }
    // A product and the sums behind it; in a group of 64 with the offset, and its correction.
    sum.error += Gamma(static_cast<double>(host_.k) + 8) * magnitudes +
                 Gamma(formats::kWint2GroupSize + 8) * offset_magnitudes;
  }
  return y;
}

std::vector<double> TestMatrix::FastDeployProduct(const float* x) const {
  std::vector<double> y(host_.n);
  for (int64_t row = 0; row < host_.k; ++row) {
    const double rounded = formats::RoundToBfloat16(x[row]);
    for (int64_t column = 0; column < host_.n; ++column) {
      y[column] += rounded * fast_deploy_weights_[row * host_.n + column];
    }
  }
  for (double& value : y) value = formats::RoundToBfloat16(static_cast<float>(value));
  return y;
}

TestMlp::TestMlp(WeightFormat format, int64_t hidden, int64_t width, std::mt19937* rng)
    : gate_up(format, hidden, 2 * width, MatrixUse::kGateUp, rng),
      down(format, width, hidden, MatrixUse::kLinear, rng) {}

std::vector<Bounded> TestMlp::Output(const float* x) const {
  const int64_t width = down.k();
  const std::vector<Bounded> sums = gate_up.Product(Exactly(x, gate_up.k()));
  std::vector<Bounded> activations(width);
  for (int64_t i = 0; i < width; ++i) {
    const Bounded& gate = sums[i];
    const Bounded& up = sums[width + i];
    const double silu = gate.value / (1 + std::exp(-gate.value));
    // |silu'| < 1.1
    const double silu_error =
        1.1 * gate.error + Errors().swiglu * (std::fabs(silu) + 1.1 * gate.error);
    activations[i] = {silu * up.value,
                      silu_error * (std::fabs(up.value) + up.error) + std::fabs(silu) * up.error};
  }
  return down.Product(activations);
}

std::unique_ptr<DeviceBatch> FilledBatch(const Batch& batch) {
  BatchLimits limits = {
      .max_tokens = std::ssize(batch.tokens), .max_rows = std::ssize(batch.rows), .num_slots = 1};
  for (const BatchRow& row : batch.rows) {
    limits.max_blocks_per_row = std::max(limits.max_blocks_per_row, BlocksOf(row));
    limits.num_slots = std::max(limits.num_slots, row.slot + 1);
  }
  auto device = Must(TheBackend().CreateBatch(limits));
  TheBackend().SetBatch(batch, device.get());
  return device;
}

}  // namespace wintserve::kernels
