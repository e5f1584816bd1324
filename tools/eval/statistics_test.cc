#include "tools/eval/statistics.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

namespace wintserve::eval {
namespace {

TEST(EvalStatistics, AccuracyHasTheStandardErrorOfAMean) {
  const Estimate estimate = Accuracy({true, true, true, false});
  EXPECT_DOUBLE_EQ(estimate.value, 0.75);
  // Sample variance of 1, 1, 1, 0: (3 * 0.0625 + 0.5625) / 3 = 0.25; of the mean of four: a
  // quarter.
  EXPECT_DOUBLE_EQ(estimate.standard_error.value(), 0.25);
}

TEST(EvalStatistics, OneItemHasNoStandardError) {
  EXPECT_FALSE(Accuracy({true}).standard_error.has_value());
  const std::vector<Group> one = {{3.0, 2}};
  EXPECT_DOUBLE_EQ(NatsPerToken(one).value, 1.5);
  EXPECT_FALSE(NatsPerToken(one).standard_error.has_value());
}

TEST(EvalStatistics, NatsPerTokenCountTokensAndNotGroups) {
  const std::vector<Group> groups = {{1.0, 1}, {2.0, 8}};
  const Estimate estimate = NatsPerToken(groups);
  EXPECT_DOUBLE_EQ(estimate.value, 3.0 / 9);
  // Residuals 1 - 1/3 and 2 - 8/3: sqrt(2 (4/9 + 4/9)) / 9.
  EXPECT_NEAR(estimate.standard_error.value(), std::sqrt(16.0 / 9) / 9, 1e-15);
}

TEST(EvalStatistics, GroupsOfOneTokenHaveTheStandardErrorOfAMean) {
  const std::vector<Group> groups = {{1.0, 1}, {2.0, 1}, {6.0, 1}};
  // Sample variance (4 + 1 + 9) / 2 = 7.
  EXPECT_NEAR(NatsPerToken(groups).standard_error.value(), std::sqrt(7.0 / 3), 1e-15);
}

// The formula against what it stands for: the spread of the estimate over many samples.
TEST(EvalStatistics, TheStandardErrorIsTheSpreadOfRepeatedEstimates) {
  std::mt19937 random(7);
  std::uniform_int_distribution<int64_t> size(20, 200);
  std::normal_distribution<double> level(2.0, 0.5);
  constexpr int kRepeats = 2000;
  double sum = 0;
  double squares = 0;
  double mean_error = 0;
  for (int repeat = 0; repeat < kRepeats; ++repeat) {
    std::vector<Group> groups;
    for (int i = 0; i < 50; ++i) {
      const int64_t num_tokens = size(random);
      groups.push_back({level(random) * static_cast<double>(num_tokens), num_tokens});
    }
    const Estimate estimate = NatsPerToken(groups);
    sum += estimate.value;
    squares += estimate.value * estimate.value;
    mean_error += estimate.standard_error.value() / kRepeats;
  }
  const double mean = sum / kRepeats;
  const double spread = std::sqrt(squares / kRepeats - mean * mean);
  // The spread of 2,000 values is known to 1 / sqrt(2 * 2000) = 1.6 %, three of which are 5 %; the
  // formula leaves out terms of the order of 1 / 50.
  EXPECT_NEAR(mean_error / spread, 1, 0.07);
}

TEST(EvalStatistics, PerplexityIsTheExponentialWithItsErrorByTheDerivative) {
  const Estimate perplexity = Perplexity({std::log(100.0), 0.01});
  EXPECT_NEAR(perplexity.value, 100, 1e-12);
  EXPECT_NEAR(perplexity.standard_error.value(), 1, 1e-12);
}

TEST(EvalStatistics, OfEqualValuesTheFirstIsTheLargest) {
  EXPECT_EQ(IndexOfLargest(std::vector<double>{-3.0, -1.0, -1.0}), 1u);
}

}  // namespace
}  // namespace wintserve::eval
