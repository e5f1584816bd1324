// DistrustSteps: what is forgotten after a rank has gone wrong, and what is kept.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "cache_manager/core/prefix_cache.h"
#include "cache_manager/core/prefix_cache_test_util.h"

namespace wintserve {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;
using ::testing::Pair;
using ::testing::SizeIs;

constexpr uint64_t kOld = 100;
constexpr uint64_t kBad = 200;  // the first step that is not trusted, but for the tests of bounds

// Stores a chain as of `step`; its entries, each with one pin.
std::vector<uint64_t> StoreAt(TestCache* cache, uint64_t step, const std::vector<int32_t>& ids,
                              uint64_t parent = 0) {
  CommitRequest request =
      TestCache::CommitOf(cache->Lease(static_cast<uint32_t>(ids.size())), ids, parent);
  request.step = step;
  std::vector<uint64_t> entries;
  for (const CommittedBlock& block : cache->Commit(request)) entries.push_back(block.entry);
  return entries;
}

// An old chain with host copies made by `step`, and its blocks too.
std::vector<uint64_t> StoreOnBothTiers(TestCache* cache, const std::vector<int32_t>& ids,
                                       uint64_t step) {
  const auto entries = StoreAt(cache, kOld, ids);
  for (const PinnedBlock& hit : cache->Match(ids).device) cache->Release({hit.entry});
  cache->Release(entries);
  for (const CopyOrder& copy : (*cache)->TakeCopyOuts(100)) {
    EXPECT_EQ((*cache)->CopyDone(copy.copy_id, step), absl::OkStatus());
  }
  EXPECT_EQ((*cache)->stats().num_host_valid, ids.size());
  return entries;
}

TEST(DistrustSteps, DropsWhatWasCommittedFromThatStepOnAndWhatIsBelow) {
  TestCache cache(8);
  const auto first = StoreAt(&cache, kBad - 1, {1, 2});
  const auto second = StoreAt(&cache, kBad, {3}, first[1]);
  const auto third = StoreAt(&cache, kBad + 5, {4}, second[0]);
  const auto other = StoreAt(&cache, kOld, {5});
  for (const auto& entries : {first, second, third, other}) cache.Release(entries);
  EXPECT_EQ(cache->DistrustSteps(kBad + 6), 0u);
  EXPECT_EQ(cache->DistrustSteps(kBad), 2u);
  EXPECT_THAT(cache.Peek({1, 2, 3, 4}), Pair(2, 0));
  EXPECT_THAT(cache.Peek({5}), Pair(1, 0));
  EXPECT_EQ(cache->stats().num_free, 5u);
  EXPECT_EQ(cache->DistrustSteps(kBad), 0u) << "said again";
  EXPECT_EQ(cache->DistrustSteps(1), 3u);
  EXPECT_EQ(cache->stats().num_free, 8u);
}

// A child is computed from its parent's KV, whatever its own step was.
TEST(DistrustSteps, DropsAnOldEntryBelowABadOne) {
  TestCache cache(4, 4);
  const auto entries = StoreOnBothTiers(&cache, {1, 2}, kOld);
  EXPECT_EQ(cache->Return(cache.Lease(4)), absl::OkStatus());
  ASSERT_THAT(cache.Peek({1, 2}), Pair(0, 2));
  cache.Release(StoreAt(&cache, kBad, {1}));  // computed again, into another block
  ASSERT_THAT(cache.Peek({1, 2}), Pair(1, 1));
  EXPECT_EQ(cache->DistrustSteps(kBad), 2u);
  EXPECT_THAT(cache.Peek({1, 2}), Pair(0, 0));
  EXPECT_EQ(cache->stats().num_host_free, 4u);
}

TEST(DistrustSteps, AnUnknownStepIsNeverTrusted) {
  TestCache cache(4);
  cache.Release(StoreAt(&cache, 0, {1}));
  cache.Release(StoreAt(&cache, std::numeric_limits<uint64_t>::max() - 1, {2}));
  EXPECT_EQ(cache->DistrustSteps(std::numeric_limits<uint64_t>::max()), 1u);
  EXPECT_THAT(cache.Peek({1}), Pair(0, 0));
  EXPECT_THAT(cache.Peek({2}), Pair(1, 0));
}

TEST(DistrustSteps, LeavesPinnedBlocksToTheirPins) {
  TestCache cache(2);
  const auto entries = StoreAt(&cache, kBad, {1});
  cache.Match({1});
  EXPECT_EQ(cache->DistrustSteps(kBad), 1u);
  EXPECT_THAT(cache.Match({1}).device, IsEmpty());
  EXPECT_EQ(StoreAt(&cache, kBad + 9, {2}, entries[0]), std::vector<uint64_t>{0})
      << "nothing can be committed below it";
  cache.Release(entries);
  EXPECT_EQ(cache->stats().num_free, 0u);
  cache.Release(entries);
  EXPECT_EQ(cache->stats().num_free, 1u);
}

TEST(DistrustSteps, ADuplicateKeepsTheStepOfTheBlockThatIsThere) {
  TestCache cache(4);
  cache.Release(StoreAt(&cache, kOld, {1}));
  const auto again = StoreAt(&cache, kBad, {1});
  cache.Release(again);
  EXPECT_EQ(cache->DistrustSteps(kBad), 0u);
  EXPECT_THAT(cache.Peek({1}), Pair(1, 0));
}

// The rank that went wrong made the copy, of a block that is right.
TEST(DistrustSteps, DropsABadHostCopyAndKeepsTheBlock) {
  TestCache cache(4, 4);
  StoreOnBothTiers(&cache, {1, 2}, kBad);
  uint64_t lost = 0;
  cache->TakeEvents(&lost);
  EXPECT_EQ(cache->DistrustSteps(kBad), 0u);
  EXPECT_THAT(cache.Peek({1, 2}), Pair(2, 0));
  EXPECT_EQ(cache->stats().num_host_free, 4u);
  const auto events = cache->TakeEvents(&lost);
  ASSERT_THAT(events, SizeIs(2));
  for (const CacheEvent& event : events) {
    EXPECT_EQ(event.kind, CacheEvent::Kind::kTierChanged);
    EXPECT_TRUE(event.on_device && !event.on_host);
  }
  EXPECT_EQ(cache.WriteBack(), 2) << "made again";
  EXPECT_EQ(cache->Return(cache.Lease(4)), absl::OkStatus());
  EXPECT_THAT(cache.Peek({1, 2}), Pair(0, 2));
}

TEST(DistrustSteps, DropsWhatIsInABadHostCopyAlone) {
  TestCache cache(4, 4);
  StoreOnBothTiers(&cache, {1, 2}, kBad);
  EXPECT_EQ(cache->Return(cache.Lease(4)), absl::OkStatus());
  ASSERT_THAT(cache.Peek({1, 2}), Pair(0, 2));
  EXPECT_EQ(cache->DistrustSteps(kBad + 1), 0u);
  EXPECT_EQ(cache->DistrustSteps(kBad), 2u);
  EXPECT_EQ(cache->stats().num_host_free, 4u);
}

TEST(DistrustSteps, DropsWhatABadStepHasRestored) {
  TestCache cache(4, 4);
  StoreOnBothTiers(&cache, {1, 2}, kOld);
  EXPECT_EQ(cache->Return(cache.Lease(4)), absl::OkStatus());
  const MatchResult first = cache.Match({1});
  ASSERT_THAT(first.copies, SizeIs(1));
  ASSERT_EQ(cache->CopyDone(first.copies[0].copy_id, kBad - 1), absl::OkStatus());
  const MatchResult second = cache.Match({1, 2});
  ASSERT_THAT(second.copies, SizeIs(1));
  ASSERT_EQ(cache->CopyDone(second.copies[0].copy_id, kBad), absl::OkStatus());
  EXPECT_EQ(cache->DistrustSteps(kBad), 1u);
  EXPECT_THAT(cache.Peek({1, 2}), Pair(1, 0));
  cache.Release({first.restoring[0].entry, second.device[0].entry, second.restoring[0].entry});
  EXPECT_EQ(cache->stats().num_free, 3u);
  EXPECT_EQ(cache->stats().num_host_valid, 1u);
}

// A restore of a bad host copy by a good step is no better than the copy.
TEST(DistrustSteps, ACopyIsNoOlderThanWhatItCopies) {
  TestCache cache(4, 4);
  StoreOnBothTiers(&cache, {1}, kBad);
  EXPECT_EQ(cache->Return(cache.Lease(4)), absl::OkStatus());
  const MatchResult match = cache.Match({1});
  ASSERT_EQ(cache->CopyDone(match.copies[0].copy_id, kOld), absl::OkStatus());
  cache.Release({match.restoring[0].entry});
  EXPECT_EQ(cache->DistrustSteps(kBad), 1u);

  TestCache other(4, 4);
  const auto entries = StoreAt(&other, kBad, {1});
  other.Match({1});
  other.Release(entries);
  other.Release(entries);
  for (const CopyOrder& copy : other->TakeCopyOuts(9)) {
    ASSERT_EQ(other->CopyDone(copy.copy_id, kOld), absl::OkStatus());
  }
  EXPECT_EQ(other->Return(other.Lease(4)), absl::OkStatus());
  ASSERT_THAT(other.Peek({1}), Pair(0, 1));
  EXPECT_EQ(other->DistrustSteps(kBad), 1u);
}

// Whether a copy under way ran before or after the rank went wrong, nobody knows. It is still
// waited for: it, or one that is sent to the ranks again, may write at any time.
TEST(DistrustSteps, NothingComesOfAWriteBackUnderWay) {
  TestCache cache(4, 4);
  const auto entries = StoreAt(&cache, kOld, {1});
  cache.Match({1});
  cache.Release(entries);
  cache.Release(entries);
  const auto copies = cache->TakeCopyOuts(9);
  ASSERT_THAT(copies, SizeIs(1));
  EXPECT_EQ(cache->DistrustSteps(kBad), 0u);
  EXPECT_THAT(cache.Peek({1}), Pair(1, 0)) << "its block is right";
  EXPECT_EQ(cache->stats().num_host_quarantined, 1u);
  EXPECT_EQ(cache->stats().num_copying_out, 1u);
  cache->Fence();
  EXPECT_EQ(cache->stats().num_host_quarantined, 1u) << "the session goes on, and so may the copy";
  EXPECT_THAT(cache->TakeCopyOuts(9), IsEmpty());
  EXPECT_EQ(cache->CopyDone(copies[0].copy_id, kOld), absl::OkStatus());
  EXPECT_EQ(cache->stats().num_host_free, 4u);
  EXPECT_EQ(cache.WriteBack(), 1) << "made again";
}

TEST(DistrustSteps, NothingComesOfARestoreUnderWay) {
  TestCache cache(4, 4);
  StoreOnBothTiers(&cache, {1, 2}, kOld);
  EXPECT_EQ(cache->Return(cache.Lease(4)), absl::OkStatus());
  const MatchResult match = cache.Match({1, 2});
  ASSERT_THAT(match.copies, SizeIs(2));
  // Of the second alone it is known that it ran, and it waits for the first.
  EXPECT_EQ(cache->CopyDone(match.copies[1].copy_id, kOld), absl::OkStatus());
  EXPECT_EQ(cache->DistrustSteps(kBad), 2u);
  EXPECT_THAT(cache.Peek({1, 2}), Pair(0, 0));
  cache.Release({match.restoring[0].entry, match.restoring[1].entry});
  EXPECT_EQ(cache->stats().num_free, 3u) << "not the one that is still written";
  EXPECT_EQ(cache->stats().num_restoring, 1u);
  EXPECT_EQ(cache->stats().num_host_quarantined, 1u);
  EXPECT_EQ(cache->CopyDone(match.copies[0].copy_id, kOld), absl::OkStatus());
  EXPECT_EQ(cache->stats().num_free, 4u);
  EXPECT_EQ(cache->stats().num_host_free, 4u);
}

// The API server dies before it hears of the copies.
TEST(DistrustSteps, AnAdopterFencesWhatWasLeftUnderWay) {
  TestCache cache(8, 4);
  StoreOnBothTiers(&cache, {1}, kOld);
  EXPECT_EQ(cache->Return(cache.Lease(8)), absl::OkStatus());
  const MatchResult match = cache.Match({1});
  ASSERT_THAT(match.copies, SizeIs(1));
  const auto entries = StoreAt(&cache, kOld, {5});
  cache.Match({5});
  cache.Release(entries);
  cache.Release(entries);
  ASSERT_THAT(cache->TakeCopyOuts(9), SizeIs(1));
  EXPECT_EQ(cache->DistrustSteps(kBad), 1u);
  cache->EndSession();
  cache->EndSession();  // changes nothing
  PrefixCacheStats stats = cache->stats();
  EXPECT_EQ(stats.num_restoring, 0u);
  EXPECT_EQ(stats.num_quarantined, 1u);
  EXPECT_EQ(stats.num_host_quarantined, 2u);
  cache->Fence();
  stats = cache->stats();
  EXPECT_EQ(stats.num_quarantined + stats.num_copying_out + stats.num_host_quarantined, 0u);
  EXPECT_EQ(stats.num_free, 7u);
  EXPECT_THAT(cache.Peek({5}), Pair(1, 0));
}

}  // namespace
}  // namespace wintserve
