#include "kernels/plan/product_plan.h"

#include <gtest/gtest.h>

#include <set>
#include <utility>

namespace wintserve::kernels::plan {
namespace {

using formats::WeightFormat;

constexpr int kMultiprocessors = 132;

TEST(NumSlices, KeepsTheSlicesOfKnownShapesEven) {
  EXPECT_EQ(NumSlices(8192 / 128), 8);   // 300B gate-up: 8 chunks each
  EXPECT_EQ(NumSlices(3584 / 128), 4);   // 300B down: 7
  EXPECT_EQ(NumSlices(1792 / 128), 2);   // on two ranks: 7
  EXPECT_EQ(NumSlices(896 / 128), 1);    // on four ranks: 7
  EXPECT_EQ(NumSlices(28672 / 128), 8);  // 28
  EXPECT_EQ(NumSlices(2560 / 128), 4);   // 21B gate-up: 5
  EXPECT_EQ(NumSlices(1536 / 128), 2);   // 21B down: 6
  EXPECT_EQ(NumSlices(1), 1);
}

TEST(NumSlices, CoversEveryChunkOnceWithNoEmptySlice) {
  for (int chunks = 1; chunks <= 300; ++chunks) {
    const int slices = NumSlices(chunks);
    ASSERT_EQ(kProductWarps % slices, 0);
    ASSERT_EQ(SliceBegin(chunks, slices, 0), 0);
    ASSERT_EQ(SliceBegin(chunks, slices, slices), chunks);
    for (int s = 0; s < slices; ++s) {
      ASSERT_LT(SliceBegin(chunks, slices, s), SliceBegin(chunks, slices, s + 1)) << chunks;
    }
  }
}

TEST(PlaceOfItem, IsABijectionOntoTokenTilesAndRowBlocks) {
  for (const int tiles : {1, 2, 15, 16, 17, 33, 40}) {
    for (const int row_blocks : {1, 3, 28}) {
      std::set<std::pair<int, int>> places;
      for (int index = 0; index < tiles * row_blocks; ++index) {
        const ItemPlace place = PlaceOfItem(index, tiles, row_blocks);
        ASSERT_TRUE(place.token_tile >= 0 && place.token_tile < tiles);
        ASSERT_TRUE(place.row_block >= 0 && place.row_block < row_blocks);
        places.emplace(place.token_tile, place.row_block);
      }
      ASSERT_EQ(places.size(), static_cast<size_t>(tiles) * row_blocks);
    }
  }
}

TEST(FirstItemOfBlock, SpreadsItemsEvenlyOverBlocksAndOverPairsOfThem) {
  for (const int64_t items : {1, 100, 264, 265, 400, 640, 3584}) {
    const int blocks = 2 * kMultiprocessors;
    ASSERT_EQ(FirstItemOfBlock(items, blocks, 0), 0);
    ASSERT_EQ(FirstItemOfBlock(items, blocks, blocks), items);
    const auto count = [&](int block) {
      return FirstItemOfBlock(items, blocks, block + 1) - FirstItemOfBlock(items, blocks, block);
    };
    for (int m = 0; m < kMultiprocessors; ++m) {
      const int64_t of_pair = count(m) + count(m + kMultiprocessors);
      ASSERT_GE(of_pair, items / kMultiprocessors);
      ASSERT_LE(of_pair, DivideUp<int64_t>(items, kMultiprocessors));
    }
  }
}

TEST(SharedMemory, FitsABlockOfEveryArchitectureForEveryPlan) {
  for (const WeightFormat format : {WeightFormat::kWint2, WeightFormat::kWint4,
                                    WeightFormat::kWint8, WeightFormat::kBfloat16}) {
    for (const int token_blocks : {2, 4, 8}) {
      ProductPlan plan;
      plan.kernel = ProductKernel::kTile;
      plan.token_blocks = token_blocks;
      const int64_t bytes = SharedBytes(plan, format, kMaxExperts);
      EXPECT_LE(bytes * BlocksPerMultiprocessor(plan.kernel, token_blocks, format),
                kMaxSharedBytes);
      EXPECT_EQ(TileStageBytes(format, token_blocks) % 16, 0);
    }
    for (const int tiles_per_warp : {1, 2}) {
      if (tiles_per_warp == 2 && !StreamsTwoTiles(format)) continue;
      ProductPlan plan;
      plan.tiles_per_warp = tiles_per_warp;
      EXPECT_LE(SharedBytes(plan, format, kMaxExperts) * 2, kMaxSharedBytes);
    }
  }
}

ProductShape MoeShape(int64_t k, int64_t columns, int64_t rows, int experts, int top_k) {
  return {
      WeightFormat::kWint2, k / kChunkRows, columns / kTileColumns, experts, rows * top_k, rows};
}

TEST(PlanProduct, StreamsSmallBatchesAndTilesLargeOnes) {
  for (const int64_t rows : {1, 2, 4, 8, 16, 32}) {
    const ProductPlan plan = PlanProduct(MoeShape(8192, 7168, rows, 64, 8), kMultiprocessors);
    EXPECT_EQ(plan.kernel, ProductKernel::kStream) << rows;
    EXPECT_EQ(plan.grid_blocks, 2 * kMultiprocessors) << rows;
  }
  EXPECT_EQ(PlanProduct(MoeShape(8192, 7168, 64, 64, 8), kMultiprocessors).token_blocks, 2);
  EXPECT_EQ(PlanProduct(MoeShape(8192, 7168, 128, 64, 8), kMultiprocessors).token_blocks, 4);
  EXPECT_EQ(PlanProduct(MoeShape(8192, 7168, 2048, 64, 8), kMultiprocessors).token_blocks, 8);
}

TEST(PlanProduct, FillsTheMachineWithALinearLayerOfAnySize) {
  for (const int64_t rows : {1, 8, 9, 16, 17, 32, 33, 64, 100, 300, 2048}) {
    const ProductShape shape = {WeightFormat::kWint8, 64, 512, 1, rows, rows};
    const ProductPlan plan = PlanProduct(shape, kMultiprocessors);
    EXPECT_GE(3 * plan.grid_blocks, 2 * kMultiprocessors) << rows;
    EXPECT_EQ(plan.kernel == ProductKernel::kStream, rows <= 8);
    // The sums of a split product stay small beside the weights' own buffers.
    EXPECT_LE(SplitSumFloats(shape, plan) * 4, int64_t{100} << 20) << rows;
  }
}

TEST(PlanProduct, NeverAsksForMoreBlocksThanItemsNorForNone) {
  for (const int64_t rows : {1, 7, 9, 40, 1000}) {
    for (const int64_t chunks : {1, 3, 64}) {
      const ProductShape shape = {WeightFormat::kWint4, chunks, 2, 1, rows, rows};
      const ProductPlan plan = PlanProduct(shape, kMultiprocessors);
      EXPECT_GE(plan.grid_blocks, 1);
      EXPECT_LE(plan.grid_blocks, MaxTokenTiles(shape, plan.token_tile()) *
                                      DivideUp(shape.tiles, TilesPerBlock(plan)) *
                                      (plan.split_slices ? plan.slices : 1));
    }
  }
}

}  // namespace
}  // namespace wintserve::kernels::plan
