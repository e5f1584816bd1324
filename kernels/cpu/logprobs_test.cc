#include "kernels/cpu/logprobs.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>

namespace wintserve::kernels::cpu {
namespace {

using testing::HasSubstr;

// log softmax in float64.
std::vector<double> Reference(const std::vector<float>& logits) {
  const double maximum = *std::max_element(logits.begin(), logits.end());
  double total = 0;
  for (const float logit : logits) total += std::exp(logit - maximum);
  std::vector<double> logprobs;
  for (const float logit : logits) logprobs.push_back(logit - maximum - std::log(total));
  return logprobs;
}

// The total is a sum of weights that are each off by less than 2^-22, and the result is rounded to
// float32. What is left out below kMinScaledLogit is less than 1e5 * 2^-46.
double Tolerance(double logprob) { return 0x1p-22 + std::fabs(logprob) * 0x1p-24; }

TEST(LogprobReader, GivesLogSoftmaxRankAndTheMostProbable) {
  std::mt19937 random(1);
  LogprobReader reader;
  for (int i = 0; i < 300; ++i) {
    const size_t size = 1 + random() % 2000;
    std::normal_distribution<float> normal(0, 0.1f * static_cast<float>(1 + random() % 100));
    std::vector<float> logits(size);
    for (float& logit : logits) logit = normal(random);
    if (i % 3 == 0) {
      for (float& logit : logits) logit = std::round(logit);  // many ties
    }
    const auto token = static_cast<int32_t>(random() % size);
    const int num_top = static_cast<int>(random() % (sampling::kMaxTopLogprobs + 1));
    const auto row = reader.Read(logits, token, num_top);
    ASSERT_TRUE(row.ok()) << row.status();

    const std::vector<double> expected = Reference(logits);
    std::vector<int32_t> order(size);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int32_t a, int32_t b) { return logits[a] > logits[b]; });
    EXPECT_NEAR(row->logprob, expected[token], Tolerance(expected[token]));
    EXPECT_EQ(order[row->rank - 1], token);
    ASSERT_EQ(row->top.size(), std::min<size_t>(num_top, size));
    for (size_t place = 0; place < row->top.size(); ++place) {
      const auto [id, logprob] = row->top[place];
      EXPECT_EQ(id, order[place]);
      EXPECT_NEAR(logprob, expected[id], Tolerance(expected[id]));
    }
  }
}

TEST(LogprobReader, AnImprobableTokenHasItsLogitsDistance) {
  std::vector<float> logits(1000, -200.0f);
  logits[5] = 100;
  LogprobReader reader;
  const auto row = reader.Read(logits, 700, 3);
  ASSERT_TRUE(row.ok());
  EXPECT_EQ(row->logprob, -300.0f);
  EXPECT_EQ(row->rank, 701);
  ASSERT_EQ(row->top.size(), 3u);
  EXPECT_EQ(row->top[0].id, 5);
  EXPECT_EQ(row->top[0].logprob, 0.0f);
  EXPECT_EQ(row->top[1].id, 0);
  EXPECT_EQ(row->top[2].id, 1);
}

TEST(LogprobReader, ATokenBeyondTheVocabularyComesAfterAllOthers) {
  const std::vector<float> logits = {1, 3, 2};
  LogprobReader reader;
  for (const int32_t token : {3, 1000}) {
    const auto row = reader.Read(logits, token, 1);
    ASSERT_TRUE(row.ok());
    EXPECT_EQ(row->logprob, -std::numeric_limits<float>::infinity());
    EXPECT_EQ(row->rank, 4);
    ASSERT_EQ(row->top.size(), 1u);
    EXPECT_EQ(row->top[0].id, 1);
  }
}

TEST(LogprobReader, ALogitThatIsNotFiniteIsAnErrorThatNamesTheToken) {
  std::vector<float> logits(100, 1.0f);
  logits[40] = std::numeric_limits<float>::quiet_NaN();
  LogprobReader reader;
  const absl::Status status = reader.Read(logits, 0, 0).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(status.message(), HasSubstr("token 40 is nan"));
}

}  // namespace
}  // namespace wintserve::kernels::cpu
