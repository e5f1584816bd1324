#include "kernels/plan/product_plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <utility>

namespace wintserve::kernels::plan {
namespace {

using formats::WeightFormat;

constexpr int kMultiprocessors = 132;

TEST(NumSlices, KeepsTheSlicesOfKnownShapesEven) {
  const auto wint2 = [](int64_t k) { return NumSlices(WeightFormat::kWint2, k / kChunkRows); };
  EXPECT_EQ(wint2(8192), 8);  // 300B gate-up: 8 chunks each
  EXPECT_EQ(wint2(3584), 4);  // 300B down: 7
  EXPECT_EQ(wint2(1792), 4);  // on two ranks: 3 or 4
  EXPECT_EQ(wint2(896), 2);   // on four ranks: 3 or 4
  EXPECT_EQ(wint2(2560), 5);  // 21B gate-up: 4
  EXPECT_EQ(wint2(1536), 4);  // 21B down: 3
  EXPECT_EQ(wint2(128), 1);
  const auto wint8 = [](int64_t k) { return NumSlices(WeightFormat::kWint8, k / kChunkRows); };
  EXPECT_EQ(wint8(8192), 8);   // 8
  EXPECT_EQ(wint8(28672), 8);  // 28
  EXPECT_EQ(wint8(2560), 4);   // 5
  EXPECT_EQ(wint8(896), 1);    // 7
  EXPECT_EQ(wint8(128), 1);
}

void ExpectSlicesCover(int chunks, int slices) {
  const int longest = DivideUp(chunks, slices);
  ASSERT_EQ(SliceBegin(chunks, slices, 0), 0);
  ASSERT_EQ(SliceBegin(chunks, slices, slices), chunks);
  for (int s = 0; s < slices; ++s) {
    const int length = SliceBegin(chunks, slices, s + 1) - SliceBegin(chunks, slices, s);
    ASSERT_GE(length, std::max(1, longest - 1)) << chunks << " " << s;
    ASSERT_LE(length, longest) << chunks << " " << s;
  }
}

TEST(NumSlices, CoversEveryChunkOnceWithNoEmptySlice) {
  for (const WeightFormat format : {WeightFormat::kWint2, WeightFormat::kWint8}) {
    for (int chunks = 1; chunks <= 300; ++chunks) {
      const int slices = NumSlices(format, chunks);
      ASSERT_TRUE(kProductWarps % slices == 0 || IsResident(format, chunks));
      ExpectSlicesCover(chunks, slices);
    }
  }
}

TEST(ResidentSlices, FitRegistersAndWarpsAndTheLastIsTheLongest) {
  for (int chunks = 1; chunks <= kResidentChunks * kResidentWarps; ++chunks) {
    const int slices = ResidentSlices(chunks);
    const int longest = DivideUp(chunks, slices);
    ASSERT_LE(slices, kResidentWarps);
    ASSERT_LE(longest, kResidentChunks);
    ExpectSlicesCover(chunks, slices);
    // The kernel copies every slice as if it were the longest: none may reach beyond the matrix.
    ASSERT_EQ(chunks - SliceBegin(chunks, slices, slices - 1), longest);
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
  for (int64_t chunks = 1; chunks <= kResidentChunks * kResidentWarps; ++chunks) {
    const ProductShape shape = {WeightFormat::kWint2, chunks, 2, kMaxExperts, 8, 1};
    const ProductPlan plan = ResidentPlan(shape, kMultiprocessors);
    EXPECT_LE(SharedBytes(plan, WeightFormat::kWint2, kMaxExperts), kMaxSharedBytes) << chunks;
    // Blocks of few warps are for small products and need not fill a multiprocessor.
    const int64_t blocks = plan.slices < 4 ? 1 : kResidentWarps / plan.slices;
    EXPECT_LE(SharedBytes(plan, WeightFormat::kWint2, 64) * blocks, kMaxSharedBytes) << chunks;
  }
}

TEST(SharedMemory, IsEnoughForEverySmallPlanOfAnArchitecture) {
  for (const int64_t chunks : {1, 20, 21, 28, 40, 64, 65, 100, 224}) {
    for (const int64_t rows : {1, 2, 5, 8, 32}) {
      const ProductShape shape = {WeightFormat::kWint2, chunks, 512, 64, rows * 8, rows};
      const auto bytes = [&](const ProductPlan& plan) {
        return SharedBytes(plan, WeightFormat::kWint2, shape.num_experts);
      };
      EXPECT_LE(bytes(PlanProduct(shape, kMultiprocessors)), kMaxSharedBytes);
      EXPECT_LE(bytes(PlanHopperProduct(shape, kMultiprocessors)), kMaxHopperSharedBytes);
    }
  }
}

ProductShape MoeShape(int64_t k, int64_t columns, int64_t rows, int experts, int top_k) {
  return {
      WeightFormat::kWint2, k / kChunkRows, columns / kTileColumns, experts, rows * top_k, rows};
}

TEST(PlanProduct, CachesTheActivationsOfSmallBatchesAndTilesLargeOnes) {
  for (const int64_t rows : {1, 2, 4, 8, 16, 32}) {
    const ProductShape gate_up = MoeShape(8192, 7168, rows, 64, 8);
    const ProductPlan hopper = PlanHopperProduct(gate_up, kMultiprocessors);
    EXPECT_EQ(hopper.kernel, ProductKernel::kCached) << rows;
    EXPECT_EQ(hopper.block_threads(), 2 * 8 * 32) << rows;
    EXPECT_EQ(hopper.grid_blocks, kMultiprocessors) << rows;
    EXPECT_EQ(hopper.stage_chunks, rows <= 4 ? 2 : 1) << rows;
    const ProductPlan portable = PlanProduct(gate_up, kMultiprocessors);
    EXPECT_EQ(portable.kernel, rows <= 4 ? ProductKernel::kCached : ProductKernel::kStream) << rows;
  }
  for (const int64_t rows : {1, 2, 4, 8, 16, 32}) {
    const ProductPlan plan = PlanProduct(MoeShape(2560, 3072, rows, 64, 6), kMultiprocessors);
    EXPECT_EQ(plan.kernel, ProductKernel::kResident) << rows;
    EXPECT_EQ(plan.block_threads(), 5 * 32) << rows;
    EXPECT_EQ(plan.grid_blocks, 3 * kMultiprocessors) << rows;
  }
  EXPECT_EQ(PlanProduct(MoeShape(8192, 7168, 64, 64, 8), kMultiprocessors).token_blocks, 2);
  EXPECT_EQ(PlanProduct(MoeShape(8192, 7168, 128, 64, 8), kMultiprocessors).token_blocks, 2);
  EXPECT_EQ(PlanProduct(MoeShape(8192, 7168, 136, 64, 8), kMultiprocessors).token_blocks, 8);
  EXPECT_EQ(PlanProduct(MoeShape(8192, 7168, 2048, 64, 8), kMultiprocessors).token_blocks, 8);
}

TEST(PlanProduct, StreamsTwoTilesAWarpUnlessBlocksWouldStandIdle) {
  const auto tiles_per_warp = [](int64_t columns, int64_t rows) {
    const ProductPlan plan = PlanProduct(MoeShape(28672, columns, rows, 64, 8), kMultiprocessors);
    EXPECT_EQ(plan.kernel, ProductKernel::kStream);
    return plan.tiles_per_warp;
  };
  EXPECT_EQ(tiles_per_warp(7168, 1), 2);
  EXPECT_EQ(tiles_per_warp(3584, 1), 2);  // on two ranks
  EXPECT_EQ(tiles_per_warp(1024, 1), 1);
  EXPECT_EQ(tiles_per_warp(1024, 4), 2);
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
