#include "kernels/plan/sampling_plan.h"

#include <gtest/gtest.h>

#include <string>

namespace wintserve::kernels::plan {
namespace {

constexpr int kErnieVocabulary = 103'424;
constexpr int kFixedBytes = 40'000;  // about what the selection needs
constexpr SamplingDevice kHopper = {.num_sms = 132,
                                    .max_shared_bytes_per_block = 227 << 10,
                                    .max_shared_bytes_per_sm = 228 << 10,
                                    .max_blocks_per_row = 8};
constexpr SamplingDevice kAmpere = {.num_sms = 108,
                                    .max_shared_bytes_per_block = 163 << 10,
                                    .max_shared_bytes_per_sm = 164 << 10,
                                    .max_blocks_per_row = 1};

TEST(SamplingPlan, GivesEveryIdToOneBlockAndFitsIntoSharedMemory) {
  for (const SamplingDevice& device : {kHopper, kAmpere}) {
    for (const int num_rows : {1, 2, 7, 16, 17, 64, 66, 67, 132, 133, 256}) {
      for (const int vocabulary :
           {1, 127, 128, 129, 4096, 8191, 8192, 100'295, kErnieVocabulary, 1 << 17}) {
        SCOPED_TRACE(std::to_string(num_rows) + " rows of " + std::to_string(vocabulary));
        const SamplingPlan plan = PlanSampling(num_rows, vocabulary, kFixedBytes, device);
        EXPECT_GE(plan.blocks_per_row, 1);
        EXPECT_LE(plan.blocks_per_row, device.max_blocks_per_row);
        EXPECT_EQ(plan.ids_per_block % kSamplingChunk, 0);
        EXPECT_GE(plan.ids_per_block * plan.blocks_per_row, vocabulary);
        // No block is empty.
        EXPECT_LT(plan.ids_per_block * (plan.blocks_per_row - 1), vocabulary);
        EXPECT_GE(plan.num_cached, 0);
        EXPECT_LE(plan.num_cached, plan.ids_per_block);
        EXPECT_EQ(plan.num_cached % kSamplingChunk, 0);
        EXPECT_LE(plan.shared_bytes(), device.max_shared_bytes_per_block);
        if (num_rows * plan.blocks_per_row > device.num_sms) {
          EXPECT_LE(2 * (plan.shared_bytes() + 1024), device.max_shared_bytes_per_sm);
        }
        EXPECT_GE(plan.marks_offset(), kFixedBytes + plan.num_chunks() * 8);
        EXPECT_GE(plan.cache_offset(), plan.marks_offset() + plan.ids_per_block / 8);
        EXPECT_EQ(plan.marks_offset() % 16, 0);
        EXPECT_EQ(plan.cache_offset() % 16, 0);
      }
    }
  }
}

TEST(SamplingPlan, SpreadsFewLongRowsOverManyBlocks) {
  const auto blocks = [](int num_rows, int vocabulary, const SamplingDevice& device) {
    return PlanSampling(num_rows, vocabulary, kFixedBytes, device).blocks_per_row;
  };
  EXPECT_EQ(blocks(1, kErnieVocabulary, kHopper), 8);
  EXPECT_EQ(blocks(16, kErnieVocabulary, kHopper), 8);
  EXPECT_EQ(blocks(17, kErnieVocabulary, kHopper), 4);
  EXPECT_EQ(blocks(64, kErnieVocabulary, kHopper), 2);
  EXPECT_EQ(blocks(67, kErnieVocabulary, kHopper), 1);
  EXPECT_EQ(blocks(1, 8192, kHopper), 2);
  EXPECT_EQ(blocks(1, 8191, kHopper), 1);
  EXPECT_EQ(blocks(1, kErnieVocabulary, kAmpere), 1);
}

TEST(SamplingPlan, CachesAllOrMostOfARowThatIsDivided) {
  const SamplingPlan by_8 = PlanSampling(8, kErnieVocabulary, kFixedBytes, kHopper);
  EXPECT_EQ(by_8.num_cached, by_8.ids_per_block);
  const SamplingPlan by_2 = PlanSampling(64, kErnieVocabulary, kFixedBytes, kHopper);
  EXPECT_GT(by_2.num_cached, by_2.ids_per_block * 8 / 10);
}

}  // namespace
}  // namespace wintserve::kernels::plan
