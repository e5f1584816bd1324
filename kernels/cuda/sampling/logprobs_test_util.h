// Shared by the tests of log-probabilities on a GPU and on an emulated one.
#pragma once

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "kernels/cpu/logprobs.h"
#include "kernels/cpu/sampling_test_util.h"
#include "kernels/cuda/sampling/sampling_args.h"

namespace wintserve::kernels::cuda {

inline constexpr int kTopStride = sampling::kMaxTopLogprobs + 1;

// Rows of logits, of which each has a token and a number of most probable ids that are asked for.
struct LogprobRequests {
  std::vector<std::vector<float>> logits;
  std::vector<int32_t> ids;
  std::vector<int32_t> num_top;
};

// Poison where a launch wrote nothing: NaN and -1.
struct LogprobOutputs {
  std::vector<float> logprobs;
  std::vector<int32_t> ranks;
  std::vector<int32_t> top_ids;
  std::vector<float> top_logprobs;
};

// Array: see TestRows. launch(args) runs the kernel.
template <template <typename> typename Array, typename Launch>
LogprobOutputs ReadLogprobsOf(const LogprobRequests& requests, const Launch& launch) {
  const auto num_rows = static_cast<int32_t>(requests.logits.size());
  const auto vocabulary = static_cast<int32_t>(requests.logits[0].size());
  std::vector<float> all;
  std::vector<SamplingRow> rows;
  for (int i = 0; i < num_rows; ++i) {
    all.insert(all.end(), requests.logits[i].begin(), requests.logits[i].end());
    rows.push_back({.slot = i, .num_top_logprobs = requests.num_top[i]});
  }
  const Array<float> logits(all);
  const Array<SamplingRow> device_rows(rows);
  const Array<int32_t> ids(requests.ids);
  Array<float> logprobs(num_rows);
  Array<int32_t> ranks(num_rows);
  Array<int32_t> top_ids(num_rows * kTopStride);
  Array<float> top_logprobs(num_rows * kTopStride);
  launch(LogprobArgs{.logits = logits.data(),
                     .logits_stride = vocabulary,
                     .num_rows = num_rows,
                     .vocabulary = vocabulary,
                     .rows = device_rows.data(),
                     .ids = ids.data(),
                     .logprobs = logprobs.data(),
                     .ranks = ranks.data(),
                     .top_ids = top_ids.data(),
                     .top_logprobs = top_logprobs.data(),
                     .top_stride = kTopStride});
  return {logprobs.Get(), ranks.Get(), top_ids.Get(), top_logprobs.Get()};
}

// Flat, tied, peaked: every way that the most probable ids can lie.
inline std::vector<float> LogprobLogitsOfKind(int kind, int size, std::mt19937* random) {
  const auto seed = static_cast<uint32_t>((*random)());
  std::vector<float> logits = cpu::RandomLogits(size, 3, seed);
  switch (kind % 6) {
    case 0:
      break;
    case 1:
      logits = cpu::RandomLogits(size, 0.01f, seed);
      break;
    case 2:
      std::fill(logits.begin(), logits.end(), 4.0f);
      break;
    case 3:  // all others lie in the last bin
      logits[seed % size] = 100;
      break;
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

inline LogprobRequests RandomLogprobRequests(int num_rows, int size, std::mt19937* random) {
  LogprobRequests requests;
  for (int i = 0; i < num_rows; ++i) {
    requests.logits.push_back(LogprobLogitsOfKind(i, size, random));
    requests.ids.push_back(static_cast<int32_t>((*random)() % size));
    requests.num_top.push_back(i % 4 == 0 ? sampling::kMaxTopLogprobs
                                          : static_cast<int32_t>((*random)() % kTopStride));
  }
  return requests;
}

// The two devices have the same sums and each its own float64 logarithm, off by at most an ulp of
// it: the float32 results are neighbours at most.
inline void ExpectNeighbours(float got, float expected) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  EXPECT_LE(std::nextafter(expected, -kInfinity), got);
  EXPECT_GE(std::nextafter(expected, kInfinity), got);
}

inline void ExpectCpuLogprobs(const LogprobRequests& requests, const LogprobOutputs& got) {
  cpu::LogprobReader reader;
  for (size_t i = 0; i < requests.logits.size(); ++i) {
    const int num_top = requests.num_top[i];
    SCOPED_TRACE(fmt::format("size {} row {} id {} num_top {}", requests.logits[i].size(), i,
                             requests.ids[i], num_top));
    const auto expected = reader.Read(requests.logits[i], requests.ids[i], num_top);
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
    if (testing::Test::HasFailure()) return;
  }
}

}  // namespace wintserve::kernels::cuda
