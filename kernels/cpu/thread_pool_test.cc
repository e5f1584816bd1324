#include "kernels/cpu/thread_pool.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "kernels/cpu/work_split.h"

namespace wintserve::kernels::cpu {
namespace {

constexpr int64_t kMuchWork = int64_t{1} << 30;

TEST(ThreadPool, RunsEveryItemExactlyOnceThoughLoopsFollowEachOtherClosely) {
  for (const int threads : {1, 2, 3, 8}) {
    SCOPED_TRACE(threads);
    ThreadPool pool(threads);
    for (int loop = 0; loop < 3000; ++loop) {
      const int64_t num_items = loop % 37;
      std::vector<std::atomic<int>> runs(num_items);
      pool.Run(num_items, kMuchWork, [&](int64_t item, int thread) {
        EXPECT_TRUE(thread >= 0 && thread < threads);
        runs[item].fetch_add(1, std::memory_order_relaxed);
      });
      for (const auto& count : runs) ASSERT_EQ(count.load(), 1);
    }
  }
}

// A worker that is late at the end of a short loop finds a longer one about to begin. Nothing is
// looked at between loops, so that this happens often.
TEST(ThreadPool, AWorkerThatIsLateAtTheEndOfALoopClaimsNothingOfTheNext) {
  constexpr int kLoops = 500'000;
  constexpr int64_t kFewItems = 2;
  constexpr int64_t kManyItems = 32;
  for (const int threads : {2, 6}) {
    SCOPED_TRACE(threads);
    ThreadPool pool(threads);
    std::vector<std::atomic<int>> runs(kManyItems);
    const auto run = [&](int64_t item, int) { runs[item].fetch_add(1, std::memory_order_relaxed); };
    for (int loop = 0; loop < kLoops; ++loop) {
      pool.Run(loop % 2 == 0 ? kFewItems : kManyItems, kMuchWork, run);
    }
    for (int64_t item = 0; item < kManyItems; ++item) {
      ASSERT_EQ(runs[item].load(), item < kFewItems ? kLoops : kLoops / 2) << "item " << item;
    }
  }
}

TEST(ThreadPool, WhatItemsWroteIsVisibleAfterTheLoop) {
  ThreadPool pool(4);
  std::vector<int64_t> values(101);
  for (int64_t loop = 1; loop < 2000; ++loop) {
    pool.Run(101, kMuchWork, [&](int64_t item, int) { values[item] += item; });
    for (int64_t item = 0; item < 101; ++item) ASSERT_EQ(values[item], loop * item);
  }
}

TEST(ThreadPool, NoTwoItemsShareAThreadAtOnce) {
  ThreadPool pool(4);
  std::vector<std::atomic<bool>> busy(4);
  pool.Run(500, kMuchWork, [&](int64_t, int thread) {
    EXPECT_FALSE(busy[thread].exchange(true));
    busy[thread].store(false);
  });
}

TEST(ThreadPool, SleepingWorkersTakePartInTheNextLoop) {
  ThreadPool pool(2);
  for (int loop = 0; loop < 5; ++loop) {
    // Longer than any worker looks for news.
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
    // Each item waits for the other, so the loop ends only if both threads run it.
    std::atomic<int> arrived{0};
    pool.Run(2, kMuchWork, [&](int64_t, int) {
      arrived.fetch_add(1);
      while (arrived.load() < 2) std::this_thread::yield();
    });
    EXPECT_EQ(arrived.load(), 2);
  }
}

TEST(ThreadPool, SmallLoopsStayOnTheCaller) {
  ThreadPool pool(4);
  pool.Run(100, kMinParallelMultiplyAdds - 1, [](int64_t, int thread) { EXPECT_EQ(thread, 0); });
}

TEST(PickItemRows, SplitsRowsOnlyWhenTilesLeaveThreadsIdle) {
  EXPECT_EQ(PickItemRows(/*num_tiles=*/100, /*num_rows=*/256, /*num_threads=*/8, 256), 256);
  EXPECT_EQ(PickItemRows(1, 256, 1, 256), 256);
  EXPECT_EQ(PickItemRows(1, 256, 2, 256), 32);
  EXPECT_EQ(PickItemRows(4, 256, 2, 256), 128);
  EXPECT_EQ(PickItemRows(1, 3, 8, 256), 32);
  EXPECT_EQ(PickItemRows(1, 3, 8, 3), 3);
}

}  // namespace
}  // namespace wintserve::kernels::cpu
