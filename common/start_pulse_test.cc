#include "common/start_pulse.h"

#include <fcntl.h>
#include <gtest/gtest.h>

#include <thread>

namespace wintserve {
namespace {

TEST(StartPulse, GivesSignsUntilItHasStartedAndThenNone) {
  const UniqueFd launchers = MakeStartPulse();
  ASSERT_TRUE(launchers.valid());
  EXPECT_FALSE(TakeStartSigns(launchers.get()).is_alive);
  StartPulse pulse(::dup(launchers.get()));
  for (int i = 0; i < 3; ++i) {
    StartSigns signs;
    for (int tries = 0; !signs.is_alive && tries < 1000; ++tries) {
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
      signs = TakeStartSigns(launchers.get());
    }
    EXPECT_TRUE(signs.is_alive);
    EXPECT_FALSE(signs.has_started);
  }
  pulse.Started();
  pulse.Started();
  EXPECT_TRUE(TakeStartSigns(launchers.get()).has_started);
  std::this_thread::sleep_for(2 * StartPulse::kPeriod);
  EXPECT_FALSE(TakeStartSigns(launchers.get()).is_alive);
}

TEST(StartPulse, EndsWithoutASignWhenTheProcessDoesNotGetThatFar) {
  const UniqueFd launchers = MakeStartPulse();
  { const StartPulse pulse(::dup(launchers.get())); }
  EXPECT_FALSE(TakeStartSigns(launchers.get()).has_started);
}

TEST(StartPulse, IsOfNoConsequenceWhereNobodyWantsToKnow) {
  StartPulse pulse(-1);
  pulse.Started();
}

}  // namespace
}  // namespace wintserve
