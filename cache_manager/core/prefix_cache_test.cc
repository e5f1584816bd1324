#include "cache_manager/core/prefix_cache.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <numeric>

#include "cache_manager/core/prefix_cache_test_util.h"

namespace wintserve {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Pair;
using ::testing::SizeIs;

TEST(PrefixCacheMatch, FindsTheLongestStoredChainAndPinsIt) {
  TestCache cache(4);
  const auto entries = cache.Store({1, 2, 3});
  cache.Release(entries);
  const MatchResult match = cache.Match({1, 2, 9, 3});
  ASSERT_THAT(match.device, SizeIs(2));
  EXPECT_EQ(match.device[0].entry, entries[0]);
  EXPECT_EQ(match.device[1].entry, entries[1]);
  EXPECT_THAT(cache.Lease(4), SizeIs(2)) << "the free block and the one of the unpinned entry";
}

// A prompt that is cached as a whole would leave nothing to compute logits from.
TEST(PrefixCacheMatch, LeavesAtLeastOneTokenToCompute) {
  TestCache cache(4);
  cache.Store({1, 2});
  auto prompt = Prompt({1, 2});
  EXPECT_EQ(cache->Peek("", prompt).device_blocks, 2u);
  prompt.pop_back();
  EXPECT_EQ(cache->Peek("", prompt).device_blocks, 1u);
  EXPECT_THAT(cache->Match("", prompt, true).device, SizeIs(1));
  prompt.resize(1);
  EXPECT_EQ(cache->Peek("", prompt).device_blocks, 0u);
  EXPECT_EQ(cache->Peek("", {}).device_blocks, 0u);
}

TEST(PrefixCacheMatch, NeverSharesTheUnfilledLastBlock) {
  TestCache cache(4);
  const auto blocks = cache.Lease(1);
  CommitRequest request = TestCache::CommitOf(blocks, {1});
  request.blocks[0].tokens.pop_back();
  const auto refused = cache->Commit(request);
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(refused.status().message(), "block 0 is committed with 1 tokens; a block has 2");
  EXPECT_EQ(cache->stats().num_leased, 1u);
}

TEST(PrefixCacheMatch, OfOneSaltIsBlindToTheOther) {
  TestCache cache(4);
  cache.Store({1}, 0, "tenant a");
  EXPECT_THAT(cache.Peek({1}, "tenant a"), Pair(1, 0));
  EXPECT_THAT(cache.Peek({1}, "tenant b"), Pair(0, 0));
  EXPECT_THAT(cache.Peek({1}), Pair(0, 0));
}

TEST(PrefixCacheMatch, NeedsTheSameRootSeed) {
  EXPECT_NE(DigestOfRoot("model", "a"), DigestOfRoot("mode", "la"));
  EXPECT_NE(DigestOfRoot("model", "a"), DigestOfRoot("other", "a"));
  EXPECT_EQ(DigestOfRoot("model", "a"), DigestOfRoot("model", "a"));
}

TEST(PrefixCacheMatch, TellsTheSameTokensUnderAnotherParentApart) {
  TestCache cache(4);
  cache.Store({1, 2});
  EXPECT_THAT(cache.Peek({2}), Pair(0, 0));
  EXPECT_THAT(cache.Peek({1, 1}), Pair(1, 0));
}

// Whoever can craft two blocks of one hash gets a miss, and not the other one's content.
TEST(PrefixCacheMatch, TakesACollisionOfTheHashForAMiss) {
  const ChainHash all_collide = [](const Hash128&, std::span<const int32_t>) {
    return Hash128{1, 1};
  };
  TestCache cache(4, 0, all_collide);
  cache.Store({1});
  EXPECT_THAT(cache.Peek({2}), Pair(0, 0));
  EXPECT_THAT(cache.Match({2}).device, SizeIs(0));
  EXPECT_THAT(cache.Peek({1}, "other salt"), Pair(0, 0));
  const auto blocks = cache.Lease(2);
  EXPECT_THAT(cache.Commit(TestCache::CommitOf(blocks, {2, 3}, 0, "other salt")),
              ElementsAre(CommittedBlock{0, false}, CommittedBlock{0, false}));
  EXPECT_EQ(cache->Return(blocks), absl::OkStatus());
  EXPECT_THAT(cache.Peek({1}), Pair(1, 0));
}

// A second look at admission finds what others have computed since the first.
TEST(PrefixCachePeek, PinsNothingAndSeesWhatWasCommittedMeanwhile) {
  TestCache cache(1);
  EXPECT_THAT(cache.Peek({1}), Pair(0, 0));
  cache.Release(cache.Store({1}));
  EXPECT_THAT(cache.Peek({1}), Pair(1, 0));
  EXPECT_EQ(cache->num_available(), 1u);
  EXPECT_THAT(cache.Lease(1), SizeIs(1));
}

// Pins of a waiting request can be revoked, and its blocks are available at once.
TEST(PrefixCacheRelease, MakesTheBlocksOfAWaitingRequestAvailable) {
  TestCache cache(2);
  cache.Release(cache.Store({1, 2}));
  const MatchResult waiting = cache.Match({1, 2});
  EXPECT_EQ(cache->num_available(), 0u);
  EXPECT_THAT(cache.Lease(2), SizeIs(0));
  cache.Release({waiting.device[0].entry, waiting.device[1].entry});
  EXPECT_EQ(cache->num_available(), 2u);
  EXPECT_THAT(cache.Lease(2), SizeIs(2));
}

TEST(PrefixCacheRelease, OfMorePinsThanThereAreIsRefusedWhole) {
  TestCache cache(2);
  const auto entries = cache.Store({1, 2});
  const std::vector<uint64_t> twice = {entries[1], entries[0], entries[0]};
  const absl::Status status = cache->Release(twice);
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(status.message(), "entry 1 has 1 pins, of which 2 are released");
  EXPECT_EQ(cache->Release(std::vector<uint64_t>{99}).message(), "no entry 99 to release");
  EXPECT_EQ(cache->stats().num_committed_pinned, 2u);
  cache.Release(entries);
}

TEST(PrefixCacheLease, GivesFewerThanAskedForWhenTheRestIsInUse) {
  TestCache cache(3);
  cache.Store({1});
  EXPECT_THAT(cache.Lease(5), SizeIs(2));
  EXPECT_THAT(cache.Lease(1), SizeIs(0));
  EXPECT_EQ(cache->Lease(0).status().message(), "a lease of 0 blocks; at least 1");
}

TEST(PrefixCacheReturn, IsWholeOrNothing) {
  TestCache cache(3);
  auto blocks = cache.Lease(2);
  blocks.push_back(blocks[0]);
  EXPECT_EQ(cache->Return(blocks).message(), "block 0 is returned twice");
  blocks.back() = {2, 1};
  EXPECT_EQ(cache->Return(blocks).message(), "block 2 is not leased but free");
  EXPECT_EQ(cache->stats().num_leased, 2u);
}

TEST(PrefixCacheReturn, RefusesAStaleGenerationAndCountsIt) {
  TestCache cache(1);
  const auto old = cache.Lease(1);
  EXPECT_EQ(cache->Return(old), absl::OkStatus());
  const auto current = cache.Lease(1);
  EXPECT_EQ(current[0].generation, old[0].generation + 1);
  const absl::Status status = cache->Return(old);
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()), HasSubstr("generation 1 is stale"));
  EXPECT_FALSE(cache->Commit(TestCache::CommitOf(old, {1})).ok());
  EXPECT_EQ(cache->stats().refused_stale, 2u);
  EXPECT_EQ(cache->stats().num_leased, 1u);
}

// Once committed a block is the cache's. It comes back through Release and eviction alone, at
// another generation, and not by what its former holder says.
TEST(PrefixCacheCommit, TakesTheBlockOutOfTheLease) {
  TestCache cache(1);
  const auto blocks = cache.Lease(1);
  const auto committed = cache.Commit(TestCache::CommitOf(blocks, {1}));
  EXPECT_EQ(cache->Return(blocks).message(), "block 0 is not leased but committed");
  cache.Release({committed[0].entry});
  const auto again = cache.Lease(1);
  EXPECT_EQ(again, (std::vector<PoolBlock>{{blocks[0].id, blocks[0].generation + 1}}));
}

// The answer to a Commit may be lost; sending it again neither fails nor pins twice.
TEST(PrefixCacheCommit, IsIdempotent) {
  TestCache cache(3);
  const auto blocks = cache.Lease(3);
  const CommitRequest request = TestCache::CommitOf(blocks, {1, 2, 3});
  const auto first = cache.Commit(request);
  EXPECT_EQ(cache.Commit(request), first);
  cache.Release({first[0].entry, first[1].entry, first[2].entry});
  EXPECT_EQ(cache->stats().num_committed_pinned, 0u);
}

TEST(PrefixCacheCommit, OfAnEntrysOwnBlockAsOtherContentIsRefused) {
  TestCache cache(2);
  const auto blocks = cache.Lease(2);
  cache.Commit(TestCache::CommitOf(blocks, {1, 2}));
  const auto other_tokens = cache->Commit(TestCache::CommitOf(blocks, {1, 3}));
  EXPECT_EQ(other_tokens.status().message(),
            "block 1 is not leased but committed with other content, as entry 2");
  const auto other_place = cache->Commit(TestCache::CommitOf({blocks[1]}, {2}));
  EXPECT_EQ(other_place.status().message(),
            "block 1 is not leased but committed with other content, as entry 2");
}

// A parent is named by its handle, so a chain grows chunk by chunk.
TEST(PrefixCacheCommit, ContinuesTheChainOfItsParentsHandle) {
  TestCache cache(4);
  const auto first = cache.Store({1, 2});
  cache.Store({3}, first[1]);
  EXPECT_THAT(cache.Peek({1, 2, 3}), Pair(3, 0));
  EXPECT_THAT(cache.Peek({3}), Pair(0, 0));
}

TEST(PrefixCacheCommit, BelowAnEntryThatIsGoneIndexesNothing) {
  TestCache cache(2);
  const auto gone = cache.Store({1});
  cache.Release(gone);
  const auto blocks = cache.Lease(2);
  EXPECT_THAT(cache.Commit(TestCache::CommitOf(blocks, {2, 3}, gone[0])),
              ElementsAre(CommittedBlock{0, false}, CommittedBlock{0, false}));
  EXPECT_EQ(cache->stats().num_leased, 2u);
  EXPECT_EQ(cache->stats().num_entries, 0u);
}

// Two requests have computed the same. The second holds the first one's entry; its own copy
// stays private, as its block table names it.
TEST(PrefixCacheCommit, OfADuplicatePinsTheExistingEntryAndLeavesTheCopyLeased) {
  TestCache cache(3);
  const auto existing = cache.Store({1});
  const auto copy = cache.Lease(1);
  EXPECT_THAT(cache.Commit(TestCache::CommitOf(copy, {1})),
              ElementsAre(CommittedBlock{existing[0], true}));
  EXPECT_EQ(cache->stats().num_leased, 1u);
  EXPECT_EQ(cache->stats().num_entries, 1u);
  cache.Release(existing);
  EXPECT_EQ(cache->num_available(), 1u) << "the second one's pin holds it";
  EXPECT_EQ(cache->Return(copy), absl::OkStatus());
  cache.Release(existing);
  EXPECT_EQ(cache->num_available(), 3u);
}

TEST(PrefixCacheCommit, NamesABadBlockAndChangesNothing) {
  TestCache cache(3);
  const auto blocks = cache.Lease(2);
  EXPECT_EQ(cache->Commit(TestCache::CommitOf({blocks[0], blocks[0]}, {1, 2})).status().message(),
            "block 0 is committed twice");
  EXPECT_EQ(cache->Commit(TestCache::CommitOf({blocks[0], {9, 1}}, {1, 2})).status().message(),
            "block 9 is not in the pool, which has 0 to 2");
  EXPECT_EQ(cache->Commit(TestCache::CommitOf({blocks[0], {2, 1}}, {1, 2})).status().message(),
            "block 2 is not leased but free");
  EXPECT_EQ(cache->stats().num_entries, 0u);
  EXPECT_EQ(cache->stats().num_leased, 2u);
}

// I10: what survives is always a usable prefix.
TEST(PrefixCacheEviction, TakesTheLeafBeforeItsParent) {
  TestCache cache(3);
  cache.Release(cache.Store({1, 2, 3}));
  for (uint32_t left = 3; left-- > 0;) {
    ASSERT_THAT(cache.Lease(1), SizeIs(1));
    EXPECT_THAT(cache.Peek({1, 2, 3}), Pair(left, 0));
  }
}

TEST(PrefixCacheEviction, TakesTheLeastRecentlyReleasedFirst) {
  TestCache cache(3);
  const auto a = cache.Store({1});
  const auto b = cache.Store({2});
  const auto c = cache.Store({3});
  cache.Release(b);
  cache.Release(c);
  cache.Release(a);
  cache.Release({cache.Match({2}).device[0].entry});  // now the most recent
  cache.Lease(1);
  EXPECT_THAT(cache.Peek({3}), Pair(0, 0));
  cache.Lease(1);
  EXPECT_THAT(cache.Peek({1}), Pair(0, 0));
  EXPECT_THAT(cache.Peek({2}), Pair(1, 0));
}

TEST(PrefixCacheEviction, TakesTheDeeperOfOneRelease) {
  TestCache cache(3);
  auto entries = cache.Store({1});
  const auto chain = cache.Store({2, 3});
  entries.insert(entries.end(), chain.begin(), chain.end());
  cache.Release(entries);
  cache.Lease(1);
  EXPECT_THAT(cache.Peek({1}), Pair(1, 0));
  EXPECT_THAT(cache.Peek({2, 3}), Pair(1, 0));
}

TEST(PrefixCacheEviction, LeavesTheAncestorsOfAPinnedEntry) {
  TestCache cache(2);
  const auto entries = cache.Store({1, 2});
  cache.Release({entries[0]});
  EXPECT_EQ(cache->num_available(), 0u);
  EXPECT_THAT(cache.Lease(1), SizeIs(0));
  cache.Release({entries[1]});
  EXPECT_EQ(cache->num_available(), 2u);
}

TEST(PrefixCacheFlush, FreesUnpinnedEntriesAtOnceAndOthersWithTheirLastPin) {
  TestCache cache(4);
  const auto pinned = cache.Store({1});
  cache.Release(cache.Store({2}));
  EXPECT_EQ(cache->Flush(std::nullopt), 2u);
  EXPECT_THAT(cache.Peek({1}), Pair(0, 0));
  EXPECT_EQ(cache->stats().num_free, 3u);
  EXPECT_EQ(cache->stats().num_committed_pinned, 1u);
  EXPECT_THAT(cache.Commit(TestCache::CommitOf(cache.Lease(1), {3}, pinned[0])),
              ElementsAre(CommittedBlock{0, false}));
  cache.Release(pinned);
  EXPECT_EQ(cache->stats().num_free, 3u);
  EXPECT_EQ(cache->Release(pinned).message(), "no entry 1 to release");
}

TEST(PrefixCacheFlush, OfOneSaltLeavesTheOthers) {
  TestCache cache(4);
  cache.Store({1}, 0, "a");
  cache.Store({1, 2}, 0, "b");
  EXPECT_EQ(cache->Flush("a"), 1u);
  EXPECT_EQ(cache->Flush("never seen"), 0u);
  EXPECT_THAT(cache.Peek({1}, "a"), Pair(0, 0));
  EXPECT_THAT(cache.Peek({1, 2}, "b"), Pair(2, 0));
}

TEST(PrefixCacheFlush, MakesRoomForTheSameContentUnderANewHandle) {
  TestCache cache(2);
  const auto before = cache.Store({1});
  cache->Flush(std::nullopt);
  const auto after = cache.Store({1});
  EXPECT_NE(after, before);
  EXPECT_EQ(cache.Match({1}).device[0].entry, after[0]);
}

TEST(PrefixCacheStats, CountHitsAndQueries) {
  TestCache cache(4);
  cache.Store({1, 2});
  cache.Match({1, 2, 3});
  cache.Match({4});
  const PrefixCacheStats stats = cache->stats();
  EXPECT_EQ(stats.matches, 2u);
  EXPECT_EQ(stats.queried_tokens, 7u + 3u);
  EXPECT_EQ(stats.device_hit_tokens, 4u);
  EXPECT_EQ(stats.committed_blocks, 2u);
}

TEST(PrefixCacheEvents, TellWhatIsStoredAndRemoved) {
  TestCache cache(1);
  const auto first = cache.Store({1});
  cache.Release(first);
  cache.Lease(1);
  uint64_t lost = 99;
  const auto events = cache->TakeEvents(&lost);
  EXPECT_EQ(lost, 0u);
  ASSERT_THAT(events, SizeIs(2));
  EXPECT_EQ(events[0].kind, CacheEvent::Kind::kStored);
  EXPECT_EQ(events[0].tokens, TokensOfBlock(1));
  EXPECT_TRUE(events[0].on_device);
  EXPECT_EQ(events[1].kind, CacheEvent::Kind::kRemoved);
  EXPECT_EQ(events[1].entry, first[0]);
  EXPECT_FALSE(events[1].on_device);
  EXPECT_THAT(cache->TakeEvents(&lost), SizeIs(0));
}

TEST(PrefixCacheEvents, AreBoundedAndCountWhatIsLost) {
  constexpr uint32_t kBlocks = PrefixCache::kMaxPendingEvents + 3;
  TestCache cache(kBlocks);
  std::vector<int32_t> ids(kBlocks);
  std::iota(ids.begin(), ids.end(), 0);
  const auto entries = cache.Store(ids);
  uint64_t lost = 0;
  const auto events = cache->TakeEvents(&lost);
  EXPECT_THAT(events, SizeIs(PrefixCache::kMaxPendingEvents));
  EXPECT_EQ(lost, 3u);
  EXPECT_EQ(events.front().entry, entries[3]);
}

}  // namespace
}  // namespace wintserve
