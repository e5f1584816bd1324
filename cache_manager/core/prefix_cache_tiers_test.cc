// The host tier, its copies, and what a session leaves behind.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "cache_manager/core/prefix_cache.h"
#include "cache_manager/core/prefix_cache_test_util.h"

namespace wintserve {
namespace {

using ::testing::ElementsAre;
using ::testing::Pair;
using ::testing::SizeIs;

TEST(WriteBack, IsDueWhenAHitEntryLosesItsLastPin) {
  TestCache cache(4, 4);
  const auto entries = cache.Store({1});
  EXPECT_THAT(cache->TakeCopyOuts(9), SizeIs(0));
  cache.Match({1});
  cache.Release(entries);
  EXPECT_THAT(cache->TakeCopyOuts(9), SizeIs(0)) << "one pin is left";
  cache.Release(entries);
  const auto copies = cache->TakeCopyOuts(9);
  ASSERT_THAT(copies, SizeIs(1));
  EXPECT_EQ(copies[0].direction, CopyDirection::kToHost);
  EXPECT_THAT(cache->TakeCopyOuts(9), SizeIs(0)) << "it is under way";
}

TEST(WriteBack, OfAnEntryThatNobodyHasHitNeedsAChainOfFour) {
  TestCache three(4, 4);
  three.Release(three.Store({1, 2, 3}));
  EXPECT_THAT(three->TakeCopyOuts(9), SizeIs(0));
  TestCache four(4, 4);
  four.Release(four.Store({1, 2, 3, 4}));
  EXPECT_THAT(four->TakeCopyOuts(9), SizeIs(4));
}

TEST(WriteBack, TakesAncestorsFirstAndNoMoreThanAskedFor) {
  TestCache cache(4, 4);
  cache.Release(cache.Store({1, 2, 3, 4}));
  const auto first = cache->TakeCopyOuts(1);
  ASSERT_THAT(first, SizeIs(1));
  EXPECT_EQ(first[0].block.id, cache.Match({1}).device[0].block.id);
  EXPECT_THAT(cache->TakeCopyOuts(9), SizeIs(3)) << "the first one, under way, is not taken again";
}

TEST(WriteBack, LeavesTheEndOfItsChainToWhoNeedsBlocksAtOnce) {
  TestCache cache(4, 4);
  cache.Release(cache.Store({1, 2, 3, 4}));
  EXPECT_THAT(cache->TakeCopyOuts(2), SizeIs(2));
  EXPECT_EQ(cache->num_available(), 2u);
  EXPECT_THAT(cache.Lease(2), SizeIs(2));
  EXPECT_THAT(cache.Peek({1, 2, 3, 4}), Pair(2, 0));
}

// Each with its own time of release, so that they go one by one, in this order.
void StoreOneByOne(TestCache* cache, const std::vector<int32_t>& ids) {
  for (const int32_t id : ids) {
    const auto entry = cache->Store({id});
    cache->Match({id});
    cache->Release({entry[0], entry[0]});
  }
}

TEST(WriteBack, WaitsUntilTheFreeBlocksRunLow) {
  TestCache cache(8, 8, &Xxh3ChainHash, /*write_back_ahead_blocks=*/2);
  StoreOneByOne(&cache, {1, 2, 3, 4});
  cache.Lease(2);
  EXPECT_THAT(cache->TakeCopyOuts(9), SizeIs(0)) << "2 blocks are free";
  cache.Lease(1);
  const auto first = cache->TakeCopyOuts(9);
  EXPECT_THAT(first, SizeIs(1));
  EXPECT_THAT(cache->TakeCopyOuts(9), SizeIs(0)) << "1 is free and 1 soon has its copy";
  cache.Lease(1);
  const auto second = cache->TakeCopyOuts(9);
  EXPECT_THAT(second, SizeIs(1));
  EXPECT_EQ(cache->CopyDone(first[0].copy_id), absl::OkStatus());
  EXPECT_EQ(cache->CopyDone(second[0].copy_id), absl::OkStatus());
  EXPECT_THAT(cache->TakeCopyOuts(9), SizeIs(0)) << "the next two to go have their copies";
  cache.Lease(1);
  EXPECT_THAT(cache.Peek({1}), Pair(0, 1));
  EXPECT_THAT(cache->TakeCopyOuts(9), SizeIs(1)) << "the third is next but one";
}

TEST(WriteBack, TakesAWholeReleaseOnceItsFirstBlockIsAboutToGo) {
  TestCache cache(8, 8, &Xxh3ChainHash, /*write_back_ahead_blocks=*/1);
  StoreOneByOne(&cache, {1});
  cache.Release(cache.Store({2, 3, 4, 5}));
  StoreOneByOne(&cache, {6, 7});
  EXPECT_EQ(cache.WriteBack(), 0) << "1 block is free";
  cache.Lease(1);
  EXPECT_EQ(cache.WriteBack(), 1);
  cache.Lease(1);
  EXPECT_EQ(cache.WriteBack(), 4);
  EXPECT_THAT(cache.Lease(4), SizeIs(4));
  EXPECT_THAT(cache.Peek({2, 3, 4, 5}), Pair(0, 4));
}

TEST(WriteBack, LeavesTheBlockMatchableAndUnevictableUntilCopyDone) {
  TestCache cache(1, 1);
  const auto entries = cache.Store({1});
  cache.Match({1});
  cache.Release({entries[0], entries[0]});
  const auto copies = cache->TakeCopyOuts(1);
  EXPECT_EQ(cache->stats().num_copying_out, 1u);
  EXPECT_THAT(cache.Peek({1}), Pair(1, 0));
  EXPECT_THAT(cache.Lease(1), SizeIs(0));
  EXPECT_EQ(cache->num_available(), 0u);
  EXPECT_EQ(cache->CopyDone(copies[0].copy_id), absl::OkStatus());
  EXPECT_THAT(cache.Lease(1), SizeIs(1));
  EXPECT_THAT(cache.Peek({1}), Pair(0, 1));
}

// With as many blocks as entries: hits, releases and writes back the entry.
void MoveToBothTiers(TestCache* cache, const std::vector<uint64_t>& entry, int32_t id) {
  cache->Match({id});
  cache->Release({entry[0], entry[0]});
  EXPECT_EQ(cache->WriteBack(), 1);
}

TEST(WriteBackToAFullHostTier, TakesTheSlotOfAnEntryInUseFirst) {
  TestCache cache(3, 2, &Xxh3ChainHash, /*write_back_ahead_blocks=*/3);
  const auto first = cache.Store({1});
  const auto second = cache.Store({2});
  const auto third = cache.Store({3});
  MoveToBothTiers(&cache, first, 1);
  MoveToBothTiers(&cache, second, 2);
  cache.Match({2});
  MoveToBothTiers(&cache, third, 3);
  EXPECT_EQ(cache->stats().evicted_host_slots, 1u);
  cache.Lease(2);  // evicts the two that are not in use
  EXPECT_THAT(cache.Peek({1}), Pair(0, 1));
  EXPECT_THAT(cache.Peek({2}), Pair(1, 0));
  EXPECT_THAT(cache.Peek({3}), Pair(0, 1));
  cache.Release(second);
  EXPECT_THAT(cache->TakeCopyOuts(9), SizeIs(1)) << "not in use any more, it is written back again";
}

TEST(WriteBackToAFullHostTier, TakesTheSlotOfAnEntryThatStaysOnTheDeviceBeforeOneThatHasLeftIt) {
  TestCache cache(3, 2, &Xxh3ChainHash, /*write_back_ahead_blocks=*/1);
  cache.Lease(1);
  const auto first = cache.Store({1});
  const auto second = cache.Store({2});
  MoveToBothTiers(&cache, first, 1);
  auto leased = cache.Lease(1);
  MoveToBothTiers(&cache, second, 2);
  leased.push_back(cache.Lease(1)[0]);
  EXPECT_EQ(cache->Return(leased), absl::OkStatus());
  const MatchResult restored = cache.Match({2});
  ASSERT_THAT(restored.copies, SizeIs(1));
  EXPECT_EQ(cache->CopyDone(restored.copies[0].copy_id), absl::OkStatus());
  const auto third = cache.Store({3});
  cache.Match({3});
  cache.Release({third[0], third[0]});
  cache.Release(second);  // more recent than the third: it is not about to go
  EXPECT_EQ(cache.WriteBack(), 1);
  cache.Lease(1);
  EXPECT_THAT(cache.Peek({1}), Pair(0, 1)) << "it has left the device, and is kept";
  EXPECT_THAT(cache.Peek({2}), Pair(1, 0)) << "it has lost its copy alone";
  EXPECT_THAT(cache.Peek({3}), Pair(0, 1));
}

TEST(WriteBackToAFullHostTier, PushesOutTheLeastRecentlyReleasedOfThoseThatHaveLeftTheDevice) {
  TestCache cache(1, 2);
  cache.StoreOnHost({1}, 1);
  cache.StoreOnHost({2}, 1);
  cache.StoreOnHost({3}, 1);
  EXPECT_THAT(cache.Peek({1}), Pair(0, 0));
  EXPECT_THAT(cache.Peek({2}), Pair(0, 1));
  EXPECT_THAT(cache.Peek({3}), Pair(0, 1));
}

TEST(WriteBackToAFullHostTier, PushesOutNoMoreRecentEntry) {
  TestCache cache(5, 1);
  const auto chain = cache.Store({1, 2, 3});
  cache.Release({chain[0]});  // not worth a copy yet
  MoveToBothTiers(&cache, cache.Store({9}), 9);
  const auto blocks = cache.Lease(2);
  ASSERT_THAT(cache.Peek({9}), Pair(0, 1));
  cache.Commit(TestCache::CommitOf(blocks, {4}, chain[2]));  // the chain is long now
  EXPECT_EQ(cache.WriteBack(), 0);
  EXPECT_THAT(cache.Peek({9}), Pair(0, 1));
  cache.Release({chain[1]});
  EXPECT_EQ(cache.WriteBack(), 1) << "released later";
  EXPECT_THAT(cache.Peek({9}), Pair(0, 0));
}

TEST(CopyDone, OfACopyThatIsNotUnderWayIsRefused) {
  TestCache cache(1, 1);
  const absl::Status status = cache->CopyDone(5);
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(status.message(), "no copy 5 is under way");
}

// The target of a host hit is neither matchable nor available before its copy has run, and the
// slot that it comes from stays.
TEST(Restore, KeepsItsBlockAndItsSlotUntilCopyDone) {
  TestCache cache(2, 1);
  cache.StoreOnHost({1}, 2);
  const MatchResult match = cache.Match({1});
  ASSERT_THAT(match.restoring, SizeIs(1));
  ASSERT_THAT(match.copies, SizeIs(1));
  EXPECT_EQ(match.copies[0].direction, CopyDirection::kToDevice);
  EXPECT_EQ(match.copies[0].block, match.restoring[0].block);
  EXPECT_EQ(cache->stats().num_restoring, 1u);
  EXPECT_THAT(cache.Peek({1}), Pair(0, 0)) << "not for a second one while it is being restored";
  EXPECT_THAT(cache.Match({1}).restoring, SizeIs(0));

  // The request has gone; its copy has not.
  cache.Release({match.restoring[0].entry});
  EXPECT_THAT(cache.Lease(2), SizeIs(1));
  EXPECT_EQ(cache->stats().num_host_valid, 1u);
  EXPECT_EQ(cache->CopyDone(match.copies[0].copy_id), absl::OkStatus());
  EXPECT_THAT(cache.Peek({1}), Pair(1, 0));
  EXPECT_THAT(cache.Lease(2), SizeIs(1));
}

TEST(Restore, IsLeftOutWhenTheCallerFindsItTooDear) {
  TestCache cache(2, 1);
  cache.StoreOnHost({1}, 2);
  EXPECT_THAT(cache.Match({1}, /*allow_restore=*/false).restoring, SizeIs(0));
  EXPECT_EQ(cache->stats().num_restoring, 0u);
}

TEST(Restore, EndsWhereTheBlocksEnd) {
  TestCache cache(3, 3);
  cache.StoreOnHost({1, 2, 3}, 3);
  cache.Lease(1);
  const MatchResult match = cache.Match({1, 2, 3});
  EXPECT_THAT(match.restoring, SizeIs(2));
}

TEST(Restore, TakesItsBlocksFromUnpinnedEntriesButNotFromItsOwnChain) {
  TestCache cache(2, 2);
  cache.StoreOnHost({1, 2}, 2);
  const MatchResult head = cache.Match({1});
  EXPECT_EQ(cache->CopyDone(head.copies[0].copy_id), absl::OkStatus());
  cache.Release({head.restoring[0].entry});
  cache.Release(cache.Store({5}));  // on the device, more recent than entry 1
  const MatchResult match = cache.Match({1, 2});
  EXPECT_THAT(match.device, SizeIs(1));
  EXPECT_THAT(match.restoring, SizeIs(1));
  EXPECT_THAT(cache.Peek({5}), Pair(0, 0));
}

// Acknowledgements can overtake each other.
TEST(Restore, IsCompleteOnlyBelowACompleteParent) {
  TestCache cache(2, 2);
  cache.StoreOnHost({1, 2}, 2);
  const MatchResult match = cache.Match({1, 2});
  ASSERT_THAT(match.copies, SizeIs(2));
  EXPECT_EQ(cache->CopyDone(match.copies[1].copy_id), absl::OkStatus());
  EXPECT_EQ(cache->stats().num_restoring, 2u);
  EXPECT_EQ(cache->CopyDone(match.copies[0].copy_id), absl::OkStatus());
  EXPECT_EQ(cache->stats().num_committed_pinned, 2u);
}

TEST(Restore, OfAFlushedEntryEndsWithItsCopy) {
  TestCache cache(1, 1);
  cache.StoreOnHost({1}, 1);
  const MatchResult match = cache.Match({1});
  EXPECT_EQ(cache->Flush(std::nullopt), 1u);
  EXPECT_EQ(cache->stats().num_host_quarantined, 1u);
  cache.Release({match.restoring[0].entry});
  EXPECT_THAT(cache.Lease(1), SizeIs(0)) << "the copy still writes the block";
  EXPECT_EQ(cache->CopyDone(match.copies[0].copy_id), absl::OkStatus());
  EXPECT_THAT(cache.Lease(1), SizeIs(1));
  EXPECT_EQ(cache->stats().num_host_free, 1u);
}

TEST(CommitBelowHost, GivesAnEntryInTheHostTierTheCallersBlock) {
  TestCache cache(2, 1);
  const auto entries = cache.StoreOnHost({1}, 2);
  const auto blocks = cache.Lease(1);
  EXPECT_THAT(cache.Commit(TestCache::CommitOf(blocks, {1})),
              ElementsAre(CommittedBlock{entries[0], false}));
  EXPECT_EQ(cache->stats().num_leased, 0u);
  EXPECT_EQ(cache->stats().num_host_valid, 1u);
  EXPECT_THAT(cache.Peek({1}), Pair(1, 0));
}

// I10 across tiers: a host copy that no chain leads to any more goes with its parent.
TEST(EvictionAcrossTiers, LeavesNoHostCopyWithoutItsPrefix) {
  TestCache cache(2, 1);
  const auto entries = cache.Store({1, 2});
  cache.Match({1, 2});
  cache.Release({entries[1], entries[1]});  // the child alone is written back
  const auto copies = cache->TakeCopyOuts(9);
  ASSERT_THAT(copies, SizeIs(1));
  EXPECT_EQ(cache->CopyDone(copies[0].copy_id), absl::OkStatus());
  cache.Lease(1);
  EXPECT_THAT(cache.Peek({1, 2}), Pair(1, 1));
  cache.Release({entries[0], entries[0]});
  cache.Lease(1);
  EXPECT_EQ(cache->stats().num_entries, 0u);
  EXPECT_EQ(cache->stats().num_host_free, 1u);
}

// After a reconnect only what the session states is held.
TEST(Reconcile, DropsEveryPinAndLeaseThatIsNotClaimed) {
  TestCache cache(6);
  const auto kept = cache.Store({1});
  const auto dropped = cache.Store({2});
  cache.Match({1});
  const auto leased = cache.Lease(3);
  const std::vector<PinCount> pins = {{kept[0], 1}};
  EXPECT_EQ(cache->Reconcile(pins, std::vector<PoolBlock>{leased[1]}), absl::OkStatus());
  const PrefixCacheStats stats = cache->stats();
  EXPECT_EQ(stats.num_leased, 1u);
  EXPECT_EQ(stats.num_committed_pinned, 1u);
  EXPECT_EQ(stats.num_committed_unpinned, 1u);
  EXPECT_EQ(cache->Return(std::vector<PoolBlock>{leased[1]}), absl::OkStatus());
  cache.Release(kept);
  EXPECT_FALSE(cache->Release(kept).ok());
  EXPECT_FALSE(cache->Release(dropped).ok());
}

struct FalseClaim {
  const char* name;
  std::vector<PinCount> pins;
  std::vector<PoolBlock> leased;  // of a pool of 3: 0 committed as entry 1 with one pin, 1 leased
  const char* text;
};

class RefusedReconcile : public testing::TestWithParam<FalseClaim> {};

TEST_P(RefusedReconcile, NamesTheClaimAndChangesNothing) {
  TestCache cache(3);
  cache.Store({1});
  cache.Lease(1);
  EXPECT_EQ(cache->Reconcile(GetParam().pins, GetParam().leased).message(), GetParam().text);
  EXPECT_EQ(cache->stats().num_leased, 1u);
  EXPECT_EQ(cache->stats().num_committed_pinned, 1u);
}

INSTANTIATE_TEST_SUITE_P(
    All, RefusedReconcile,
    testing::Values(
        FalseClaim{
            "UnknownEntry", {{7, 1}}, {}, "a pin on entry 7 is claimed; there is no such entry"},
        FalseClaim{"TooManyPins", {{1, 2}}, {}, "2 pins on entry 1 are claimed; it has 1"},
        FalseClaim{
            "PinAndBlockOfOneEntry", {{1, 1}}, {{0, 1}}, "2 pins on entry 1 are claimed; it has 1"},
        FalseClaim{"FreeBlock", {}, {{1, 1}, {2, 1}}, "block 2 is claimed as leased; it is free"},
        FalseClaim{"StaleBlock",
                   {},
                   {{1, 9}},
                   "block 1 of generation 9 is stale: the block has reached generation 1"},
        FalseClaim{"NamedTwice", {}, {{1, 1}, {1, 1}}, "block 1 is claimed twice"}),
    [](const auto& info) { return info.param.name; });

// A4 and A10: the stream broke between a Commit and its answer, so the session does not know
// whether the block is leased or pinned. Either way it stays the session's.
TEST(Reconcile, KeepsABlockWhoseCommitWasNotAnswered) {
  TestCache cache(2);
  const auto blocks = cache.Lease(2);
  const CommitRequest request = TestCache::CommitOf(blocks, {1, 2});
  const auto lost = cache.Commit(request);
  EXPECT_EQ(cache->Reconcile({}, blocks), absl::OkStatus());
  EXPECT_EQ(cache->num_available(), 0u);
  EXPECT_EQ(cache.Commit(request), lost);
  cache.Release({lost[0].entry, lost[1].entry});
  EXPECT_EQ(cache->stats().num_committed_pinned, 0u);
}

TEST(Reconcile, CancelsARestoreThatNobodyClaims) {
  TestCache cache(1, 1);
  cache.StoreOnHost({1}, 1);
  const MatchResult lost = cache.Match({1});
  EXPECT_EQ(cache->Reconcile({}, {}), absl::OkStatus());
  EXPECT_EQ(cache->stats().num_quarantined, 1u);
  EXPECT_THAT(cache.Lease(1), SizeIs(0));
  EXPECT_THAT(cache.Peek({1}), Pair(0, 1));
  cache->Fence();
  EXPECT_THAT(cache.Lease(1), SizeIs(1));
  EXPECT_FALSE(cache->CopyDone(lost.copies[0].copy_id).ok());
}

TEST(Reconcile, FreesACancelledRestoreWhenItsCopyIsReported) {
  TestCache cache(1, 1);
  cache.StoreOnHost({1}, 1);
  const MatchResult match = cache.Match({1});
  EXPECT_EQ(cache->Reconcile({}, {}), absl::OkStatus());
  EXPECT_EQ(cache->CopyDone(match.copies[0].copy_id), absl::OkStatus());
  EXPECT_EQ(cache->stats().num_quarantined, 0u);
  EXPECT_THAT(cache.Lease(1), SizeIs(1));
}

TEST(Reconcile, LetsAClaimedRestoreGoOn) {
  TestCache cache(2, 2);
  cache.StoreOnHost({1, 2}, 2);
  const MatchResult match = cache.Match({1, 2});
  const std::vector<PinCount> child_alone = {{match.restoring[1].entry, 1}};
  EXPECT_EQ(cache->Reconcile(child_alone, {}).message(),
            "entry 2, which is being restored, is claimed without its parent 1");
  const std::vector<PinCount> both = {{match.restoring[0].entry, 1}, {match.restoring[1].entry, 1}};
  EXPECT_EQ(cache->Reconcile(both, {}), absl::OkStatus());
  for (const CopyOrder& copy : match.copies) {
    EXPECT_EQ(cache->CopyDone(copy.copy_id), absl::OkStatus());
  }
  EXPECT_EQ(cache->stats().num_committed_pinned, 2u);
}

// I5: a process of the dead session may still write what it had.
TEST(EndSession, QuarantinesLeasesUntilTheFence) {
  TestCache cache(3);
  const auto entries = cache.Store({1});
  const auto leased = cache.Lease(1);
  cache->EndSession();
  EXPECT_EQ(cache->stats().num_quarantined, 1u);
  EXPECT_EQ(cache->stats().num_committed_unpinned, 1u);
  EXPECT_EQ(cache->Return(leased).message(), "block 1 is not leased but quarantined");
  EXPECT_THAT(cache.Peek({1}), Pair(1, 0)) << "the index survives";
  EXPECT_THAT(cache.Lease(3), SizeIs(2));
  cache->Fence();
  const auto fenced = cache.Lease(1);
  EXPECT_EQ(fenced, (std::vector<PoolBlock>{{leased[0].id, leased[0].generation + 1}}));
}

TEST(EndSession, QuarantinesTheBlocksAndSlotsOfCopiesUntilTheFence) {
  TestCache cache(3, 2);
  cache.StoreOnHost({1}, 3);
  const auto entries = cache.Store({2});
  cache.Match({2});
  cache.Release({entries[0], entries[0]});
  const auto write_backs = cache->TakeCopyOuts(9);
  ASSERT_THAT(write_backs, SizeIs(1));
  const MatchResult match = cache.Match({1});
  ASSERT_THAT(match.copies, SizeIs(1));
  cache->EndSession();
  const PrefixCacheStats ended = cache->stats();
  EXPECT_EQ(ended.num_quarantined, 1u) << "the target of the restore";
  EXPECT_EQ(ended.num_copying_out, 1u) << "the source of the write-back, whose content is good";
  EXPECT_EQ(ended.num_host_quarantined, 1u);
  EXPECT_THAT(cache.Peek({1}), Pair(0, 1));
  EXPECT_THAT(cache.Peek({2}), Pair(1, 0));
  EXPECT_THAT(cache.Lease(3), SizeIs(1));

  cache->Fence();
  const PrefixCacheStats fenced = cache->stats();
  EXPECT_EQ(fenced.num_quarantined + fenced.num_copying_out + fenced.num_host_quarantined, 0u);
  EXPECT_EQ(fenced.num_host_free, 1u);
  EXPECT_THAT(cache.Peek({2}), Pair(1, 0));
}

TEST(Fence, LeavesTheCopiesOfASessionThatGoesOn) {
  TestCache cache(1, 1);
  cache.StoreOnHost({1}, 1);
  const MatchResult match = cache.Match({1});
  cache->Fence();
  EXPECT_EQ(cache->stats().num_restoring, 1u);
  EXPECT_EQ(cache->CopyDone(match.copies[0].copy_id), absl::OkStatus());
}

}  // namespace
}  // namespace wintserve
