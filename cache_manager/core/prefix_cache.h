// The cache manager's decisions about KV blocks: who holds which block, which content can be
// reused, what is evicted, what moves between tiers. Deals in ids, never in bytes.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "cache_manager/core/cache_messages.h"
#include "cache_manager/core/chain_hash.h"
#include "cache_manager/core/pool_block.h"

namespace wintserve {

struct PrefixCacheConfig {
  uint32_t num_blocks = 0;      // device tier
  uint32_t num_host_slots = 0;  // host tier; 0: none
  // How many of the blocks that Lease would give next are to be had without losing content that is
  // worth a copy; see TakeCopyOuts. None: DefaultWriteBackAhead.
  std::optional<uint32_t> write_back_ahead_blocks = {};
  int block_size_tokens = 64;
  // Names everything that makes KV content comparable: weights, tokenizer, KV layout and type,
  // rope, block size. Two chains match only under the same seed and salt.
  std::string root_seed;
};

// Enough for the evictions of the next few steps to find their copies done (a plan of 8,192 tokens
// takes 128 blocks), and so few that most of the host tier is left to entries that are no longer on
// the device. At least 1.
constexpr uint32_t DefaultWriteBackAhead(uint32_t num_blocks, uint32_t num_host_slots) {
  return std::clamp(std::min(num_blocks, num_host_slots) / 8, 1u, 512u);
}

// One pool_epoch of the pool with its prefix index and tiers.
//
// Blocks:     FREE        -> LEASED       Lease
//             FREE        -> RESTORING    Match, the target of a host hit
//             LEASED      -> FREE         Return; Reconcile, not claimed
//             LEASED      -> COMMITTED    Commit, no duplicate
//             LEASED      -> QUARANTINED  EndSession
//             RESTORING   -> COMMITTED    CopyDone
//             RESTORING   -> QUARANTINED  EndSession; Reconcile, pin not claimed (FREE when its own
//                                         copy is done, and an ancestor's is not)
//             COMMITTED   -> COPYING_OUT  TakeCopyOuts; matchable all the time
//             COPYING_OUT -> COMMITTED    CopyDone; Fence after EndSession
//             COMMITTED   -> FREE         evicted (unpinned leaf, least recently released); flushed
//                                         or distrusted
//             QUARANTINED -> FREE         Fence; CopyDone of the cancelled copy
// Identity:   an entry is its parent entry plus its block_size_tokens token ids, compared exactly;
//             XXH3-128 of the chain is only the way to find it. A chain starts at a root, one per
//             salt, compared by SHA-256 of (root_seed, salt). Of two entries with one hash only the
//             first is indexed.
// Handles:    name entries, are never used again within this object; 0 names none.
// Pins:       a reference count of the session on an entry. An entry is not evicted while it or a
//             descendant has pins; a pinned entry has a block.
// Generation: of a block rises whenever it becomes FREE; a stale one is refused.
// Tiers:      an entry has a device block, a host slot, or both. On a chain, entries with a device
//             block come first, then those with a host slot alone: eviction takes an entry only
//             when no child has a copy on the same or a faster tier. When an entry without a host
//             slot leaves the device, host copies below it go too.
// Copies:     neither a block nor a host slot that a copy reads or writes is given to anyone else
//             before CopyDone or, for a cancelled copy, Fence.
// Trust:      an entry's block and its host copy each carry the newest step that wrote them: that
//             of the Commit, or of the CopyDone that filled them, and never an older one than what
//             was copied. Step 0 is unknown and counts as newer than any.
// Invariant:  the block states sum up to num_blocks after every call; CheckInvariants() verifies
//             all of the above.
// Threading:  thread-compatible. Time is counted in calls; there is no clock.
class PrefixCache {
 public:
  static constexpr size_t kMaxPendingEvents = 16384;

  // REQUIRES: 0 < num_blocks < 2^31, block_size_tokens > 0. Another `chain_hash` than the default
  // is for tests of collisions.
  explicit PrefixCache(PrefixCacheConfig config, ChainHash chain_hash = &Xxh3ChainHash);
  ~PrefixCache();

  // How much of the prompt a Match would find now; pins nothing and touches no LRU.
  PeekResult Peek(const std::string& salt, std::span<const int32_t> tokens) const;

  // The longest reusable chain of full blocks within tokens[0, size - 1): at least one token is
  // left to compute. Device hits are pinned. Host hits that follow them directly are pinned and get
  // a FREE or evictable block each as RESTORING, if `allow_restore` and while there are blocks; the
  // caller copies and reports CopyDone (also when it has released the pins meanwhile), then holds
  // the pins like any other. The chain ends before an entry that is being restored already.
  MatchResult Match(const std::string& salt, std::span<const int32_t> tokens, bool allow_restore);

  // Up to `count` blocks, evicting as needed: fewer, or none, when the rest is pinned or leased.
  // INVALID_ARGUMENT: count is 0.
  absl::StatusOr<std::vector<PoolBlock>> Lease(uint32_t count);

  // Makes leased, written blocks matchable: entries below `parent` (0: the root of `salt`), each
  // the child of the one before. The caller has pinned the parent. One result per block, in order:
  //   entry != 0, !duplicate  the block is COMMITTED under the entry, pinned for the caller. Also
  //                           the answer when this very block (id, generation) is that entry's
  //                           already: then it gets a pin only if it has none.
  //   entry != 0, duplicate   another block holds the same content: that entry is pinned for the
  //                           caller, whose own block stays LEASED and is not indexed.
  //   entry == 0              it cannot be indexed: the parent is gone (flushed) or not on the
  //                           device, another caller is restoring this content, or the hash is
  //                           another entry's. This block and the rest stay LEASED.
  // INVALID_ARGUMENT, FAILED_PRECONDITION: a block unknown, named twice, stale, neither LEASED nor
  // this entry's own, or a wrong number of tokens; names it, and nothing has changed.
  absl::StatusOr<std::vector<CommittedBlock>> Commit(const CommitRequest& request);

  // Drops one pin of each (an entry named twice: two). FAILED_PRECONDITION: an entry unknown or
  // without that many pins; nothing has changed.
  absl::Status Release(std::span<const uint64_t> entries);

  // LEASED blocks become FREE. Whole or nothing. INVALID_ARGUMENT: no such block, or named twice.
  // FAILED_PRECONDITION: stale, or not leased.
  absl::Status Return(std::span<const PoolBlock> blocks);

  // Write-backs that are due, at most `max_copies`; their blocks are COPYING_OUT until CopyDone.
  // Take the COMMITTED entries without pins in the order of eviction: least recently released
  // first, of one release the deeper first. The first (write_back_ahead_blocks - FREE blocks -
  // COPYING_OUT blocks) of them, and all others of the last one's release, are about to go. Of
  // those each one without a host copy is due that has been hit or lies on a chain of at least 4
  // blocks; the least recently released first, of one release the last in the order of eviction
  // first. It gets a FREE slot. When there is none, it gets that of
  //   1. a pinned entry that is COMMITTED, the lowest handle;
  //   2. the last entry of the order that has a copy, if it is not about to go;
  //   3. the first entry, in the same order, that is in the host tier alone and has no child, and
  //      only if the one that is due comes after it in that order.
  // In 1 and 2 the content stays on the device, and is written back again when it is about to go.
  std::vector<CopyOrder> TakeCopyOuts(size_t max_copies);

  // The copy has run on every rank, in whatever order. An entry whose ancestor is being restored
  // stays RESTORING until that copy is done too. Of a cancelled copy: its block and slot are freed
  // without waiting for Fence. `step`: the newest that ran it. FAILED_PRECONDITION: no such copy.
  absl::Status CopyDone(uint64_t copy_id, uint64_t step = 0);

  // The session states what it holds after a reconnect; all other pins and leases are dropped (the
  // blocks become FREE: whatever a plan under way names must be claimed).
  //  - A block whose Commit has not been answered is claimed as leased. If it has been committed
  //    the claim keeps one pin of its entry, and the Commit can be sent again.
  //  - The restore of an entry goes on if its pin is claimed (report CopyDone, again if in doubt),
  //    and is cancelled otherwise, its block QUARANTINED. Write-backs go on.
  // INVALID_ARGUMENT: no such block, or named twice. FAILED_PRECONDITION: it claims what it does
  // not hold, or an entry being restored without its parent. Names it; nothing has changed.
  absl::Status Reconcile(std::span<const PinCount> pins, std::span<const PoolBlock> leased);

  // The session has ended, and that of another API server may follow on the same pool: drops all
  // pins and cancels all copies. LEASED and RESTORING blocks and filling host slots become
  // QUARANTINED; COPYING_OUT blocks, which are only read, stay so and matchable. What was never
  // committed is not indexed. Saying it again changes nothing.
  void EndSession();
  // Every process that could write to quarantined memory, or could run a cancelled copy, has gone
  // or has drained. Copies of a session that goes on are not affected.
  void Fence();

  // Nothing that is indexed now matches any more (of one salt, or at all). Entries without pins and
  // copies are freed at once, the others when the last of them goes. Returns the number of entries
  // dropped from the index.
  uint64_t Flush(const std::optional<std::string>& salt);

  // What the steps from `first_step` on have written is wrong. As by Flush, entries match no more
  // whose block is of such a step, or without a block their host copy, or that are being restored,
  // and their descendants. Of the other entries host copies that are of such a step, or being made,
  // are dropped. A copy under way stays so until CopyDone, though nothing comes of it. Returns the
  // number of entries dropped from the index. REQUIRES: first_step > 0.
  uint64_t DistrustSteps(uint64_t first_step);

  // Blocks that Lease could give now: FREE and evictable ones.
  uint32_t num_available() const;
  // Linear in num_host_slots.
  PrefixCacheStats stats() const;

  // Events since the last call, oldest first, at most kMaxPendingEvents; `lost` counts what was
  // dropped, the oldest first.
  std::vector<CacheEvent> TakeEvents(uint64_t* lost);

  // INTERNAL describes the first broken invariant: block states and generations, holders of blocks
  // and slots, copies, what is quarantined (I5), pins (I2), chains without orphans (I10), orders of
  // eviction. For tests and audits, linear in the pool's size.
  absl::Status CheckInvariants() const;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace wintserve
