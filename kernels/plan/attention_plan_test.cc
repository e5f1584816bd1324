#include "kernels/plan/attention_plan.h"

#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <random>
#include <set>
#include <tuple>
#include <vector>

namespace wintserve::kernels::plan {
namespace {

TEST(Segments, CoverEveryKeyOnceInWholeBlocks) {
  int32_t segment = 0;
  for (int32_t key = 0; key < 200'000; ++key) {
    if (key == SegmentBegin(segment + 1)) ++segment;
    ASSERT_EQ(SegmentOf(key), segment) << key;
    ASSERT_LE(SegmentBegin(segment), key);
  }
  for (int32_t s = 0; s <= segment; ++s) {
    const int32_t length = SegmentBegin(s + 1) - SegmentBegin(s);
    ASSERT_EQ(SegmentBegin(s) % kKvTileTokens, 0);
    ASSERT_EQ(length % kKvTileTokens, 0);
    ASSERT_GE(length, kMinSegmentTokens);
    ASSERT_LE(length, kMaxSegmentTokens);
    // Never more than an eighth of what lies before, beyond the shortest.
    ASSERT_TRUE(length == kMinSegmentTokens || length * kSegmentGrowth <= SegmentBegin(s))
        << "segment " << s << " of " << length;
  }
}

TEST(Segments, OfNoKeysThereAreNone) {
  EXPECT_EQ(NumSegments(0), 0);
  EXPECT_EQ(NumSegments(1), 1);
  EXPECT_EQ(NumSegments(kMinSegmentTokens), 1);
  EXPECT_EQ(NumSegments(kMinSegmentTokens + 1), 2);
}

struct Sequence {
  int32_t position;
  int32_t length;
};

// What the kernel's warps find with their scans, here one sequence after the other.
std::vector<std::pair<int32_t, AttentionItem>> AllItems(const AttentionWork& work,
                                                        const std::vector<Sequence>& sequences) {
  std::vector<std::pair<int32_t, AttentionItem>> items;
  int32_t first_partial = 0;
  for (size_t s = 0; s < sequences.size(); ++s) {
    const SequenceWork found = WorkOf(work, sequences[s].position, sequences[s].length);
    const bool is_split = IsSplit(work, found, first_partial);
    for (int32_t i = 0; i < NumItems(work, found, is_split); ++i) {
      items.emplace_back(s, ItemOf(work, found, is_split, first_partial, i));
    }
    first_partial += found.wanted_partials;
  }
  return items;
}

// Every (sequence, KV head, tile, segment) that is asked for is in exactly one item, and partials
// are within the memory and belong to one each.
void CheckItems(const AttentionWork& work, const std::vector<Sequence>& sequences) {
  std::map<std::tuple<int32_t, int32_t, int32_t>, std::set<int32_t>> covered;
  std::set<int32_t> partials;
  for (const auto& [sequence, item] : AllItems(work, sequences)) {
    auto& segments = covered[{sequence, item.kv_head, item.tile}];
    ASSERT_LT(item.segment_begin, item.segment_end);
    for (int32_t s = item.segment_begin; s < item.segment_end; ++s) {
      ASSERT_TRUE(segments.insert(s).second) << "sequence " << sequence << " segment " << s;
    }
    if (item.first_partial < 0) continue;
    ASSERT_LE(item.segment_end, item.segment_begin + work.item_segments);
    for (int32_t s = item.segment_begin; s < item.segment_end; ++s) {
      const int32_t partial = item.first_partial + s;
      ASSERT_TRUE(partials.insert(partial).second) << partial;
      ASSERT_LT(partial, work.max_partials);
    }
  }
  for (size_t s = 0; s < sequences.size(); ++s) {
    const auto [position, length] = sequences[s];
    const int64_t rows = int64_t{length} * work.group;
    const bool wanted = length > 0 && rows >= work.min_rows && rows <= work.max_rows;
    const int64_t tiles = wanted ? (rows + work.tile_rows - 1) / work.tile_rows : 0;
    for (int64_t tile = 0; tile <= tiles; ++tile) {
      for (int32_t head = 0; head < work.num_kv_heads; ++head) {
        const auto found = covered.find({s, head, tile});
        if (tile == tiles) {
          ASSERT_TRUE(found == covered.end()) << "sequence " << s << " tile " << tile;
          continue;
        }
        ASSERT_TRUE(found != covered.end()) << "sequence " << s << " tile " << tile;
        ASSERT_EQ(static_cast<int32_t>(found->second.size()), NumSegments(position + length));
      }
    }
  }
}

TEST(AttentionItems, CoverEveryBatchOnce) {
  std::mt19937 rng(7);
  const auto draw = [&](int low, int high) {
    return std::uniform_int_distribution<int>(low, high)(rng);
  };
  for (int round = 0; round < 300; ++round) {
    std::vector<Sequence> sequences(draw(1, 70));
    for (Sequence& s : sequences) {
      s.length = draw(0, 3) == 0 ? draw(0, 300) : draw(0, 1);
      s.position = draw(0, 1) == 0 ? draw(0, 200) : draw(0, 20'000);
    }
    AttentionWork work = {.group = draw(1, 16),
                          .num_kv_heads = draw(1, 8),
                          .tile_rows = 16,
                          .min_rows = 1,
                          .max_rows = 16,
                          .max_split_rows = 16,
                          .item_segments = 1 << draw(0, 3),
                          .max_partials = draw(0, 3000)};
    CheckItems(work, sequences);
    work.tile_rows = draw(0, 1) == 0 ? 64 : 128;
    work.min_rows = 17;
    work.max_rows = 1 << 20;
    work.max_split_rows = draw(0, 400);
    CheckItems(work, sequences);
    if (HasFatalFailure()) {
      ADD_FAILURE() << "round " << round;
      return;
    }
  }
}

TEST(AttentionItems, AreWithoutPartialsWhereOneSegmentOrNoMemoryIs) {
  AttentionWork work = {.group = 8,
                        .num_kv_heads = 2,
                        .tile_rows = 16,
                        .min_rows = 1,
                        .max_rows = 16,
                        .max_split_rows = 16,
                        .max_partials = 16};
  for (const auto& [sequence, item] : AllItems(work, {{0, 1}, {127, 1}, {128, 1}, {1023, 1}})) {
    // Sequence 2 takes 2 x 2 partials; sequence 3 would take 2 x 8, of which 12 are left.
    EXPECT_EQ(item.first_partial >= 0, sequence == 2) << "sequence " << sequence;
  }
}

TEST(AttentionItems, TurnsTakeEveryItemOnceAndEachBlocksGrow) {
  for (const int32_t num_blocks : {1, 2, 5, 132}) {
    std::set<int64_t> taken;
    for (int32_t block = 0; block < num_blocks; ++block) {
      int64_t before = -1;
      for (int32_t round = 0; round < 7; ++round) {
        const int64_t index = ItemOfTurn(round, block, num_blocks);
        EXPECT_GT(index, before);
        before = index;
        EXPECT_TRUE(taken.insert(index).second);
      }
    }
    EXPECT_EQ(*taken.rbegin(), int64_t{7} * num_blocks - 1);
  }
}

TEST(AttentionItems, EverySequenceOfABatchIsInOneLaunch) {
  for (const int num_heads : {4, 20, 64}) {
    const AttentionLaunches plan = PlanAttention(70, 5000, 1000, num_heads, 4, 132, 528);
    ASSERT_EQ(plan.count, 2);
    for (int32_t length = 1; length <= 1000; ++length) {
      int launches = 0;
      for (const AttentionLaunch& launch : plan.launches) {
        if (WorkOf(launch.work, 0, length).tiles > 0) ++launches;
      }
      ASSERT_EQ(launches, 1) << num_heads << " heads, length " << length;
    }
  }
}

TEST(AttentionItems, DecodesAreOneLaunchUnlessAWarpHasNoPlaceForTheirHeads) {
  EXPECT_EQ(PlanAttention(64, 64, 1, 64, 8, 132, 528).count, 1);
  EXPECT_EQ(PlanAttention(64, 64, 1, 16, 1, 132, 528).count, 1);
  EXPECT_EQ(PlanAttention(64, 64, 1, 17, 1, 132, 528).count, 2);
  EXPECT_EQ(PlanAttention(64, 64, 2, 64, 8, 132, 528).count, 1);
  EXPECT_EQ(PlanAttention(64, 64, 3, 64, 8, 132, 528).count, 2);
}

TEST(AttentionItems, FewSequencesAreCutFinerThanMany) {
  // 64 sequences of 8 KV heads nearly fill 132 multiprocessors that run 4 blocks each.
  EXPECT_EQ(PickItemSegments(1000 * 8, 528), 8);
  EXPECT_EQ(PickItemSegments(64 * 8, 528), 8);
  EXPECT_EQ(PickItemSegments(32 * 8, 528), 4);
  EXPECT_EQ(PickItemSegments(16 * 8, 528), 2);
  EXPECT_EQ(PickItemSegments(8 * 8, 528), 1);
  EXPECT_EQ(PickItemSegments(8, 528), 1);
}

TEST(AttentionItems, QueriesAreScaledByLog2EOverTheRootOfHeadDim) {
  for (const int head_dim : {64, 128}) {
    EXPECT_EQ(QueryScale(head_dim),
              static_cast<float>(std::log2(std::exp(1.0)) / std::sqrt(double{1} * head_dim)));
  }
}

TEST(AttentionItems, ChunksGetLargeBlocksWhenTheyGoRoundTwice) {
  EXPECT_EQ(PickTileWarps(8192, 64, 132), 8);
  EXPECT_EQ(PickTileWarps(528, 64, 132), 8);
  EXPECT_EQ(PickTileWarps(527, 64, 132), 4);
  EXPECT_EQ(PickTileWarps(128, 64, 132), 4);
}

}  // namespace
}  // namespace wintserve::kernels::plan
