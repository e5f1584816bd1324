// The bytes that a GPU makes are those that packing the host matrix gives.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <utility>
#include <vector>

#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/dummy/dummy_weights.h"
#include "kernels/cuda/handles.h"
#include "kernels/plan/dummy_weights.h"
#include "kernels/plan/pack_weights.h"

namespace wintserve::kernels::cuda {
namespace {

using formats::DummyMatrix;
using formats::HostMatrix;
using formats::WeightFormat;

DummyMatrix SliceOf(WeightFormat format, int64_t k, int64_t n) {
  std::random_device random;
  DummyMatrix m;
  m.format = format;
  m.seed = uint64_t{random()} << 32 | random();
  m.deviation = 1.0f / std::sqrt(static_cast<float>(k));
  m.k = k;
  m.n = n;
  m.first_row = 64;
  m.num_ranges = 2;
  m.ranges[0] = {7, n / 2};
  m.ranges[1] = {7 + n, n - n / 2};
  return m;
}

class DeviceBytes {
 public:
  explicit DeviceBytes(int64_t size_bytes) : buffer_(*DeviceBuffer::Allocate(size_bytes)) {
    CUDA_CALL(cudaMemset, buffer_.data(), 0xA5, static_cast<size_t>(size_bytes));
    CUDA_CALL(cudaStreamSynchronize, cudaStream_t{});
  }
  uint8_t* data() const { return buffer_.data<uint8_t>(); }
  std::vector<uint8_t> ToHost() const {
    std::vector<uint8_t> bytes(buffer_.size_bytes());
    CUDA_CALL(cudaStreamSynchronize, cudaStream_t{});
    CUDA_CALL(cudaMemcpy, bytes.data(), buffer_.data(), bytes.size(), cudaMemcpyDeviceToHost);
    return bytes;
  }

 private:
  DeviceBuffer buffer_;
};

void ExpectSameBytes(const std::vector<uint8_t>& got, const std::vector<uint8_t>& expected) {
  ASSERT_EQ(got.size(), expected.size());
  for (size_t i = 0; i < got.size(); ++i) {
    ASSERT_EQ(int{got[i]}, int{expected[i]}) << "byte " << i << " of " << got.size();
  }
}

TEST(DummyWeightsCuda, PackedBytesAreThoseOfTheHostMatrix) {
  for (const WeightFormat format : {WeightFormat::kBfloat16, WeightFormat::kWint8,
                                    WeightFormat::kWint4, WeightFormat::kWint2}) {
    for (const bool gate_up : {false, true}) {
      for (const auto& [k, n] : {std::pair<int64_t, int64_t>{64, 2},
                                 {128, 16},
                                 {192, 34},
                                 {320, 100},
                                 {1024, 512},
                                 {100, 40}}) {
        if (format == WeightFormat::kWint2 && k % 64 != 0) continue;
        SCOPED_TRACE(testing::Message()
                     << static_cast<int>(format) << " " << gate_up << " " << k << " x " << n);
        const DummyMatrix matrix = SliceOf(format, k, n);
        const HostMatrix host = plan::MakeDummyHostMatrix(matrix);
        const plan::WeightLayout layout = *plan::LayOutWeights(host, gate_up);
        std::vector<uint8_t> expected(layout.size_bytes());
        plan::PackWeights(host, layout, expected.data());
        const DeviceBytes made(layout.size_bytes());
        LaunchDummyWeights(matrix, layout, made.data(), nullptr);
        ExpectSameBytes(made.ToHost(), expected);
      }
    }
  }
}

TEST(DummyWeightsCuda, RowsAreThoseOfTheHostMatrix) {
  for (const bool transposed : {false, true}) {
    DummyMatrix matrix = SliceOf(WeightFormat::kBfloat16, 1000, 300);
    matrix.transposed = transposed;
    const HostMatrix halves = plan::MakeDummyHostMatrix(matrix);
    const DeviceBytes made_halves(1000 * 300 * 2);
    LaunchDummyRows(matrix, made_halves.data(), nullptr);
    std::vector<uint8_t> expected(1000 * 300 * 2);
    std::memcpy(expected.data(), halves.values_bf16.data(), expected.size());
    ExpectSameBytes(made_halves.ToHost(), expected);

    matrix.format = WeightFormat::kFloat32;
    const HostMatrix floats = plan::MakeDummyHostMatrix(matrix);
    const DeviceBytes made_floats(1000 * 300 * 4);
    LaunchDummyRows(matrix, made_floats.data(), nullptr);
    expected.resize(1000 * 300 * 4);
    std::memcpy(expected.data(), floats.values_f32.data(), expected.size());
    ExpectSameBytes(made_floats.ToHost(), expected);
  }
}

}  // namespace
}  // namespace wintserve::kernels::cuda
