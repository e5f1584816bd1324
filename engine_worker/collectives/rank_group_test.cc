#include "engine_worker/collectives/rank_group.h"

#include <gtest/gtest.h>

#include <memory>

namespace wintserve {
namespace {

// Counts aborts where they can be seen when it is gone.
class CountingCollective : public Collective {
 public:
  explicit CountingCollective(int* num_aborts) : num_aborts_(num_aborts) {}
  int rank() const override { return 1; }
  int world_size() const override { return 2; }
  absl::Status AllReduceSum(float*, int64_t) override { return absl::OkStatus(); }
  absl::Status AllGather(const float*, int64_t, float*) override { return absl::OkStatus(); }
  absl::Status Broadcast(void*, int64_t) override { return absl::OkStatus(); }
  void Abort() override { ++*num_aborts_; }

 private:
  int* const num_aborts_;
};

TEST(RankGroup, TakesOneIncarnationAfterTheOther) {
  RankGroup group(1, 2);
  float value = 0;
  EXPECT_EQ(group.AllReduceSum(&value, 1).code(), absl::StatusCode::kFailedPrecondition);
  int num_aborts[2] = {0, 0};
  for (int& count : num_aborts) {
    group.BeginJoin();
    group.Bind(std::make_unique<CountingCollective>(&count));
    EXPECT_TRUE(group.AllReduceSum(&value, 1).ok());
    EXPECT_EQ(count, 0);
    group.Abort();
    EXPECT_EQ(count, 1);
    group.Unbind();
    EXPECT_EQ(group.AllReduceSum(&value, 1).code(), absl::StatusCode::kFailedPrecondition);
  }
  EXPECT_EQ(num_aborts[0], 1);
}

TEST(RankGroup, AnAbortEndsTheWaitForAGroupAndTheGroupThatComesNevertheless) {
  RankGroup group(1, 2);
  group.BeginJoin();
  int num_waits_ended = 0;
  group.SetJoinAbort([&] { ++num_waits_ended; });
  group.Abort();
  EXPECT_EQ(num_waits_ended, 1);
  int num_aborts = 0;
  group.Bind(std::make_unique<CountingCollective>(&num_aborts));
  EXPECT_EQ(num_aborts, 1);
  group.Abort();
  EXPECT_EQ(num_waits_ended, 1);  // that wait is over
  EXPECT_EQ(num_aborts, 2);
}

TEST(RankGroup, AnAbortBeforeTheWaitEndsItAsItBegins) {
  RankGroup group(1, 2);
  group.BeginJoin();
  group.Abort();
  int num_waits_ended = 0;
  group.SetJoinAbort([&] { ++num_waits_ended; });
  EXPECT_EQ(num_waits_ended, 1);

  group.Unbind();
  group.BeginJoin();
  group.SetJoinAbort([&] { ++num_waits_ended; });
  EXPECT_EQ(num_waits_ended, 1);  // the abort was of the one before
}

}  // namespace
}  // namespace wintserve
