#include "kernels/plan/float_product_plan.h"

#include <gtest/gtest.h>

namespace wintserve::kernels::plan {
namespace {

TEST(FloatProductPlan, BlocksCoverEveryRowColumnAndSlice) {
  for (const int64_t rows : {1, 7, 8, 9, 32, 33, 100, 2048, 8192}) {
    for (const int64_t k : {1, 64, 255, 256, 257, 384, 8192}) {
      for (const int64_t n : {1, 5, 16, 64, 65, 2560}) {
        const FloatProductPlan plan = PlanFloatProduct(rows, k, n, 132);
        EXPECT_GE(int64_t{plan.grid_row_blocks} * plan.block_rows, rows);
        EXPECT_LT(int64_t{plan.grid_row_blocks - 1} * plan.block_rows, rows);
        EXPECT_GE(int64_t{plan.grid_column_blocks} * kFloatColumns, n);
        EXPECT_GE(int64_t{plan.num_slices} * kFloatSliceRows, k);
        EXPECT_LT(int64_t{plan.num_slices - 1} * kFloatSliceRows, k);
        EXPECT_GE(plan.num_sums * plan.slices_per_block, plan.num_slices);
        EXPECT_LT((plan.num_sums - 1) * plan.slices_per_block, plan.num_slices);
        // A block has slices of one section, or whole ones.
        EXPECT_TRUE(plan.slices_per_block == 1 || plan.slices_per_block == kFloatSectionSlices ||
                    plan.num_sums == 1);
        EXPECT_EQ(plan.sums_per_section(), plan.slices_per_block == 1 ? kFloatSectionSlices : 1);
      }
    }
  }
}

TEST(FloatProductPlan, OneTokenOfALargeRouterGetsABlockForEverySlice) {
  const FloatProductPlan plan = PlanFloatProduct(1, 8192, 64, 132);
  EXPECT_EQ(plan.num_sums, 128);
  EXPECT_EQ(plan.slices_per_block, 1);
  EXPECT_EQ(plan.block_rows, kFewRows);
}

TEST(FloatProductPlan, APromptOfALargeRouterLeavesASumForEverySection) {
  const FloatProductPlan plan = PlanFloatProduct(2048, 8192, 64, 132);
  EXPECT_EQ(plan.num_sums, 16);
  EXPECT_EQ(plan.slices_per_block, kFloatSectionSlices);
  EXPECT_EQ(plan.block_rows, kManyRows);
}

TEST(FloatProductPlan, ManyTokensNeedNoPartialSums) {
  const FloatProductPlan plan = PlanFloatProduct(16384, 8192, 64, 132);
  EXPECT_FALSE(plan.is_split());
  EXPECT_EQ(plan.block_rows, kManyRows);
  EXPECT_EQ(FloatPartials(plan, 16384, 64), 0);
}

// Rows of a block do not enter the sums, but a bound on the partial sums' memory matters.
TEST(FloatProductPlan, PartialSumsStaySmall) {
  for (int64_t rows = 1; rows <= 16384; rows += 13) {
    for (const int64_t n : {16, 64, 128, 8192}) {
      const FloatProductPlan plan = PlanFloatProduct(rows, 8192, n, 132);
      EXPECT_LE(FloatPartials(plan, rows, n) * 4, int64_t{80} << 20) << rows << " " << n;
    }
  }
}

}  // namespace
}  // namespace wintserve::kernels::plan
