// What a host tier is worth: how much of prompts that come again is found, with the tier and
// without, when they are half as much again as the pool.
#include <gtest/gtest.h>

#include <functional>
#include <numeric>
#include <random>
#include <vector>

#include "cache_manager/core/prefix_cache.h"
#include "cache_manager/core/prefix_cache_test_util.h"

namespace wintserve {
namespace {

constexpr uint32_t kNumBlocks = 32;
constexpr int kBlocksPerPrompt = 4;
constexpr int kNumPrompts = 3 * kNumBlocks / 2 / kBlocksPerPrompt;

// Each prompt is used alone, and all copies are done before the next. Write-backs run ahead by the
// default distance.
class ReusedPrompts {
 public:
  explicit ReusedPrompts(uint32_t num_host_slots)
      : cache_(kNumBlocks, num_host_slots, &Xxh3ChainHash,
               DefaultWriteBackAhead(kNumBlocks, num_host_slots)) {}

  // Of `num_uses` uses, after as many to warm up: the part of the blocks that was cached.
  double HitRate(const std::function<int()>& next_prompt, int num_uses) {
    for (int i = 0; i < num_uses; ++i) Use(next_prompt());
    int num_hits = 0;
    for (int i = 0; i < num_uses; ++i) num_hits += Use(next_prompt());
    return static_cast<double>(num_hits) / (num_uses * kBlocksPerPrompt);
  }

 private:
  // Returns how many of its blocks are not computed again.
  int Use(int prompt) {
    std::vector<int32_t> ids(kBlocksPerPrompt);
    std::iota(ids.begin(), ids.end(), prompt * kBlocksPerPrompt);
    const MatchResult match = cache_.Match(ids);
    std::vector<uint64_t> entries;
    for (const PinnedBlock& block : match.device) entries.push_back(block.entry);
    for (const PinnedBlock& block : match.restoring) entries.push_back(block.entry);
    for (const CopyOrder& copy : match.copies) {
      EXPECT_EQ(cache_->CopyDone(copy.copy_id), absl::OkStatus());
    }
    const auto num_cached = static_cast<int>(entries.size());
    ids.erase(ids.begin(), ids.begin() + num_cached);
    if (!ids.empty()) {
      const uint64_t parent = entries.empty() ? 0 : entries.back();
      for (const uint64_t entry : cache_.Store(ids, parent)) entries.push_back(entry);
    }
    cache_.Release(entries);
    cache_.WriteBack();
    return num_cached;
  }

  TestCache cache_;
};

double RandomHitRate(uint32_t num_host_slots) {
  std::mt19937 rng(1);
  return ReusedPrompts(num_host_slots)
      .HitRate([&rng] { return static_cast<int>(rng() % kNumPrompts); }, 100 * kNumPrompts);
}

double CyclicHitRate(uint32_t num_host_slots) {
  int i = 0;
  return ReusedPrompts(num_host_slots)
      .HitRate([&i] { return i++ % kNumPrompts; }, 10 * kNumPrompts);
}

// The pool holds 8 of the 12 prompts. With half as many host slots all 12 would fit, were it not
// for the one that is about to go, which is on both tiers.
TEST(HostTierOfHalfThePool, HoldsNearlyAllThatThePoolDoesNot) {
  const double without = RandomHitRate(0);
  const double with = RandomHitRate(kNumBlocks / 2);
  EXPECT_LT(without, 9.0 / kNumPrompts);
  EXPECT_GT(with, 10.0 / kNumPrompts);
}

// The worst for an order of use: what comes next is what went last. It takes a tier that holds the
// rest and what is about to go.
TEST(HostTierOfThreeQuartersOfThePool, FindsEverythingInACycleThatFindsNothingInThePool) {
  EXPECT_EQ(CyclicHitRate(0), 0);
  EXPECT_EQ(CyclicHitRate(3 * kNumBlocks / 4), 1);
}

}  // namespace
}  // namespace wintserve
