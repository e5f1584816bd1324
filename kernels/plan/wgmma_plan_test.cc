#include "kernels/plan/wgmma_plan.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <set>

namespace wintserve::kernels::plan {
namespace {

using formats::WeightFormat;

constexpr int kMultiprocessors = 132;
constexpr WeightFormat kFormats[] = {WeightFormat::kWint2, WeightFormat::kWint4,
                                     WeightFormat::kWint8, WeightFormat::kBfloat16};

// Where the hardware reads row `row`, byte `byte` of a K-major operand in the 128-byte swizzle:
// blocks of 8 rows lie as far apart as the descriptor says, rows of a block 128 bytes, and bits
// 4 ... 6 of the address are exchanged by bits 7 ... 9.
uint32_t AddressOf(uint64_t descriptor, int row, int byte) {
  const auto start = static_cast<uint32_t>(descriptor & 0x3FFF) << 4;
  const auto stride = static_cast<uint32_t>((descriptor >> 32) & 0x3FFF) << 4;
  const uint32_t address = start + row / 8 * stride + row % 8 * 128 + byte;
  return address ^ ((address >> 7 & 7) << 4);
}

TEST(WgmmaDescriptor, FindsTheKThatARegisterMultiplies) {
  constexpr uint32_t kBase = 37 * 1024;
  const uint64_t of_operand = WgmmaDescriptor(kBase);
  EXPECT_EQ(of_operand >> 62, 1u);           // the 128-byte swizzle
  EXPECT_EQ(of_operand >> 49 & 0x1FFF, 0u);  // no base offset, reserved bits
  for (int token = 0; token < kWideTokens; ++token) {
    for (int i = 0; i < kGroupRows; ++i) {
      const Position p = PositionOfIndex(i);
      const int mma = 2 * p.pair + p.select;
      // A register 2 * b + upper of lane 4g + t holds k = 8b + 2t and 8b + 2t + 1 of its mma.
      const int k = 8 * p.b + 2 * p.t + p.half;
      const uint32_t read = AddressOf(of_operand + mma * kDescriptorStep, token, 2 * k);
      // Its position in activations that are prepared in the order kWgmma.
      const int piece = 2 * mma + p.b;
      const uint32_t written = kBase + SwizzledOffset(token, piece) + 2 * (2 * p.t + p.half);
      ASSERT_EQ(read, written) << token << " " << i;
    }
  }
}

TEST(WgmmaDescriptor, FindsTheCorrections) {
  constexpr uint32_t kBase = 64 * 1024;
  for (int token = 0; token < kWideTokens; ++token) {
    for (int stage = 0; stage < kMostWgmmaStages; ++stage) {
      for (int group = 0; group < 2; ++group) {
        // k 0 and 1 of registers 0 and 1; 8 and 9 of registers 2 and 3 of lanes t = 0.
        const uint64_t descriptor = WgmmaDescriptor(kBase) + stage * kDescriptorStep;
        ASSERT_EQ(AddressOf(descriptor, token, 16 * group),
                  kBase + CorrectionOffset(token, stage, group));
      }
    }
  }
}

TEST(SwizzledOffset, IsABijectionAndSpreadsAPieceOverTheBanks) {
  std::set<int> offsets;
  for (int token = 0; token < kNarrowTokens; ++token) {
    for (int piece = 0; piece < 8; ++piece) offsets.insert(SwizzledOffset(token, piece));
  }
  EXPECT_EQ(offsets.size(), kNarrowTokens * 8u);
  EXPECT_EQ(*offsets.rbegin(), kNarrowTokens * 128 - 16);
  for (int piece = 0; piece < 8; ++piece) {
    std::set<int> banks;
    for (int token = 0; token < 8; ++token) banks.insert(SwizzledOffset(token, piece) % 128);
    EXPECT_EQ(banks.size(), 8u);
  }
}

TEST(WgmmaShared, FitsABlockAndAlignsItsParts) {
  for (const WeightFormat format : kFormats) {
    for (const int tokens : {kSmallTokens, kNarrowTokens, kWideTokens}) {
      if (tokens == kWideTokens && !HasWideWgmma(format)) continue;
      if (tokens <= kSmallTokens && !HasSmallWgmma(format)) continue;
      const WgmmaShared shared = WgmmaSharedOf(format, tokens);
      // Each block of a multiprocessor takes 1 KiB more than it asks for.
      EXPECT_LE((shared.SizeBytes(kMaxExperts) + 1024) * WgmmaTileOf(format, tokens).blocks,
                kWgmmaSharedBytes + 1024);
      EXPECT_GE(shared.stages, 3);
      EXPECT_LE(shared.stages, kMostWgmmaStages);
      EXPECT_EQ(shared.activation_bytes % 1024, 0);
      EXPECT_EQ(shared.corrections % 1024, 0);
      for (const int part : {shared.weight_bytes, shared.weights, shared.sums, shared.schedule}) {
        EXPECT_EQ(part % 16, 0) << part;
      }
      EXPECT_EQ(shared.barriers % 8, 0);
    }
  }
}

TEST(PlanWgmmaProduct, LeavesFewTokensToTheOtherKernels) {
  for (const WeightFormat format : kFormats) {
    const auto linear = [&](int64_t tokens) {
      return PlanWgmmaProduct({format, 64, 512, 1, tokens, tokens}, kMultiprocessors);
    };
    for (const int64_t tokens : {1, 8, 16}) EXPECT_FALSE(linear(tokens).has_value()) << tokens;
    EXPECT_EQ(linear(64)->tokens, kNarrowTokens);
    EXPECT_TRUE(linear(2048).has_value());
  }
}

TEST(PlanWgmmaProduct, ChoosesTheTileByTheTokensOfAnExpert) {
  const auto tokens = [](WeightFormat format, int64_t chunks, int64_t rows) {
    const auto plan = PlanWgmmaProduct({format, chunks, 448, 64, 8 * rows, rows}, kMultiprocessors);
    return plan.has_value() ? plan->tokens : 0;
  };
  EXPECT_EQ(tokens(WeightFormat::kWint2, 64, 64), 0);
  EXPECT_EQ(tokens(WeightFormat::kWint2, 64, 128), kSmallTokens);
  EXPECT_EQ(tokens(WeightFormat::kWint2, 20, 128), 0);
  EXPECT_EQ(tokens(WeightFormat::kWint4, 64, 128), 0);
  EXPECT_EQ(tokens(WeightFormat::kWint2, 64, 1024), kNarrowTokens);
  EXPECT_EQ(tokens(WeightFormat::kWint2, 64, 2048), kWideTokens);
}

TEST(PlanWgmmaProduct, LaunchesNoMoreBlocksThanItemsOrMultiprocessors) {
  for (const WeightFormat format : kFormats) {
    for (const int experts : {1, 16, 64}) {
      for (const int64_t tokens : {40, 300, 2048, 16384}) {
        const ProductShape shape = {format, 28, 512, experts, tokens, tokens};
        const auto plan = PlanWgmmaProduct(shape, kMultiprocessors);
        if (!plan.has_value()) continue;
        EXPECT_EQ(plan->slices, NumSlices(format, 28));
        EXPECT_GE(plan->grid_blocks, 1);
        EXPECT_LE(plan->grid_blocks, kMultiprocessors * WgmmaTileOf(format, plan->tokens).blocks);
        EXPECT_TRUE(plan->tokens != kWideTokens || HasWideWgmma(format));
        EXPECT_TRUE(plan->tokens != kSmallTokens || HasSmallWgmma(format));
        EXPECT_EQ(SplitSumFloats(shape, *plan) > 0, plan->split_slices);
      }
    }
  }
}

}  // namespace
}  // namespace wintserve::kernels::plan
