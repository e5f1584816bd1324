#include "cache_manager/core/block_pool.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>
#include <set>
#include <utility>
#include <vector>

namespace wintserve {
namespace {

using enum BlockState;

TEST(BlockPool, TakesTheBlockThatBecameFreeLast) {
  BlockPool pool(3);
  EXPECT_EQ(pool.TakeFree(kLeased), (PoolBlock{0, 1}));
  EXPECT_EQ(pool.TakeFree(kLeased), (PoolBlock{1, 1}));
  pool.Move(0, kLeased, kFree);
  EXPECT_EQ(pool.TakeFree(kLeased), (PoolBlock{0, 2}));
  EXPECT_EQ(pool.TakeFree(kLeased), (PoolBlock{2, 1}));
  EXPECT_EQ(pool.TakeFree(kLeased), std::nullopt);
}

TEST(BlockPool, RaisesTheGenerationWhenABlockBecomesFreeAndOnlyThen) {
  BlockPool pool(1);
  pool.TakeFree(kLeased);
  pool.Move(0, kLeased, kCommitted);
  pool.Move(0, kCommitted, kCopyingOut);
  pool.Move(0, kCopyingOut, kCommitted);
  EXPECT_EQ(pool.Named(0).generation, 1u);
  pool.Move(0, kCommitted, kFree);
  EXPECT_EQ(pool.Named(0).generation, 2u);
  pool.TakeFree(kRestoring);
  pool.Move(0, kRestoring, kQuarantined);
  EXPECT_EQ(pool.Named(0).generation, 2u);
  pool.Move(0, kQuarantined, kFree);
  EXPECT_EQ(pool.Named(0).generation, 3u);
}

struct BadBlock {
  const char* name;
  PoolBlock block;  // of a pool of 3: 0 is free at generation 2, 1 committed, 2 free
  absl::StatusCode code;
  const char* text;
};

class RefusedBlock : public testing::TestWithParam<BadBlock> {};

TEST_P(RefusedBlock, IsNamed) {
  BlockPool pool(3);
  pool.TakeFree(kLeased);
  pool.TakeFree(kLeased);
  pool.Move(0, kLeased, kFree);
  pool.Move(1, kLeased, kCommitted);
  const absl::Status status = pool.CheckLeased(GetParam().block);
  EXPECT_EQ(status.code(), GetParam().code);
  EXPECT_EQ(status.message(), GetParam().text);
}

INSTANTIATE_TEST_SUITE_P(
    All, RefusedBlock,
    testing::Values(BadBlock{"Stale",
                             {0, 1},
                             absl::StatusCode::kFailedPrecondition,
                             "block 0 of generation 1 is stale: the block has reached "
                             "generation 2"},
                    BadBlock{"Committed",
                             {1, 1},
                             absl::StatusCode::kFailedPrecondition,
                             "block 1 is not leased but committed"},
                    BadBlock{"Free",
                             {2, 1},
                             absl::StatusCode::kFailedPrecondition,
                             "block 2 is not leased but free"},
                    BadBlock{"BeyondThePool",
                             {3, 1},
                             absl::StatusCode::kInvalidArgument,
                             "block 3 is not in the pool, which has 0 to 2"},
                    BadBlock{"Negative",
                             {-1, 1},
                             absl::StatusCode::kInvalidArgument,
                             "block -1 is not in the pool, which has 0 to 2"}),
    [](const auto& info) { return info.param.name; });

TEST(BlockPool, CountsStaleNames) {
  BlockPool pool(1);
  pool.TakeFree(kLeased);
  pool.Move(0, kLeased, kFree);
  EXPECT_FALSE(pool.CheckCurrent({0, 1}).ok());
  EXPECT_TRUE(pool.CheckCurrent({0, 2}).ok());
  EXPECT_EQ(pool.num_refused_stale(), 1u);
}

TEST(BlockPoolDeathTest, ATransitionOutsideTheLifeCycleIsABug) {
  BlockPool pool(1);
  EXPECT_DEATH(pool.Move(0, kFree, kCommitted), "block 0, which is free, from free to committed");
  EXPECT_DEATH(pool.Move(0, kLeased, kFree), "block 0, which is free, from leased to free");
}

TEST(BlockPool, NeverLosesOrDoublesABlock) {
  const std::vector<std::pair<BlockState, BlockState>> transitions = {
      {kLeased, kFree},          {kLeased, kCommitted},     {kLeased, kQuarantined},
      {kRestoring, kCommitted},  {kRestoring, kFree},       {kRestoring, kQuarantined},
      {kCommitted, kCopyingOut}, {kCopyingOut, kCommitted}, {kCommitted, kFree},
      {kQuarantined, kFree}};
  const uint32_t seed = std::random_device{}();
  SCOPED_TRACE(fmt::format("seed={}", seed));
  std::mt19937 rng(seed);
  BlockPool pool(12);
  std::set<int32_t> taken;
  for (int step = 0; step < 20'000; ++step) {
    if (rng() % 2 == 0) {
      const auto block = pool.TakeFree(rng() % 2 == 0 ? kLeased : kRestoring);
      ASSERT_EQ(block.has_value(), taken.size() < 12);
      if (block.has_value()) {
        ASSERT_TRUE(taken.insert(block->id).second) << "block " << block->id << " is out twice";
      }
    } else {
      const int32_t id = static_cast<int32_t>(rng() % 12);
      const auto [from, to] = transitions[rng() % transitions.size()];
      if (pool.state(id) != from) continue;
      pool.Move(id, from, to);
      if (to == kFree) taken.erase(id);
    }
    ASSERT_EQ(pool.num_in(kFree), 12 - taken.size());
    ASSERT_TRUE(pool.CheckInvariants().ok()) << pool.CheckInvariants();
  }
}

}  // namespace
}  // namespace wintserve
