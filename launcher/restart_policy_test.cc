#include "launcher/restart_policy.h"

#include <gtest/gtest.h>
#include <signal.h>

#include <algorithm>
#include <vector>

#include "common/exit_code.h"

namespace wintserve {
namespace {

using std::chrono::milliseconds;
using std::chrono::minutes;
using std::chrono::seconds;

constexpr ChildExit kKilled = {true, SIGKILL};
constexpr ChildExit kCrashed = {true, SIGSEGV};
constexpr bool kOutOfMemory = true;

// A child that is started as its policy says and runs for as long as the test says.
class Life {
 public:
  // The pause before the next start in milliseconds, -1: a crash loop.
  int64_t Ends(const ChildExit& how, milliseconds after, double chance = 0,
               bool out_of_memory = false) {
    now_ += after;
    const auto pause =
        policy_.OnExit(IsSelfInflicted(how), out_of_memory, now_ - after, now_, chance);
    if (!pause.has_value()) return -1;
    now_ += *pause;
    return pause->count();
  }

 private:
  RestartPolicy policy_;
  RestartPolicy::TimePoint now_ = RestartPolicy::TimePoint(std::chrono::hours(1));
};

TEST(RestartPolicy, AtOnceAndThenAfterPausesThatDoubleToHalfAMinute) {
  Life life;
  std::vector<int64_t> pauses;
  for (int i = 0; i < 40; ++i) {
    // Far enough apart to be no crash loop, near enough to be in a row: only want of memory is
    // both.
    pauses.push_back(life.Ends(kKilled, seconds(59), 0, kOutOfMemory));
  }
  EXPECT_EQ(std::vector<int64_t>(pauses.begin(), pauses.begin() + 9),
            (std::vector<int64_t>{0, 500, 1000, 2000, 4000, 8000, 16000, 30000, 30000}));
  EXPECT_EQ(pauses.back(), 30000);
  EXPECT_EQ(life.Ends(kKilled, seconds(60), 0, kOutOfMemory), 0);
}

TEST(RestartPolicy, FaultsWaitLongerEachTimeToo) {
  Life life;
  std::vector<int64_t> pauses;
  for (int i = 0; i < 5; ++i) pauses.push_back(life.Ends(kCrashed, seconds(59)));
  EXPECT_EQ(pauses, (std::vector<int64_t>{0, 500, 1000, 2000, 4000}));
}

TEST(RestartPolicy, KillsFromOutsideNeverMakeARestartSlowerThanASecondAndAQuarter) {
  Life life;
  std::vector<int64_t> pauses;
  for (int i = 0; i < 200; ++i) pauses.push_back(life.Ends(kKilled, milliseconds(i % 2000), 0.999));
  EXPECT_EQ(std::vector<int64_t>(pauses.begin(), pauses.begin() + 4),
            (std::vector<int64_t>{0, 624, 1249, 1249}));
  EXPECT_EQ(*std::max_element(pauses.begin(), pauses.end()), 1249);
}

TEST(RestartPolicy, EndsOfOneCauseDoNotSlowDownRestartsAfterAnother) {
  Life life;
  for (int i = 0; i < 20; ++i) life.Ends(kKilled, seconds(0));
  EXPECT_EQ(life.Ends(kCrashed, seconds(0)), 0);
  EXPECT_EQ(life.Ends(kKilled, seconds(0), 0, kOutOfMemory), 500);
  EXPECT_EQ(life.Ends(kCrashed, seconds(0)), 1000);
  EXPECT_EQ(life.Ends(kKilled, seconds(2)), 0);
  EXPECT_EQ(life.Ends(kCrashed, seconds(0)), 2000) << "2 s set no fault back";
}

TEST(RestartPolicy, ChanceMakesAPauseUpToAQuarterLonger) {
  Life life;
  EXPECT_EQ(life.Ends(kCrashed, seconds(0), 0.999), 0);
  EXPECT_EQ(life.Ends(kCrashed, seconds(0), 0), 500);
  EXPECT_EQ(life.Ends(kCrashed, seconds(0), 0.5), 1125);
  EXPECT_EQ(life.Ends(kCrashed, seconds(0), 0.996), 2498);
}

TEST(RestartPolicy, AGoodRunSetsThePausesBack) {
  Life life;
  for (int i = 0; i < 3; ++i) life.Ends(kKilled, seconds(0));
  EXPECT_EQ(life.Ends(kKilled, seconds(2)), 0);
  EXPECT_EQ(life.Ends(kKilled, seconds(0)), 500);
  // A fault may take its time.
  EXPECT_EQ(life.Ends(kCrashed, seconds(0)), 0);
  EXPECT_EQ(life.Ends(kCrashed, seconds(59)), 500);
  EXPECT_EQ(life.Ends(kCrashed, seconds(60)), 0);
}

TEST(RestartPolicy, TheSixthFaultWithinTenMinutesIsACrashLoop) {
  Life life;
  for (int i = 0; i < 5; ++i) EXPECT_GE(life.Ends(kCrashed, seconds(1)), 0) << i;
  EXPECT_EQ(life.Ends(kCrashed, seconds(1)), -1);
}

TEST(RestartPolicy, FaultsFurtherApartAreNone) {
  Life life;
  for (int i = 0; i < 50; ++i) ASSERT_EQ(life.Ends(kCrashed, minutes(2) + seconds(1)), 0) << i;
  Life faster;
  for (int i = 0; i < 5; ++i) ASSERT_EQ(faster.Ends(kCrashed, minutes(2)), 0) << i;
  EXPECT_EQ(faster.Ends(kCrashed, minutes(2)), -1) << "the first is just 10 minutes ago";
}

TEST(RestartPolicy, EndsFromOutsideAndForWantOfMemoryAreNeverACrashLoop) {
  Life life;
  for (int i = 0; i < 5; ++i) ASSERT_GE(life.Ends(kCrashed, seconds(0)), 0);
  for (int i = 0; i < 8; ++i) ASSERT_GE(life.Ends(kKilled, seconds(0), 0, kOutOfMemory), 0);
  const ChildExit from_outside[] = {
      {true, SIGKILL}, {true, SIGTERM}, {true, SIGINT}, {false, kExitOk}, {false, 75}};
  for (int i = 0; i < 100; ++i) ASSERT_GE(life.Ends(from_outside[i % 5], milliseconds(100)), 0);
}

TEST(ChildExits, SayWhoIsAtFaultAndWhetherTheKvIsRight) {
  struct Case {
    ChildExit how;
    bool start_up;
    bool self_inflicted;
    bool kv_trusted;
  };
  const Case cases[] = {
      {{true, SIGKILL}, false, false, true},
      {{true, SIGTERM}, false, false, true},
      {{true, SIGINT}, false, false, true},
      {{true, SIGHUP}, false, false, true},
      {{true, SIGSEGV}, false, true, false},
      {{true, SIGABRT}, false, true, false},
      {{true, SIGBUS}, false, true, false},
      {{true, SIGILL}, false, true, false},
      {{true, SIGFPE}, false, true, false},
      {{false, kExitOk}, false, false, true},
      {{false, kExitDrainTimeout}, false, false, true},
      {{false, kExitInternal}, false, true, false},
      {{false, 1}, false, true, false},
      {{false, kExitCheckpoint}, true, true, true},
      {{false, kExitUnavailable}, true, true, true},
      {{false, kExitUsage}, true, true, true},
      {{false, kExitNeverReady}, true, true, true},
  };
  for (const Case& c : cases) {
    SCOPED_TRACE(c.how.ToString());
    EXPECT_EQ(IsStartUpCode(c.how), c.start_up);
    EXPECT_EQ(IsSelfInflicted(c.how), c.self_inflicted);
    EXPECT_EQ(KvIsTrusted(c.how), c.kv_trusted);
  }
}

}  // namespace
}  // namespace wintserve
