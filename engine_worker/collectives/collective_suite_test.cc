#include <gmock/gmock.h>

#include "engine_worker/collectives/collective_suite_test_util.h"

namespace wintserve {
namespace {

constexpr auto kAbortTime = std::chrono::seconds(2);

TEST_P(CollectiveSuite, EveryRankGetsTheBitsOfTheRankOrderSum) {
  OnThreads([](TestRank& rank) {
    EXPECT_EQ(RunMix(rank, GetParam().num_operations, GetParam().counts), "");
  });
}

TEST_P(CollectiveSuite, RanksThatComeAtDifferentTimesGetTheSame) {
  OnThreads([](TestRank& rank) {
    EXPECT_EQ(RunMix(rank, GetParam().num_operations, {1, 255, 256, 4096}, /*max_pause_us=*/300),
              "");
  });
}

TEST_P(CollectiveSuite, AbortWakesEveryRankThatWaits) {
  const CollectiveKind& kind = GetParam();
  for (const int64_t count : {int64_t{1}, int64_t{4} << 20}) {
    const auto memory = NewGroupMemory(kind);
    std::vector<std::thread> waiting;
    std::atomic<int> num_joined = 0;
    for (int rank = 1; rank < kind.world_size; ++rank) {
      waiting.emplace_back([&, rank] {
        const auto self = kind.join(memory, rank, kind.world_size);
        std::vector<float> data(count, 1.0f);
        ++num_joined;
        const absl::Status status = self->AllReduceSum(&data);
        EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
      });
    }
    const auto absent = kind.join(memory, 0, kind.world_size);
    while (num_joined < kind.world_size - 1) std::this_thread::yield();
    std::this_thread::sleep_for(std::chrono::milliseconds(5));  // most will be waiting by then
    const auto begin = std::chrono::steady_clock::now();
    absent->collective().Abort();
    for (std::thread& thread : waiting) thread.join();
    EXPECT_LT(std::chrono::steady_clock::now() - begin, kAbortTime);
    std::vector<float> data(count, 1.0f);
    EXPECT_EQ(absent->AllReduceSum(&data).code(), absl::StatusCode::kUnavailable);
  }
}

TEST_P(CollectiveSuite, ARankThatLeavesEndsTheWaitOfTheOthers) {
  const CollectiveKind& kind = GetParam();
  const auto memory = NewGroupMemory(kind);
  std::vector<std::thread> waiting;
  for (int rank = 1; rank < kind.world_size; ++rank) {
    waiting.emplace_back([&, rank] {
      const auto self = kind.join(memory, rank, kind.world_size);
      std::vector<float> data(1);
      EXPECT_EQ(self->AllReduceSum(&data).code(), absl::StatusCode::kUnavailable);
    });
  }
  kind.join(memory, 0, kind.world_size).reset();
  for (std::thread& thread : waiting) thread.join();
}

TEST_P(CollectiveSuite, APeerThatLeavesAfterTheLastRoundDoesNotSpoilIt) {
  for (int i = 0; i < GetParam().num_groups; ++i) {
    OnThreads([](TestRank& rank) {
      std::vector<float> data(4, 1.0f);
      EXPECT_TRUE(rank.AllReduceSum(&data).ok());
      EXPECT_THAT(data, testing::Each(static_cast<float>(GetParam().world_size)));
    });
  }
}

}  // namespace
}  // namespace wintserve
