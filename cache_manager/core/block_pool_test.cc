#include "cache_manager/core/block_pool.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <set>
#include <string>

namespace wintserve {
namespace {

using ::testing::ElementsAre;

std::vector<PoolBlock> LeaseOrDie(BlockPool* pool, uint32_t count) {
  auto leased = pool->Lease(count);
  EXPECT_TRUE(leased.ok()) << leased.status();
  return *leased;
}

TEST(BlockPool, LeasesAllOrNothing) {
  BlockPool pool(4);
  LeaseOrDie(&pool, 3);
  const auto refused = pool.Lease(2);
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(refused.status().message(), "a lease of 2 blocks; 1 of 4 are free");
  EXPECT_EQ(pool.num_free(), 1u);
  EXPECT_EQ(pool.num_leased(), 3u);
}

TEST(BlockPool, GivesAReturnedBlockTheNextGeneration) {
  BlockPool pool(1);
  const auto first = LeaseOrDie(&pool, 1);
  EXPECT_THAT(first, ElementsAre(PoolBlock{0, 1}));
  ASSERT_TRUE(pool.Return(first).ok());
  EXPECT_THAT(LeaseOrDie(&pool, 1), ElementsAre(PoolBlock{0, 2}));
}

struct BadReturn {
  const char* name;
  std::vector<PoolBlock> blocks;  // of a pool of 4 that leases 0, 1 (generation 2) and 2, keeps 3
  absl::StatusCode code;
  const char* text;
};

class RefusedReturn : public testing::TestWithParam<BadReturn> {};

TEST_P(RefusedReturn, HasNoEffectAndNamesTheBlock) {
  BlockPool pool(4);
  LeaseOrDie(&pool, 2);
  ASSERT_TRUE(pool.Return(std::vector<PoolBlock>{{1, 1}}).ok());
  ASSERT_THAT(LeaseOrDie(&pool, 2), ElementsAre(PoolBlock{1, 2}, PoolBlock{2, 1}));

  const absl::Status status = pool.Return(GetParam().blocks);
  EXPECT_EQ(status.code(), GetParam().code);
  EXPECT_EQ(status.message(), GetParam().text);
  EXPECT_EQ(pool.num_free(), 1u);
  EXPECT_EQ(pool.num_leased(), 3u);
  EXPECT_TRUE(pool.Return(std::vector<PoolBlock>{{0, 1}, {1, 2}, {2, 1}}).ok());
}

INSTANTIATE_TEST_SUITE_P(
    All, RefusedReturn,
    testing::Values(
        BadReturn{"StaleGeneration",
                  {{0, 1}, {1, 1}},
                  absl::StatusCode::kFailedPrecondition,
                  "block 1 of generation 1 is stale: the block has reached generation 2"},
        BadReturn{"NotLeased",
                  {{0, 1}, {3, 1}},
                  absl::StatusCode::kFailedPrecondition,
                  "block 3 is not leased"},
        BadReturn{"NamedTwice",
                  {{0, 1}, {2, 1}, {0, 1}},
                  absl::StatusCode::kInvalidArgument,
                  "block 0 is returned twice"},
        BadReturn{"BeyondThePool",
                  {{0, 1}, {4, 1}},
                  absl::StatusCode::kInvalidArgument,
                  "block 4 is not in the pool, which has 0 to 3"},
        BadReturn{"Negative",
                  {{0, 1}, {-1, 1}},
                  absl::StatusCode::kInvalidArgument,
                  "block -1 is not in the pool, which has 0 to 3"}),
    [](const auto& info) { return info.param.name; });

TEST(BlockPool, RefusesALeaseOfNothing) {
  BlockPool pool(4);
  EXPECT_EQ(pool.Lease(0).status().message(), "a lease of 0 blocks; at least 1");
}

// The pool written the obvious way: which generation each block has, and which blocks are out.
struct NaivePool {
  std::map<int32_t, uint32_t> generation;
  std::set<int32_t> leased;

  explicit NaivePool(int32_t num_blocks) {
    for (int32_t id = 0; id < num_blocks; ++id) generation[id] = 1;
  }
  bool CanReturn(const std::vector<PoolBlock>& blocks) const {
    std::set<int32_t> distinct;
    for (const PoolBlock& block : blocks) {
      if (!leased.contains(block.id) || generation.at(block.id) != block.generation) return false;
      if (!distinct.insert(block.id).second) return false;
    }
    return true;
  }
};

TEST(BlockPool, NeverLosesOrDoublesABlock) {
  const uint32_t seed = std::random_device{}();
  SCOPED_TRACE(fmt::format("seed={}", seed));
  std::mt19937 rng(seed);
  constexpr int32_t kNumBlocks = 12;
  BlockPool pool(kNumBlocks);
  NaivePool naive(kNumBlocks);
  int num_refused_returns = 0;
  for (int step = 0; step < 20'000; ++step) {
    if (rng() % 2 == 0) {
      const uint32_t count = 1 + rng() % 5;
      const bool fits = count <= kNumBlocks - naive.leased.size();
      const auto leased = pool.Lease(count);
      ASSERT_EQ(leased.ok(), fits) << "step " << step;
      if (!fits) continue;
      ASSERT_EQ(leased->size(), count);
      for (const PoolBlock& block : *leased) {
        ASSERT_TRUE(naive.leased.insert(block.id).second)
            << "block " << block.id << " is out twice";
        ASSERT_EQ(block.generation, naive.generation.at(block.id));
      }
    } else {
      // Mostly leased blocks of the right generation; now and then a stale, free or repeated one.
      std::vector<PoolBlock> blocks;
      for (int32_t id = 0; id < kNumBlocks; ++id) {
        const bool bad = rng() % 64 == 0;
        if (rng() % 3 != 0 || (!naive.leased.contains(id) && !bad)) continue;
        blocks.push_back({id, naive.generation.at(id) - (bad && rng() % 2 == 0 ? 1u : 0u)});
        if (bad && rng() % 2 == 0) blocks.push_back(blocks.front());
      }
      std::shuffle(blocks.begin(), blocks.end(), rng);
      const bool returnable = naive.CanReturn(blocks);
      ASSERT_EQ(pool.Return(blocks).ok(), returnable) << "step " << step;
      if (!returnable) {
        ++num_refused_returns;
        continue;
      }
      for (const PoolBlock& block : blocks) {
        naive.leased.erase(block.id);
        ++naive.generation[block.id];
      }
    }
    ASSERT_EQ(pool.num_leased(), naive.leased.size()) << "step " << step;
    ASSERT_EQ(pool.num_free() + pool.num_leased(), pool.num_blocks()) << "step " << step;
  }
  EXPECT_GT(num_refused_returns, 100);
}

}  // namespace
}  // namespace wintserve
