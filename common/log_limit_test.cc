#include "common/log_limit.h"

#include <gtest/gtest.h>

namespace wintserve {
namespace {

using std::chrono::seconds;

TEST(LogLimit, LetsAFewLinesAMinuteThroughAndThenSaysHowManyWereLeftOut) {
  LogLimit::Clock::time_point now;
  LogLimit limit([&now] { return now; });
  for (int i = 0; i < LogLimit::kMaxLinesPerMinute; ++i) EXPECT_EQ(limit.Admit(), "");
  for (int i = 0; i < 1000; ++i) EXPECT_EQ(limit.Admit(), std::nullopt);
  now += seconds(59);
  EXPECT_EQ(limit.Admit(), std::nullopt);
  now += seconds(1);
  EXPECT_EQ(limit.Admit(), " (and 1001 more that were not logged)");
  EXPECT_EQ(limit.Admit(), "");
}

TEST(LogLimit, ForgetsAMinuteThatIsOver) {
  LogLimit::Clock::time_point now;
  LogLimit limit([&now] { return now; });
  for (int i = 0; i < 10 * LogLimit::kMaxLinesPerMinute; ++i) {
    EXPECT_EQ(limit.Admit(), "");
    now += seconds(60) / LogLimit::kMaxLinesPerMinute;
  }
}

}  // namespace
}  // namespace wintserve
