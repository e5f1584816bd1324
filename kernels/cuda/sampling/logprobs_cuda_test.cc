// Log-probabilities on the device against the CPU's.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "kernels/cpu/sampling_test_util.h"
#include "kernels/cuda/sampling/logprobs_test_util.h"
#include "kernels/cuda/sampling/sampling.h"
#include "kernels/cuda/sampling/sampling_cuda_test_util.h"

namespace wintserve::kernels::cuda {
namespace {

using cpu::RandomLogits;

class DividedLogprobs : public testing::TestWithParam<int> {
 protected:
  DividedLogprobs() : device_(PrepareSampling()) {
    device_.max_blocks_per_row = std::min(device_.max_blocks_per_row, GetParam());
    device_.num_sms = 1 << 20;
    device_.min_ids_per_block = 1;
  }

  void Launch(const LogprobArgs& args) const { LaunchLogprobs(args, device_, /*stream=*/nullptr); }

  LogprobOutputs Read(const LogprobRequests& requests) const {
    return ReadLogprobsOf<DeviceArray>(requests, [this](const LogprobArgs& args) { Launch(args); });
  }

 private:
  plan::SamplingDevice device_;
};
INSTANTIATE_TEST_SUITE_P(BlocksPerRow, DividedLogprobs, testing::Values(1, 2, 8));

TEST_P(DividedLogprobs, AreThoseOfTheCpu) {
  std::mt19937 random(1);
  for (const int size : {1, 2, 19, 128, 1000, 5003, 103'424}) {
    const LogprobRequests requests = RandomLogprobRequests(18, size, &random);
    ExpectCpuLogprobs(requests, Read(requests));
    if (HasFailure()) return;
  }
}

TEST_P(DividedLogprobs, OfGivenIdsAreThoseOfTheCpu) {
  std::mt19937 random(2);
  LogprobRequests requests = RandomLogprobRequests(18, 5003, &random);
  requests.num_top.assign(18, 4);
  const LogprobOutputs got = ReadLogprobsOf<DeviceArray>(requests, [this](LogprobArgs args) {
    args.rows = nullptr;
    args.num_top = 4;
    Launch(args);
  });
  ExpectCpuLogprobs(requests, got);
}

TEST_P(DividedLogprobs, OfARowThatAsksForNoneAreLeftAlone) {
  const LogprobOutputs got =
      Read({{RandomLogits(100, 1, 1), RandomLogits(100, 1, 2)}, {5, 6}, {-1, 0}});
  EXPECT_TRUE(std::isnan(got.logprobs[0]));
  EXPECT_EQ(got.ranks[0], -1);
  EXPECT_FALSE(std::isnan(got.logprobs[1]));
  EXPECT_GE(got.ranks[1], 1);
}

TEST_P(DividedLogprobs, OfARowThatIsNotFiniteAreNone) {
  std::vector<float> bad = RandomLogits(1000, 1, 1);
  bad[999] = std::numeric_limits<float>::quiet_NaN();
  const LogprobOutputs got = Read({{bad, RandomLogits(1000, 1, 2)}, {5, -1 - 7}, {3, 2}});
  for (int row = 0; row < 2; ++row) {
    EXPECT_TRUE(std::isnan(got.logprobs[row])) << row;
    EXPECT_EQ(got.ranks[row], 0) << row;
    EXPECT_EQ(got.top_ids[row * kTopStride], -1) << row;
    EXPECT_TRUE(std::isnan(got.top_logprobs[row * kTopStride])) << row;
  }
}

}  // namespace
}  // namespace wintserve::kernels::cuda
