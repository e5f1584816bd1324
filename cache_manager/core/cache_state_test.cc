// What only a broken cache would show: CheckInvariants has to see it.
#include "cache_manager/core/cache_state.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace wintserve {
namespace {

using ::testing::HasSubstr;

// I10: a child that no chain leads to could never be matched, nor evicted with its parent.
TEST(CheckInvariants, SeesAnOrphan) {
  CacheState state(/*num_blocks=*/2, /*num_host_slots=*/1, /*write_back_ahead_blocks=*/2,
                   /*max_pending_events=*/16, &Xxh3ChainHash);
  CacheEntry* const root = state.index().FindOrAddRoot(DigestOfRoot("model", ""));
  const std::vector<int32_t> tokens = {1};
  CacheEntry* const parent = state.index().FindOrAddChild(root, tokens).first;
  CacheEntry* const child = state.index().FindOrAddChild(parent, tokens).first;
  for (CacheEntry* const entry : {parent, child}) {
    state.CommitBlock(entry, state.TakeBlock(BlockState::kLeased)->id, /*step=*/1);
    entry->was_hit = true;
    state.Pin(entry);
  }
  state.Unpin(child, 1);
  const auto copy = state.StartWriteBack();
  ASSERT_TRUE(copy.has_value() && state.EndCopy(copy->copy_id, /*step=*/2));
  ASSERT_TRUE(state.TakeBlock(BlockState::kLeased).has_value());  // the child's
  ASSERT_TRUE(state.IsOnHostOnly(*child));
  ASSERT_EQ(state.CheckInvariants(), absl::OkStatus());

  parent->first_child = nullptr;
  EXPECT_THAT(std::string(state.CheckInvariants().message()),
              HasSubstr("entry 2: not so: I10: it is matchable and no orphan"));
  parent->first_child = child;
  EXPECT_EQ(state.CheckInvariants(), absl::OkStatus());
}

// I5: what has been given back must not be found by content.
TEST(CheckInvariants, SeesABlockThatIsNobodysAndStillAnEntrys) {
  CacheState state(/*num_blocks=*/2, /*num_host_slots=*/0, /*write_back_ahead_blocks=*/2,
                   /*max_pending_events=*/16, &Xxh3ChainHash);
  CacheEntry* const root = state.index().FindOrAddRoot(DigestOfRoot("model", ""));
  const std::vector<int32_t> tokens = {1};
  CacheEntry* const entry = state.index().FindOrAddChild(root, tokens).first;
  state.CommitBlock(entry, state.TakeBlock(BlockState::kLeased)->id, /*step=*/1);
  ASSERT_EQ(state.CheckInvariants(), absl::OkStatus());
  state.pool().Move(*entry->block, BlockState::kCommitted, BlockState::kFree);
  EXPECT_THAT(std::string(state.CheckInvariants().message()),
              HasSubstr("I5: block 0 is free, and an entry's"));
}

}  // namespace
}  // namespace wintserve
