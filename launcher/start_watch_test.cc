#include "launcher/start_watch.h"

#include <gtest/gtest.h>

namespace wintserve {
namespace {

using std::chrono::milliseconds;
using std::chrono::minutes;
using std::chrono::seconds;

constexpr StartSigns kNone = {};
constexpr StartSigns kAlive = {.is_alive = true};
constexpr StartSigns kStarted = {.is_alive = true, .has_started = true};

class StartWatchTest : public ::testing::Test {
 protected:
  // Looks whenever it is time, and gets `signs`. For how long it took until the process hangs; none
  // within the time.
  std::optional<milliseconds> LookUntilItHangs(const StartSigns& signs, milliseconds time) {
    const auto begin = now_;
    while (watch_.next_look().has_value() && *watch_.next_look() <= begin + time) {
      now_ = *watch_.next_look();
      if (watch_.Look(signs, now_)) return std::chrono::duration_cast<milliseconds>(now_ - begin);
    }
    return std::nullopt;
  }

  StartWatch::TimePoint now_{seconds(100)};
  StartWatch watch_{seconds(10), now_};
};

TEST_F(StartWatchTest, AProcessThatIsSilentForTheLimitHangsAndThatIsSaidOnce) {
  EXPECT_EQ(LookUntilItHangs(kNone, minutes(1)), seconds(10));
  EXPECT_FALSE(watch_.next_look().has_value());
  EXPECT_FALSE(watch_.Look(kNone, now_ + minutes(1)));
}

TEST_F(StartWatchTest, OneThatGivesSignsMayTakeAsLongAsItNeeds) {
  EXPECT_EQ(LookUntilItHangs(kAlive, minutes(60)), std::nullopt);
  EXPECT_EQ(LookUntilItHangs(kNone, minutes(1)), seconds(10)) << "from the last sign on";
}

TEST_F(StartWatchTest, OneThatHasStartedIsWatchedNoLonger) {
  LookUntilItHangs(kNone, seconds(5));
  EXPECT_FALSE(watch_.Look(kStarted, now_ + seconds(1)));
  EXPECT_FALSE(watch_.next_look().has_value());
}

TEST_F(StartWatchTest, TimeInWhichNobodyCouldLookIsNotCounted) {
  EXPECT_FALSE(watch_.Look(kNone, now_ + minutes(60)));
  now_ += minutes(60);
  EXPECT_EQ(LookUntilItHangs(kNone, minutes(1)), seconds(9));
}

TEST_F(StartWatchTest, WithoutALimitThereIsNothingToWatch) {
  EXPECT_FALSE(StartWatch(milliseconds(0), now_).next_look().has_value());
  EXPECT_FALSE(StartWatch().next_look().has_value());
}

TEST(StartLimit, IsTheStallTimeoutWithinReason) {
  EXPECT_EQ(StartLimit(0), milliseconds(0));
  EXPECT_EQ(StartLimit(500), seconds(5));
  EXPECT_EQ(StartLimit(20'000), seconds(20));
  EXPECT_EQ(StartLimit(300'000), seconds(60));
}

}  // namespace
}  // namespace wintserve
