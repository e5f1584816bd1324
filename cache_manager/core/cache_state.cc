#include "cache_manager/core/cache_state.h"

#include <algorithm>
#include <iterator>
#include <tuple>
#include <utility>

#include "common/check.h"

namespace wintserve {
namespace {

// From here on recomputing costs more than a copy does.
constexpr uint32_t kLongChainBlocks = 4;

void SetListed(auto* order, bool* listed, bool wanted, CacheEntry* entry) {
  if (*listed == wanted) return;
  if (wanted) {
    order->insert(entry);
  } else {
    order->erase(entry);
  }
  *listed = wanted;
}

void SetCounted(uint32_t* count, bool* counted, bool wanted) {
  if (*counted == wanted) return;
  *count += wanted ? 1 : -1;
  *counted = wanted;
}

}  // namespace

bool CacheState::EvictedBefore::operator()(const CacheEntry* a, const CacheEntry* b) const {
  return std::tie(a->last_release, b->depth, a->handle) <
         std::tie(b->last_release, a->depth, b->handle);
}

bool CacheState::StoredBefore::operator()(const CacheEntry* a, const CacheEntry* b) const {
  return a->handle < b->handle;
}

CacheState::CacheState(uint32_t num_blocks, uint32_t num_host_slots,
                       uint32_t write_back_ahead_blocks, size_t max_pending_events,
                       ChainHash chain_hash)
    : pool_(num_blocks),
      host_(num_host_slots),
      index_(chain_hash),
      events_(max_pending_events),
      entry_of_block_(num_blocks),
      entry_of_slot_(num_host_slots),
      write_back_ahead_blocks_(write_back_ahead_blocks) {}

std::optional<BlockState> CacheState::StateOf(const CacheEntry& entry) const {
  if (!entry.block.has_value()) return std::nullopt;
  return pool_.state(*entry.block);
}

bool CacheState::IsReady(const CacheEntry& entry) const {
  if (entry.depth == 0) return true;
  const auto state = StateOf(entry);
  return state == BlockState::kCommitted || state == BlockState::kCopyingOut;
}

bool CacheState::IsRestoring(const CacheEntry& entry) const {
  return StateOf(entry) == BlockState::kRestoring;
}

bool CacheState::IsOnHostOnly(const CacheEntry& entry) const {
  return entry.depth > 0 && !entry.block.has_value();
}

void CacheState::Refresh(CacheEntry* entry) {
  while (entry != nullptr && RefreshOne(entry)) entry = entry->parent;
}

// True when its parent has changed by it.
bool CacheState::RefreshOne(CacheEntry* entry) {
  if (entry->depth == 0) return false;
  const auto state = StateOf(*entry);
  const bool is_committed = state == BlockState::kCommitted;
  const bool is_idle = entry->indexed && entry->pins == 0 && is_committed;
  SetListed(&device_order_, &entry->in_device_order, is_idle && entry->device_children == 0, entry);
  if (host_.num_slots() > 0) {
    const auto slot = entry->host_slot;
    const bool has_unused_copy = entry->indexed && slot.has_value() &&
                                 host_.state(*slot) == HostTier::State::kValid &&
                                 host_.users(*slot) == 0;
    SetListed(&host_order_, &entry->in_host_order,
              has_unused_copy && !state.has_value() && entry->first_child == nullptr, entry);
    SetListed(&idle_order_, &entry->in_idle_order, is_idle, entry);
    SetListed(&write_back_order_, &entry->in_write_back_order,
              is_idle && !slot.has_value() && (entry->was_hit || entry->on_long_chain), entry);
    SetListed(&idle_copies_, &entry->in_idle_copies, is_idle && has_unused_copy, entry);
    SetListed(&pinned_copies_, &entry->in_pinned_copies,
              is_committed && entry->pins > 0 && has_unused_copy, entry);
  }

  const bool busy = entry->pins > 0 || entry->busy_children > 0 ||
                    state == BlockState::kCopyingOut || state == BlockState::kRestoring;
  SetCounted(&num_evictable_, &entry->counted_evictable, is_committed && entry->indexed && !busy);
  SetCounted(&num_committed_pinned_, &entry->counted_pinned, is_committed && entry->pins > 0);
  if (entry->parent == nullptr) {
    entry->busy = busy;
    return false;
  }
  const bool busy_before = entry->busy;
  SetCounted(&entry->parent->busy_children, &entry->busy, busy);
  return busy != busy_before;
}

void CacheState::Pin(CacheEntry* entry) {
  ++entry->pins;
  Refresh(entry);
}

void CacheState::Unpin(CacheEntry* entry, uint32_t count) {
  CHECK(count > 0 && entry->pins >= count, "entry={} pins={} count={}", entry->handle, entry->pins,
        count);
  entry->pins -= count;
  if (entry->pins == 0) entry->last_release = now_;
  Refresh(entry);
  EndIfFlushed(entry);
}

std::optional<PoolBlock> CacheState::TakeBlock(BlockState state) {
  if (pool_.num_in(BlockState::kFree) == 0) {
    if (device_order_.empty()) return std::nullopt;
    EvictFromDevice(*device_order_.begin());
  }
  return pool_.TakeFree(state);
}

void CacheState::CommitBlock(CacheEntry* entry, int32_t block, uint64_t step) {
  pool_.Move(block, BlockState::kLeased, BlockState::kCommitted);
  entry->block_step = step;
  AttachBlock(entry, block);
  MarkLongChain(entry);
  Record(entry->host_slot.has_value() ? CacheEvent::Kind::kTierChanged : CacheEvent::Kind::kStored,
         *entry);
}

void CacheState::MarkLongChain(CacheEntry* entry) {
  if (entry->depth < kLongChainBlocks) return;
  for (CacheEntry* e = entry; e->depth > 0 && !e->on_long_chain; e = e->parent) {
    e->on_long_chain = true;
    Refresh(e);
  }
}

CopyOrder CacheState::StartRestore(CacheEntry* entry, PoolBlock block) {
  const uint64_t copy_id = ++last_copy_id_;
  entry->restore_copy = copy_id;
  host_.AddUser(*entry->host_slot);
  AttachBlock(entry, block.id);
  copies_[copy_id] = {CopyDirection::kToDevice, block.id, *entry->host_slot, entry, false};
  return {copy_id, CopyDirection::kToDevice, block, *entry->host_slot};
}

std::optional<CopyOrder> CacheState::StartWriteBack() {
  const auto going = LastReleaseToGo();
  if (!going.has_value()) return std::nullopt;
  CacheEntry* donor = nullptr;
  if (host_.num_free() == 0) {
    donor = SlotDonor(*going);
    if (donor == nullptr) return std::nullopt;
  }
  CacheEntry* const entry = NextToWriteBack(*going, donor);
  if (entry == nullptr) return std::nullopt;
  if (donor != nullptr) EvictFromHost(donor);
  const uint32_t slot = *host_.Take();
  entry->host_slot = slot;
  entry_of_slot_[slot] = entry;
  SetBlockState(entry, BlockState::kCommitted, BlockState::kCopyingOut);
  const uint64_t copy_id = ++last_copy_id_;
  copies_[copy_id] = {CopyDirection::kToHost, *entry->block, slot, entry, false};
  return CopyOrder{copy_id, CopyDirection::kToHost, pool_.Named(*entry->block), slot};
}

// FREE blocks are taken before any is evicted, and those being copied out will be to be had at no
// cost. Releases count as a whole: of a prompt that goes, block by block from its end, the
// beginning has to have its copies when the end goes, or those of the end are of no use.
std::optional<uint64_t> CacheState::LastReleaseToGo() const {
  const size_t num_ready =
      size_t{pool_.num_in(BlockState::kFree)} + size_t{pool_.num_in(BlockState::kCopyingOut)};
  if (num_ready >= write_back_ahead_blocks_ || idle_order_.empty()) return std::nullopt;
  const size_t num_going = std::min(write_back_ahead_blocks_ - num_ready, idle_order_.size());
  return (*std::next(idle_order_.begin(), static_cast<ptrdiff_t>(num_going) - 1))->last_release;
}

// The copy of an entry that stays on the device costs the least to lose: it can be made again. The
// longer it stays, the later.
CacheEntry* CacheState::SlotDonor(uint64_t last_release_to_go) const {
  if (!pinned_copies_.empty()) return *pinned_copies_.begin();
  if (!idle_copies_.empty()) {
    CacheEntry* const last = *std::prev(idle_copies_.end());
    if (last->last_release > last_release_to_go) return last;
  }
  return host_order_.empty() ? nullptr : *host_order_.begin();
}

// Of one release the last to go, an ancestor of others: a prefix without its end is of use, the end
// alone is not. And while an entry is copied its descendants can be evicted, its ancestors cannot:
// so nobody who needs blocks at once waits for copies.
CacheEntry* CacheState::NextToWriteBack(uint64_t last_release_to_go, CacheEntry* donor) const {
  // What has left the device gives way only to what goes after it: otherwise entries would push
  // each other out of the host tier for ever.
  const bool has_left_device = donor != nullptr && !donor->block.has_value();
  const auto first =
      has_left_device ? write_back_order_.upper_bound(donor) : write_back_order_.begin();
  if (first == write_back_order_.end() || (*first)->last_release > last_release_to_go) {
    return nullptr;
  }
  CacheEntry after_release;
  after_release.last_release = (*first)->last_release;  // its depth, 0, comes after all of them
  return *std::prev(write_back_order_.upper_bound(&after_release));
}

bool CacheState::EndCopy(uint64_t copy_id, uint64_t step) {
  const auto node = copies_.extract(copy_id);
  if (node.empty()) return false;
  Finish(node.mapped(), step);
  return true;
}

void CacheState::Finish(const Copy& copy, uint64_t step) {
  if (copy.direction == CopyDirection::kToHost) {
    const bool is_kept = host_.state(copy.host_slot) == HostTier::State::kFilling;
    if (is_kept) {
      host_.EndFill(copy.host_slot);
      copy.entry->slot_step = std::max(copy.entry->block_step, step);
    } else {
      host_.DropUser(copy.host_slot);
    }
    SetBlockState(copy.entry, BlockState::kCopyingOut, BlockState::kCommitted);
    if (is_kept) Record(CacheEvent::Kind::kTierChanged, *copy.entry);
    EndIfFlushed(copy.entry);
    return;
  }
  host_.DropUser(copy.host_slot);
  if (CacheEntry* const owner = entry_of_slot_[copy.host_slot]; owner != nullptr) Refresh(owner);
  if (copy.cancelled) {
    pool_.Move(copy.block, BlockState::kQuarantined, BlockState::kFree);
    return;
  }
  // A flushed entry has no slot any more, and nobody will match its block.
  copy.entry->block_step = std::max(copy.entry->slot_step, step);
  copy.entry->restored = true;
  CompleteRestores(copy.entry);
}

// Acknowledgements can come in any order, and an entry is only COMMITTED below one that is: so that
// cancelling a restore never takes the parent from under a block that others could use.
void CacheState::CompleteRestores(CacheEntry* entry) {
  std::vector<CacheEntry*> complete = {entry};
  while (!complete.empty()) {
    CacheEntry* const next = complete.back();
    complete.pop_back();
    if (!IsRestoring(*next) || !next->restored) continue;
    if (next->parent != nullptr && !IsReady(*next->parent)) continue;
    next->restored = false;
    next->restore_copy = 0;
    SetBlockState(next, BlockState::kRestoring, BlockState::kCommitted);
    if (next->indexed) Record(CacheEvent::Kind::kTierChanged, *next);
    for (CacheEntry* child = next->first_child; child != nullptr; child = child->next_sibling) {
      complete.push_back(child);
    }
    EndIfFlushed(next);
  }
}

void CacheState::CancelRestore(CacheEntry* entry) {
  const int32_t block = DetachBlock(entry);
  if (entry->restored) {
    pool_.Move(block, BlockState::kRestoring, BlockState::kFree);
  } else {
    pool_.Move(block, BlockState::kRestoring, BlockState::kQuarantined);
    Copy& copy = copies_.at(entry->restore_copy);
    copy.cancelled = true;
    copy.entry = nullptr;
  }
  entry->restored = false;
  entry->restore_copy = 0;
  Refresh(entry);
  EndIfFlushed(entry);
}

void CacheState::CancelWriteBacks() {
  for (auto& [id, copy] : copies_) {
    if (copy.direction != CopyDirection::kToHost || copy.cancelled) continue;
    copy.cancelled = true;
    if (copy.entry->host_slot.has_value()) DiscardSlot(copy.entry);
    Refresh(copy.entry);
  }
}

void CacheState::EndCancelledCopies() {
  for (auto copy = copies_.begin(); copy != copies_.end();) {
    if (!copy->second.cancelled) {
      ++copy;
      continue;
    }
    const Copy cancelled = copy->second;
    copy = copies_.erase(copy);
    Finish(cancelled, kUnknownStep);
  }
}

void CacheState::SetBlockState(CacheEntry* entry, BlockState from, BlockState to) {
  pool_.Move(*entry->block, from, to);
  Refresh(entry);
}

void CacheState::AttachBlock(CacheEntry* entry, int32_t block) {
  entry->block = block;
  entry_of_block_[block] = entry;
  if (entry->parent != nullptr) {
    ++entry->parent->device_children;
    Refresh(entry->parent);
  }
  Refresh(entry);
}

int32_t CacheState::DetachBlock(CacheEntry* entry) {
  const int32_t block = *entry->block;
  entry->block.reset();
  entry_of_block_[block] = nullptr;
  Refresh(entry);
  if (entry->parent != nullptr) {
    --entry->parent->device_children;
    Refresh(entry->parent);
  }
  return block;
}

void CacheState::DiscardSlot(CacheEntry* entry) {
  host_.Discard(*entry->host_slot);
  entry_of_slot_[*entry->host_slot] = nullptr;
  entry->host_slot.reset();
}

void CacheState::EvictFromDevice(CacheEntry* entry) {
  pool_.Move(DetachBlock(entry), BlockState::kCommitted, BlockState::kFree);
  ++num_evicted_device_blocks_;
  if (entry->host_slot.has_value()) {
    Record(CacheEvent::Kind::kTierChanged, *entry);
  } else {
    Remove(entry);
  }
}

void CacheState::EvictFromHost(CacheEntry* entry) {
  DiscardSlot(entry);
  ++num_evicted_host_slots_;
  if (entry->block.has_value()) {
    Refresh(entry);
    Record(CacheEvent::Kind::kTierChanged, *entry);
  } else {
    Remove(entry);
  }
}

// With what is below it: host copies that could not be reached any more.
void CacheState::Remove(CacheEntry* entry) {
  std::vector<CacheEntry*> doomed = {entry};
  const auto descendants = PrefixIndex::Descendants(*entry);
  doomed.insert(doomed.end(), descendants.begin(), descendants.end());
  std::ranges::reverse(doomed);
  for (CacheEntry* e : doomed) {
    CHECK(!e->block.has_value() && e->pins == 0, "entry={} pins={}", e->handle, e->pins);
    if (e->host_slot.has_value()) {
      DiscardSlot(e);
      ++num_evicted_host_slots_;
    }
    Record(CacheEvent::Kind::kRemoved, *e);
    Unindex(e);
    index_.Erase(e);
  }
}

void CacheState::Unindex(CacheEntry* entry) {
  CacheEntry* const parent = entry->parent;
  if (entry->block.has_value()) --parent->device_children;
  if (entry->busy) --parent->busy_children;
  index_.Unindex(entry);
  Refresh(entry);
  Refresh(parent);
  if (parent->depth == 0) index_.EraseRootIfUnused(parent);
}

void CacheState::Flush(CacheEntry* entry) {
  Record(CacheEvent::Kind::kRemoved, *entry);
  Unindex(entry);
  if (entry->host_slot.has_value()) DiscardSlot(entry);
  if (IsRestoring(*entry) && entry->restored) {
    CompleteRestores(entry);
  } else {
    EndIfFlushed(entry);
  }
}

bool CacheState::IsWrittenSince(const CacheEntry& entry, uint64_t first_step) const {
  if (IsRestoring(entry)) return true;
  return (entry.block.has_value() ? entry.block_step : entry.slot_step) >= first_step;
}

void CacheState::DropHostCopyMadeSince(CacheEntry* entry, uint64_t first_step) {
  if (!entry->host_slot.has_value()) return;
  const bool was_valid = host_.state(*entry->host_slot) == HostTier::State::kValid;
  if (was_valid && entry->slot_step < first_step) return;
  CHECK(entry->block.has_value(), "entry={}", entry->handle);
  DiscardSlot(entry);
  Refresh(entry);
  if (was_valid) Record(CacheEvent::Kind::kTierChanged, *entry);
}

void CacheState::EndIfFlushed(CacheEntry* entry) {
  if (entry->indexed || entry->pins > 0) return;
  const auto state = StateOf(*entry);
  if (state == BlockState::kCopyingOut || state == BlockState::kRestoring) return;
  if (state.has_value()) {
    pool_.Move(DetachBlock(entry), BlockState::kCommitted, BlockState::kFree);
  }
  index_.Erase(entry);
}

void CacheState::Record(CacheEvent::Kind kind, const CacheEntry& entry) {
  CacheEvent event;
  event.kind = kind;
  event.entry = entry.handle;
  event.parent = entry.parent->handle;
  if (kind != CacheEvent::Kind::kRemoved) {
    event.on_device = IsReady(entry);
    event.on_host =
        entry.host_slot.has_value() && host_.state(*entry.host_slot) == HostTier::State::kValid;
  }
  if (kind == CacheEvent::Kind::kStored) event.tokens = entry.tokens;
  events_.Add(std::move(event));
}

void CacheState::FillStats(PrefixCacheStats* stats) const {
  using enum BlockState;
  stats->num_free = pool_.num_in(kFree);
  stats->num_leased = pool_.num_in(kLeased);
  stats->num_committed_pinned = num_committed_pinned_;
  stats->num_committed_unpinned = pool_.num_in(kCommitted) - num_committed_pinned_;
  stats->num_restoring = pool_.num_in(kRestoring);
  stats->num_copying_out = pool_.num_in(kCopyingOut);
  stats->num_quarantined = pool_.num_in(kQuarantined);
  stats->num_host_free = host_.num_free();
  stats->num_host_filling = host_.Count(HostTier::State::kFilling);
  stats->num_host_valid = host_.Count(HostTier::State::kValid);
  stats->num_host_quarantined = host_.Count(HostTier::State::kQuarantined);
  stats->num_entries = index_.num_indexed();
  stats->evicted_device_blocks = num_evicted_device_blocks_;
  stats->evicted_host_slots = num_evicted_host_slots_;
  stats->refused_stale = pool_.num_refused_stale();
}

}  // namespace wintserve
