// The state behind PrefixCache and the transitions that its operations are made of.
#pragma once

#include <cstdint>
#include <limits>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/container/btree_set.h"
#include "absl/status/status.h"
#include "cache_manager/core/block_pool.h"
#include "cache_manager/core/cache_messages.h"
#include "cache_manager/core/chain_hash.h"
#include "cache_manager/core/event_log.h"
#include "cache_manager/core/host_tier.h"
#include "cache_manager/core/prefix_index.h"

namespace wintserve {

// Keeps the pool, the index, the host tier, the copies under way and the orders of eviction
// consistent: every public call leaves all of CheckInvariants() true. The rules of use (who may ask
// for what) are PrefixCache's.
//
// Threading: thread-compatible. CacheEntry pointers are valid until a call that may end them says
//            so.
class CacheState {
 public:
  static constexpr uint64_t kUnknownStep = std::numeric_limits<uint64_t>::max();

  CacheState(uint32_t num_blocks, uint32_t num_host_slots, uint32_t write_back_ahead_blocks,
             size_t max_pending_events, ChainHash chain_hash);

  BlockPool& pool() { return pool_; }
  const BlockPool& pool() const { return pool_; }
  const HostTier& host() const { return host_; }
  PrefixIndex& index() { return index_; }
  const PrefixIndex& index() const { return index_; }
  EventLog& events() { return events_; }

  // A root, or an entry whose block holds its content: such an entry can have children on the
  // device.
  bool IsReady(const CacheEntry& entry) const;
  bool IsRestoring(const CacheEntry& entry) const;
  // In a host slot alone, and complete there.
  bool IsOnHostOnly(const CacheEntry& entry) const;
  CacheEntry* EntryOf(int32_t block) const { return entry_of_block_[block]; }

  // A new point in time for releases.
  void Tick() { ++now_; }
  void Pin(CacheEntry* entry);
  // May end the entry, when it has been flushed.
  void Unpin(CacheEntry* entry, uint32_t count);

  // A FREE block, or one that is evicted for it; nullopt: neither. May end entries without pins
  // that are no ancestors of a pinned entry.
  std::optional<PoolBlock> TakeBlock(BlockState state);
  // Gives `entry`, new or in a host slot alone, this LEASED block as its COMMITTED one. Steps here
  // and below are the newest that wrote; one that is unknown is kUnknownStep.
  void CommitBlock(CacheEntry* entry, int32_t block, uint64_t step);

  // REQUIRES: IsOnHostOnly, and `block` has just been taken as RESTORING.
  CopyOrder StartRestore(CacheEntry* entry, PoolBlock block);
  // The next write-back; nullopt when none is due or no slot can be had. May end an entry that is
  // in the host tier alone.
  std::optional<CopyOrder> StartWriteBack();
  // False: no such copy. May end entries that have been flushed.
  bool EndCopy(uint64_t copy_id, uint64_t step);
  // The entry loses its RESTORING block. May end the entry, when it has been flushed.
  void CancelRestore(CacheEntry* entry);
  // Entries stay on the device, COPYING_OUT until EndCopy or EndCancelledCopies.
  void CancelWriteBacks();
  void EndCancelledCopies();

  // Takes a leaf of the forest out of the index, and ends it unless it is pinned or being copied.
  void Flush(CacheEntry* entry);
  // Whether what a Match of the entry would read has been, or is being, written by `first_step` or
  // a later step.
  bool IsWrittenSince(const CacheEntry& entry, uint64_t first_step) const;
  // Drops the entry's host copy if that was, or is being, made by such a step. The entry stays.
  // REQUIRES: indexed, not IsWrittenSince.
  void DropHostCopyMadeSince(CacheEntry* entry, uint64_t first_step);

  // FREE blocks and those that could be evicted now.
  uint32_t num_available() const { return pool_.num_in(BlockState::kFree) + num_evictable_; }
  void FillStats(PrefixCacheStats* stats) const;
  absl::Status CheckInvariants() const;

 private:
  struct Copy {
    CopyDirection direction = CopyDirection::kToHost;
    int32_t block = 0;
    uint32_t host_slot = 0;
    CacheEntry* entry = nullptr;  // null: a cancelled restore
    bool cancelled = false;
  };
  // Least recently released first; of one release the deeper first, so that leaves go first.
  struct EvictedBefore {
    bool operator()(const CacheEntry* a, const CacheEntry* b) const;
  };
  using EvictionOrder = absl::btree_set<CacheEntry*, EvictedBefore>;
  // Any order, but always the same.
  struct StoredBefore {
    bool operator()(const CacheEntry* a, const CacheEntry* b) const;
  };

  std::optional<BlockState> StateOf(const CacheEntry& entry) const;
  // Recomputes what `entry` is counted and ordered as, and its ancestors where that changes them.
  void Refresh(CacheEntry* entry);
  bool RefreshOne(CacheEntry* entry);
  void MarkLongChain(CacheEntry* entry);
  void SetBlockState(CacheEntry* entry, BlockState from, BlockState to);
  void AttachBlock(CacheEntry* entry, int32_t block);
  int32_t DetachBlock(CacheEntry* entry);
  void DiscardSlot(CacheEntry* entry);
  void EvictFromDevice(CacheEntry* entry);
  void EvictFromHost(CacheEntry* entry);
  // The time of the last release whose entries are about to be evicted; nullopt: none are.
  std::optional<uint64_t> LastReleaseToGo() const;
  // Whose slot a write-back gets when none is free; null: nobody's.
  CacheEntry* SlotDonor(uint64_t last_release_to_go) const;
  // The entry that is due and gets that slot, or a free one (donor: null); null: none.
  CacheEntry* NextToWriteBack(uint64_t last_release_to_go, CacheEntry* donor) const;
  void Remove(CacheEntry* entry);
  void Unindex(CacheEntry* entry);
  void EndIfFlushed(CacheEntry* entry);
  void CompleteRestores(CacheEntry* entry);
  void Finish(const Copy& copy, uint64_t step);
  void Record(CacheEvent::Kind kind, const CacheEntry& entry);
  absl::Status CheckEntry(const CacheEntry& entry) const;
  absl::Status CheckOrders(const CacheEntry& entry) const;
  absl::Status CheckCopies() const;
  absl::Status CheckBlocksOfNobody() const;
  absl::Status CheckNoOrphans() const;

  BlockPool pool_;
  HostTier host_;
  PrefixIndex index_;
  EventLog events_;
  uint64_t now_ = 0;
  uint64_t last_copy_id_ = 0;
  std::map<uint64_t, Copy> copies_;  // under way, by id
  std::vector<CacheEntry*> entry_of_block_;
  std::vector<CacheEntry*> entry_of_slot_;
  const uint32_t write_back_ahead_blocks_;
  EvictionOrder device_order_;  // can be evicted from the device now
  EvictionOrder host_order_;    // in the host tier alone, and can be evicted
  // COMMITTED without pins. Its first ones are evicted next: who uses an entry uses its ancestors
  // too, so leaves come first. Empty, like the next three, without a host tier.
  EvictionOrder idle_order_;
  EvictionOrder write_back_order_;  // of them, those worth a host copy that have none
  // COMMITTED with a host copy that no copy order uses: without pins, with pins.
  EvictionOrder idle_copies_;
  absl::btree_set<CacheEntry*, StoredBefore> pinned_copies_;
  uint32_t num_evictable_ = 0;
  uint32_t num_committed_pinned_ = 0;
  uint64_t num_evicted_device_blocks_ = 0;
  uint64_t num_evicted_host_slots_ = 0;
};

}  // namespace wintserve
