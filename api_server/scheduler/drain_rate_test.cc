#include "api_server/scheduler/drain_rate.h"

#include <gtest/gtest.h>

namespace wintserve {
namespace {

constexpr int64_t kSecondUs = 1'000'000;

// `num_left` at a time, every `period` seconds, `times` times, from *now_us on.
DrainRate Steady(int num_left, int period, int times, int64_t* now_us) {
  DrainRate rate;
  rate.Observe(*now_us, /*was_waiting=*/false, 0);
  for (int i = 0; i < times; ++i) {
    *now_us += period * kSecondUs;
    rate.Observe(*now_us, true, num_left);
  }
  return rate;
}

TEST(DrainRate, ASteadyQueueNeedsAsLongAsItsDeparturesTake) {
  int64_t now_us = 17;
  EXPECT_NEAR(*Steady(1, 1, 100, &now_us).SecondsFor(10), 10, 1e-9);
  EXPECT_NEAR(*Steady(8, 2, 100, &now_us).SecondsFor(10), 2.5, 1e-9);
  EXPECT_NEAR(*Steady(256, 20, 100, &now_us).SecondsFor(512), 40, 1e-9);
}

TEST(DrainRate, FollowsALastingChangeWithinAMinuteOrTwo) {
  int64_t now_us = 0;
  DrainRate rate = Steady(1, 1, 300, &now_us);
  for (int i = 0; i < 90 * 4; ++i) rate.Observe(now_us += kSecondUs / 4, true, 1);
  EXPECT_NEAR(*rate.SecondsFor(100), 25, 5);
}

TEST(DrainRate, AQueueThatStandsStillNeedsLongerAndLonger) {
  int64_t now_us = 0;
  DrainRate rate = Steady(1, 1, 100, &now_us);
  double before = *rate.SecondsFor(5);
  for (int i = 0; i < 3600; ++i) {
    rate.Observe(now_us += kSecondUs, true, 0);
    const double after = *rate.SecondsFor(5);
    ASSERT_GT(after, before) << "after " << i << " s";
    ASSERT_GE(rate.RetrySecondsFor(1), i + 1);  // as long again as it has stood still
    before = after;
  }
  // How often it is looked at changes nothing.
  DrainRate once = Steady(1, 1, 100, &(now_us = 0));
  once.Observe(now_us + 3600 * kSecondUs, true, 0);
  EXPECT_NEAR(*once.SecondsFor(5), before, 1e-6);
}

TEST(DrainRate, ForgetsWithinAMinuteOrTwoThatItHasStoodStill) {
  int64_t now_us = 0;
  DrainRate rate = Steady(1, 1, 100, &now_us);
  rate.Observe(now_us += 3600 * kSecondUs, true, 0);
  EXPECT_GE(rate.RetrySecondsFor(10), 3600);
  for (int i = 0; i < 60; ++i) rate.Observe(now_us += kSecondUs, true, 1);
  EXPECT_NEAR(*rate.SecondsFor(10), 10, 2);
}

TEST(DrainRate, TimeInWhichNobodyWaitsDoesNotCount) {
  int64_t now_us = 0;
  DrainRate rate = Steady(1, 1, 100, &now_us);
  rate.Observe(now_us += 1000 * kSecondUs, false, 0);
  EXPECT_NEAR(*rate.SecondsFor(10), 10, 1e-9);
  // Who waited has gone away without a departure; then somebody waits anew.
  rate.Observe(now_us += 50 * kSecondUs, true, 0);
  rate.Observe(now_us += kSecondUs, false, 0);
  EXPECT_NEAR(*rate.SecondsFor(10), 10, 1e-9);
}

TEST(DrainRate, BeforeADepartureThereIsNoRateAndTheRetryTimeIsThatOfTheWaitSoFar) {
  DrainRate rate;
  EXPECT_EQ(rate.SecondsFor(10), std::nullopt);
  EXPECT_EQ(rate.RetrySecondsFor(10), 1);
  rate.Observe(1000 * kSecondUs, false, 0);
  rate.Observe(1040 * kSecondUs, true, 0);
  EXPECT_EQ(rate.SecondsFor(10), std::nullopt);
  EXPECT_NEAR(rate.RetrySecondsFor(10), 40, 1e-9);
}

TEST(DrainRate, OfTheFirstSecondThereIsNoRate) {
  DrainRate rate;
  rate.Observe(0, false, 0);
  rate.Observe(kSecondUs / 2, true, 1);
  EXPECT_EQ(rate.SecondsFor(10), std::nullopt);
  EXPECT_EQ(rate.RetrySecondsFor(10), 1);
  rate.Observe(kSecondUs * 3 / 2, true, 1);
  ASSERT_TRUE(rate.SecondsFor(10).has_value());
  EXPECT_NEAR(*rate.SecondsFor(10), 7.5, 0.1);
}

}  // namespace
}  // namespace wintserve
