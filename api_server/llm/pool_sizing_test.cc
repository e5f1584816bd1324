#include "api_server/llm/pool_sizing.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace wintserve {
namespace {

constexpr uint64_t kGiB = uint64_t{1} << 30;

// 33 blocks of 2 x 1 MiB for a sequence.
PoolSizing Sizing() {
  return {.max_num_seqs = 16,
          .max_model_len = 2100,
          .block_size_tokens = 64,
          .block_bytes_by_rank = {1 << 20, 1 << 20},
          .available_bytes_by_rank = {64 * kGiB, 64 * kGiB}};
}

TEST(PoolSizing, TakesWhatAllSequencesNeedWhenThatIsLeast) {
  EXPECT_EQ(*DecideNumBlocks(Sizing()), 16u * 33);
}

TEST(PoolSizing, TakesAtMostFourGiBOverAllRanks) {
  PoolSizing sizing = Sizing();
  sizing.max_num_seqs = 1000;
  EXPECT_EQ(*DecideNumBlocks(sizing), 2048u);
}

TEST(PoolSizing, TakesAtMostAQuarterOfTheMemoryForAllRanksTogether) {
  PoolSizing sizing = Sizing();
  sizing.available_bytes_by_rank = {kGiB, kGiB};
  EXPECT_EQ(*DecideNumBlocks(sizing), 128u);
}

TEST(PoolSizing, CountsTheLeastMemoryThatARankHasFound) {
  PoolSizing sizing = Sizing();
  sizing.available_bytes_by_rank = {64 * kGiB, kGiB};
  EXPECT_EQ(*DecideNumBlocks(sizing), 128u);
  sizing.available_bytes_by_rank = {kGiB, 64 * kGiB};
  EXPECT_EQ(*DecideNumBlocks(sizing), 128u);
}

TEST(PoolSizing, GpusGiveAllThatIsLeftOnTheFullest) {
  PoolSizing sizing = Sizing();
  sizing.ranks_share_memory = false;
  sizing.block_bytes_by_rank = {1 << 20, 2 << 20};
  EXPECT_EQ(*DecideNumBlocks(sizing), 32u * 1024);
  sizing.available_bytes_by_rank = {5 * kGiB + 1, 64 * kGiB};
  EXPECT_EQ(*DecideNumBlocks(sizing), 5u * 1024);
  sizing.available_bytes_by_rank = {64 * kGiB, 65 << 20};
  EXPECT_EQ(DecideNumBlocks(sizing).status().message(),
            "65 MiB of a GPU's memory are left for the KV pool: 32 blocks, a sequence of "
            "--max-model-len 2100 needs 33: raise --gpu-memory-utilization or lower "
            "--max-model-len");
  sizing.num_blocks_override = 33;
  EXPECT_EQ(*DecideNumBlocks(sizing), 33u);
}

TEST(PoolSizing, TheOverrideReplacesAllThree) {
  PoolSizing sizing = Sizing();
  sizing.num_blocks_override = 100'000;
  sizing.available_bytes_by_rank = {0, 0};
  EXPECT_EQ(*DecideNumBlocks(sizing), 100'000u);
}

TEST(PoolSizing, RefusesAPoolThatHoldsNoSequence) {
  PoolSizing sizing = Sizing();
  sizing.available_bytes_by_rank = {128 << 20, 128 << 20};
  EXPECT_EQ(DecideNumBlocks(sizing).status().message(),
            "the KV pool of 32 MiB (a quarter of the memory that is available, at most 4096 MiB) "
            "holds 16 blocks of 2048 KiB, a sequence of --max-model-len 2100 needs 33: lower "
            "--max-model-len or set --num-gpu-blocks-override");
  sizing.num_blocks_override = 32;
  EXPECT_EQ(DecideNumBlocks(sizing).status().message(),
            "--num-gpu-blocks-override 32 holds no sequence of --max-model-len 2100: 33 blocks of "
            "64 tokens are needed");
}

}  // namespace
}  // namespace wintserve
