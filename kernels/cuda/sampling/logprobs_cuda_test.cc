// Log-probabilities on the device against the CPU's.
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "kernels/cpu/logprobs.h"
#include "kernels/cpu/sampling_test_util.h"
#include "kernels/cuda/sampling/sampling.h"
#include "kernels/cuda/sampling/sampling_test_util.h"

namespace wintserve::kernels::cuda {
namespace {

using cpu::RandomLogits;

constexpr int kTopStride = sampling::kMaxTopLogprobs + 1;
constexpr int32_t kPoison = -1;  // 0xffffffff

struct Outputs {
  std::vector<float> logprobs;
  std::vector<int32_t> ranks;
  std::vector<int32_t> top_ids;
  std::vector<float> top_logprobs;
};

// Every row has its own token and number of most probable ids.
Outputs Read(const std::vector<std::vector<float>>& logits, const std::vector<int32_t>& ids,
             const std::vector<int32_t>& num_top, const plan::SamplingDevice& device) {
  const auto num_rows = static_cast<int32_t>(logits.size());
  const auto vocabulary = static_cast<int32_t>(logits[0].size());
  std::vector<float> all;
  std::vector<SamplingRow> rows;
  for (int i = 0; i < num_rows; ++i) {
    all.insert(all.end(), logits[i].begin(), logits[i].end());
    rows.push_back({.slot = i, .num_top_logprobs = num_top[i]});
  }
  const DeviceArray<float> device_logits(all);
  const DeviceArray<SamplingRow> device_rows(rows);
  const DeviceArray<int32_t> device_ids(ids);
  DeviceArray<float> logprobs(num_rows);
  DeviceArray<int32_t> ranks(num_rows);
  DeviceArray<int32_t> top_ids(num_rows * kTopStride);
  DeviceArray<float> top_logprobs(num_rows * kTopStride);
  LaunchLogprobs({.logits = device_logits.data(),
                  .logits_stride = vocabulary,
                  .num_rows = num_rows,
                  .vocabulary = vocabulary,
                  .rows = device_rows.data(),
                  .ids = device_ids.data(),
                  .logprobs = logprobs.data(),
                  .ranks = ranks.data(),
                  .top_ids = top_ids.data(),
                  .top_logprobs = top_logprobs.data(),
                  .top_stride = kTopStride},
                 device, /*stream=*/nullptr);
  return {logprobs.Get(), ranks.Get(), top_ids.Get(), top_logprobs.Get()};
}

// The two devices have the same sums and each its own float64 logarithm, off by at most an ulp of
// it: the float32 results are neighbours at most.
void ExpectNeighbours(float got, float expected) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  EXPECT_LE(std::nextafter(expected, -kInfinity), got);
  EXPECT_GE(std::nextafter(expected, kInfinity), got);
}

std::vector<float> LogitsOfKind(int kind, int size, std::mt19937* random) {
  const auto seed = static_cast<uint32_t>((*random)());
  std::vector<float> logits = RandomLogits(size, 3, seed);
  switch (kind % 6) {
    case 0:
      break;
    case 1:
      logits = RandomLogits(size, 0.01f, seed);
      break;
    case 2:
      std::fill(logits.begin(), logits.end(), 4.0f);
      break;
    case 3:
      logits[seed % size] = 100;
      break;  // all others lie in the last bin
    case 4:
      for (float& logit : logits) logit = std::round(logit);
      break;
    default:  // all but the largest beyond the range of scaled logits, and tied
      for (float& logit : logits) logit = -1e30f;
      logits[seed % size] = 1e30f;
      break;
  }
  return logits;
}

class DividedLogprobs : public testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(BlocksPerRow, DividedLogprobs, testing::Values(1, 2, 8));

plan::SamplingDevice DeviceOf(int blocks_per_row) {
  plan::SamplingDevice device = PrepareSampling();
  device.max_blocks_per_row = std::min(device.max_blocks_per_row, blocks_per_row);
  device.num_sms = 1 << 20;
  device.min_ids_per_block = 1;
  return device;
}

TEST_P(DividedLogprobs, AreThoseOfTheCpu) {
  const plan::SamplingDevice device = DeviceOf(GetParam());
  std::mt19937 random(1);
  cpu::LogprobReader reader;
  for (const int size : {1, 2, 19, 128, 1000, 5003, 103'424}) {
    std::vector<std::vector<float>> logits;
    std::vector<int32_t> ids;
    std::vector<int32_t> num_top;
    for (int i = 0; i < 18; ++i) {
      logits.push_back(LogitsOfKind(i, size, &random));
      ids.push_back(static_cast<int32_t>(random() % size));
      num_top.push_back(i % 4 == 0 ? sampling::kMaxTopLogprobs
                                   : static_cast<int32_t>(random() % kTopStride));
    }
    const Outputs got = Read(logits, ids, num_top, device);
    for (size_t i = 0; i < logits.size(); ++i) {
      SCOPED_TRACE(fmt::format("size {} row {} id {} num_top {}", size, i, ids[i], num_top[i]));
      const auto expected = reader.Read(logits[i], ids[i], num_top[i]);
      ASSERT_TRUE(expected.ok());
      ExpectNeighbours(got.logprobs[i], expected->logprob);
      EXPECT_EQ(got.ranks[i], expected->rank);
      for (int place = 0; place < kTopStride; ++place) {
        const int32_t id = got.top_ids[i * kTopStride + place];
        const float logprob = got.top_logprobs[i * kTopStride + place];
        if (place < std::ssize(expected->top)) {
          EXPECT_EQ(id, expected->top[place].id) << place;
          ExpectNeighbours(logprob, expected->top[place].logprob);
        } else {  // beyond the vocabulary, or not asked for and poison still
          EXPECT_EQ(id, -1) << place;
          EXPECT_TRUE(std::isnan(logprob)) << place;
        }
      }
      if (HasFailure()) return;
    }
  }
}

TEST_P(DividedLogprobs, OfARowThatAsksForNoneAreLeftAlone) {
  const Outputs got = Read({RandomLogits(100, 1, 1), RandomLogits(100, 1, 2)}, {5, 6}, {-1, 0},
                           DeviceOf(GetParam()));
  EXPECT_TRUE(std::isnan(got.logprobs[0]));
  EXPECT_EQ(got.ranks[0], kPoison);
  EXPECT_FALSE(std::isnan(got.logprobs[1]));
  EXPECT_GE(got.ranks[1], 1);
}

TEST_P(DividedLogprobs, OfARowThatIsNotFiniteAreNone) {
  std::vector<float> bad = RandomLogits(1000, 1, 1);
  bad[999] = std::numeric_limits<float>::quiet_NaN();
  const Outputs got =
      Read({bad, RandomLogits(1000, 1, 2)}, {5, -1 - 7}, {3, 2}, DeviceOf(GetParam()));
  for (int row = 0; row < 2; ++row) {
    EXPECT_TRUE(std::isnan(got.logprobs[row])) << row;
    EXPECT_EQ(got.ranks[row], 0) << row;
    EXPECT_EQ(got.top_ids[row * kTopStride], -1) << row;
    EXPECT_TRUE(std::isnan(got.top_logprobs[row * kTopStride])) << row;
  }
}

}  // namespace
}  // namespace wintserve::kernels::cuda
