#include "kernels/plan/kv_layout.h"

#include <gtest/gtest.h>

#include <set>
#include <string>

#include "kernels/backend.h"

namespace wintserve::kernels::plan {
namespace {

static_assert(kKvTileTokens == kKvBlockTokens);

struct Case {
  KvCacheKind kind;
  int head_dim;
};

class KvLayoutTest : public testing::TestWithParam<Case> {};

TEST_P(KvLayoutTest, EveryNumberOfABlockHasItsOwnBytesAndNoneIsLeftOver) {
  const auto [kind, head_dim] = GetParam();
  constexpr int kLayers = 2;
  constexpr int kHeads = 3;
  const int element_bytes = kind == KvCacheKind::kBfloat16 ? 2 : 1;
  std::set<int64_t> bytes;
  int64_t count = 0;
  const auto take = [&](int64_t offset, int size) {
    for (int i = 0; i < size; ++i) bytes.insert(offset + i);
    count += size;
  };
  for (int layer = 0; layer < kLayers; ++layer) {
    for (const KvPart part : {KvPart::kKey, KvPart::kValue}) {
      for (int head = 0; head < kHeads; ++head) {
        const int64_t tile = layer * KvLayerBytes(kind, kHeads, head_dim) +
                             KvTileOffset(kind, kHeads, head_dim, part, head);
        EXPECT_EQ(tile % 128, 0) << "copies of 16 bytes, lines of 128";
        for (int token = 0; token < kKvTileTokens; ++token) {
          for (int dim = 0; dim < head_dim; ++dim) {
            take(tile + KvElementOffset(kind, head_dim, token, dim), element_bytes);
          }
          if (kind == KvCacheKind::kInt8) take(tile + KvScaleOffset(head_dim, token), 2);
        }
      }
    }
  }
  const int64_t size = KvBlockBytes(kind, kLayers, kHeads, head_dim);
  EXPECT_EQ(count, size);
  EXPECT_EQ(static_cast<int64_t>(bytes.size()), size);
  EXPECT_EQ(*bytes.begin(), 0);
  EXPECT_EQ(*bytes.rbegin(), size - 1);
}

TEST_P(KvLayoutTest, ATokenStaysInItsRow) {
  const auto [kind, head_dim] = GetParam();
  const int row_bytes = KvRowBytes(kind, head_dim);
  for (int token = 0; token < kKvTileTokens; ++token) {
    for (int dim = 0; dim < head_dim; ++dim) {
      EXPECT_EQ(KvElementOffset(kind, head_dim, token, dim) / row_bytes, token);
    }
  }
}

// A matrix load reads the same chunk of eight rows: 128 bytes that should come from all 32 banks.
TEST_P(KvLayoutTest, EightRowsOfAChunkLieInDifferentBanks) {
  const auto [kind, head_dim] = GetParam();
  const int row_bytes = KvRowBytes(kind, head_dim);
  for (int first = 0; first < kKvTileTokens; first += 8) {
    for (int chunk = 0; chunk < row_bytes / kKvChunkBytes; ++chunk) {
      std::set<int> banks;
      for (int row = first; row < first + 8; ++row) {
        banks.insert(KvChunkOffset(row_bytes, row, chunk) % 128);
      }
      EXPECT_EQ(banks.size(), 8u) << "rows from " << first << ", chunk " << chunk;
    }
  }
}

TEST_P(KvLayoutTest, TheRowOffsetXorTheChunkIsTheChunksOffset) {
  const auto [kind, head_dim] = GetParam();
  const int row_bytes = KvRowBytes(kind, head_dim);
  for (int token = 0; token < kKvTileTokens; ++token) {
    const int row = KvRowOffset(row_bytes, token);
    // What the kernel relies on: bits of the chunk change nothing outside the row, so that rows
    // that are a multiple of 8 apart differ by a plain sum.
    EXPECT_EQ(KvRowOffset(row_bytes, token % 8) + token / 8 * 8 * row_bytes, row);
    EXPECT_EQ(row / row_bytes, token);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Kinds, KvLayoutTest,
    testing::Values(Case{KvCacheKind::kBfloat16, 64}, Case{KvCacheKind::kBfloat16, 128},
                    Case{KvCacheKind::kInt8, 64}, Case{KvCacheKind::kInt8, 128}),
    [](const auto& info) {
      return std::string(info.param.kind == KvCacheKind::kInt8 ? "Int8" : "Bfloat16") + "Head" +
             std::to_string(info.param.head_dim);
    });

TEST(KvLayout, EveryKindHasANameOfItsOwn) {
  EXPECT_STRNE(KvLayoutName(KvCacheKind::kBfloat16), KvLayoutName(KvCacheKind::kInt8));
}

TEST(KvLayout, EightBitsTakeALittleMoreThanHalf) {
  EXPECT_EQ(KvBlockBytes(KvCacheKind::kBfloat16, 54, 8, 128), int64_t{54} * 8 * 2 * 16384);
  EXPECT_EQ(KvBlockBytes(KvCacheKind::kInt8, 54, 8, 128), int64_t{54} * 8 * 2 * (8192 + 128));
}

}  // namespace
}  // namespace wintserve::kernels::plan
