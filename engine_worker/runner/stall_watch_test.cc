#include "engine_worker/runner/stall_watch.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <thread>

namespace wintserve {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

struct Watched {
  std::atomic<uint64_t> progress = 0;
  std::atomic<int> num_stalls = 0;

  StallWatch Watch(int64_t timeout_ms) {
    return StallWatch(
        timeout_ms, [this] { return progress.load(); }, [this] { ++num_stalls; });
  }
  bool WaitForStall() const {
    const auto deadline = steady_clock::now() + std::chrono::seconds(30);
    while (num_stalls == 0 && steady_clock::now() < deadline) {
      std::this_thread::sleep_for(milliseconds(1));
    }
    return num_stalls == 1;
  }
};

TEST(StallWatch, TellsOnceOfWorkThatStandsStill) {
  Watched work;
  const auto begin = steady_clock::now();
  const StallWatch watch = work.Watch(60);
  EXPECT_TRUE(work.WaitForStall());
  EXPECT_GE(steady_clock::now() - begin, milliseconds(60));
  std::this_thread::sleep_for(milliseconds(150));
  EXPECT_EQ(work.num_stalls, 1);
}

TEST(StallWatch, WorkThatGetsFurtherMayTakeAsLongAsItLikes) {
  constexpr int64_t kTimeoutMs = 100;
  Watched work;
  // It has got further whenever the watch looks, however seldom that is on a busy machine.
  std::atomic<bool> gets_further = true;
  const StallWatch watch(
      kTimeoutMs, [&] { return gets_further ? ++work.progress : work.progress.load(); },
      [&] { ++work.num_stalls; });
  const auto begin = steady_clock::now();
  uint64_t num_looks = 0;
  while (num_looks < 30 || steady_clock::now() - begin < milliseconds(5 * kTimeoutMs)) {
    std::this_thread::sleep_for(milliseconds(1));
    num_looks = work.progress;
  }
  EXPECT_EQ(work.num_stalls, 0);
  gets_further = false;
  EXPECT_TRUE(work.WaitForStall()) << "and no further";
}

TEST(StallWatch, WorkThatIsDoneIsNotWatchedAnyMore) {
  Watched work;
  { const StallWatch watch = work.Watch(50); }
  std::this_thread::sleep_for(milliseconds(150));
  EXPECT_EQ(work.num_stalls, 0);
}

TEST(StallWatch, WithoutATimeoutNothingIsWatched) {
  Watched work;
  const StallWatch watch = work.Watch(0);
  std::this_thread::sleep_for(milliseconds(50));
  EXPECT_EQ(work.num_stalls, 0);
}

}  // namespace
}  // namespace wintserve
