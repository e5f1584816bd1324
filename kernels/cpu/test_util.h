// Shared by the tests of the CPU operators: random operands, float64 sums and derived error bounds.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "common/check.h"
#include "hwy/highway.h"
#include "kernels/backend.h"
#include "kernels/cpu/matmul.h"
#include "kernels/formats/matrix.h"

namespace wintserve::kernels::cpu {

// Unit roundoff of float32.
inline constexpr double kEpsilon = 0x1p-24;

// Higham's bound: n float32 roundings change a result by at most this factor of the sum of its
// terms' magnitudes.
inline double Gamma(double n) { return n * kEpsilon / (1 - n * kEpsilon); }

// Runs `fn` under every SIMD target that was compiled and that this machine has.
template <typename Fn>
void ForEachTarget(const Fn& fn) {
  for (const int64_t target : hwy::SupportedAndGeneratedTargets()) {
    SCOPED_TRACE(hwy::TargetName(target));
    hwy::SetSupportedTargetsForTest(target);
    ASSERT_STREQ(SimdTargetName(), hwy::TargetName(target));
    fn();
    hwy::SetSupportedTargetsForTest(0);
  }
}

// `batch` on the device of `backend`.
inline std::unique_ptr<DeviceBatch> FilledBatch(Backend* backend, const Batch& batch) {
  BatchLimits limits = {
      .max_tokens = std::ssize(batch.tokens), .max_rows = std::ssize(batch.rows), .num_slots = 1};
  for (const BatchRow& row : batch.rows) {
    limits.max_blocks_per_row = std::max(limits.max_blocks_per_row, BlocksOf(row));
    limits.num_slots = std::max(limits.num_slots, row.slot + 1);
  }
  auto device = backend->CreateBatch(limits);
  CHECK(device.ok(), "{}", device.status().ToString());
  backend->SetBatch(batch, device->get());
  return *std::move(device);
}

inline std::vector<float> RandomFloats(int64_t count, std::mt19937* rng, float deviation = 1.0f) {
  std::normal_distribution<float> normal(0.0f, deviation);
  std::vector<float> values(count);
  for (float& value : values) value = normal(*rng);
  return values;
}

inline float TruncateToBfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  bits &= 0xFFFF0000u;
  std::memcpy(&value, &bits, sizeof(bits));
  return value;
}

// Weights near 1 / sqrt(k), codes over their whole range.
inline formats::HostMatrix RandomMatrix(formats::WeightFormat format, int64_t k, int64_t n,
                                        formats::KOrder k_order, std::mt19937* rng) {
  formats::HostMatrix m = formats::MakeHostMatrix(format, k, n);
  m.k_order = k_order;
  const auto uniform = [rng](float low, float high) {
    return std::uniform_real_distribution<float>(low, high)(*rng);
  };
  const auto integer = [rng](int low, int high) {
    return std::uniform_int_distribution<int>(low, high)(*rng);
  };
  const bool is_wint8 = format == formats::WeightFormat::kWint8;
  const float largest = format == formats::WeightFormat::kWint2 ? 32 * 15 : is_wint8 ? 128 : 8;
  const float size = 2.0f / std::sqrt(static_cast<float>(k));
  for (float& value : m.values_f32) value = uniform(-size, size);
  for (uint16_t& bits : m.values_bf16) {
    const float value = uniform(-size, size);
    uint32_t all;
    std::memcpy(&all, &value, sizeof(all));
    bits = static_cast<uint16_t>(all >> 16);
  }
  for (int8_t& code : m.codes_i8) {
    code = static_cast<int8_t>(is_wint8 ? integer(-128, 127) : integer(-8, 7));
  }
  for (uint8_t& code : m.codes_u8) code = static_cast<uint8_t>(integer(0, 255));
  for (uint8_t& scale : m.local_scale) scale = static_cast<uint8_t>(integer(0, 15));
  for (float& scale : m.channel_scale) {
    scale = TruncateToBfloat16(uniform(0.2f, 1.0f) * size / largest);
  }
  for (float& scale : m.code_scale) scale = uniform(-130.0f, 130.0f);
  for (float& zp : m.code_zp) zp = uniform(-9000.0f, 9000.0f);
  return m;
}

// A float64 result and how far a float32 evaluation may be from it.
struct Bounded {
  double value = 0;
  double error = 0;
};

// One output of x * w when x is off by x_error: every term is rounded at most k + 1 times, the
// product (where the target does not fuse it) and the sums behind it.
inline Bounded DotReference(const std::vector<Bounded>& x, const std::vector<float>& w, int64_t n,
                            int64_t column) {
  Bounded sum;
  double magnitudes = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const double weight = w[static_cast<int64_t>(i) * n + column];
    sum.value += x[i].value * weight;
    sum.error += x[i].error * std::fabs(weight);
    magnitudes += (std::fabs(x[i].value) + x[i].error) * std::fabs(weight);
  }
  sum.error += Gamma(static_cast<double>(x.size()) + 1) * magnitudes;
  return sum;
}

inline std::vector<Bounded> Exact(const float* values, int64_t count) {
  std::vector<Bounded> exact(count);
  for (int64_t i = 0; i < count; ++i) exact[i].value = values[i];
  return exact;
}

inline void ExpectWithin(const Bounded& reference, float actual) {
  // Below the smallest normal number the relative model ends.
  EXPECT_LE(std::fabs(actual - reference.value), reference.error + 1e-37)
      << "got " << actual << ", want " << reference.value;
}

}  // namespace wintserve::kernels::cpu
