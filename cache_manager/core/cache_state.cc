#include "cache_manager/core/cache_state.h"

#include <ranges>
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

bool CacheState::WrittenBackBefore::operator()(const CacheEntry* a, const CacheEntry* b) const {
  return std::tie(a->last_release, a->depth, a->handle) <
         std::tie(b->last_release, b->depth, b->handle);
}

CacheState::CacheState(uint32_t num_blocks, uint32_t num_host_slots, size_t max_pending_events,
                       ChainHash chain_hash)
    : pool_(num_blocks),
      host_(num_host_slots),
      index_(chain_hash),
      events_(max_pending_events),
      entry_of_block_(num_blocks),
      entry_of_slot_(num_host_slots) {}

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
  const bool is_idle = entry->indexed && entry->pins == 0;
  const bool has_valid_slot =
      entry->host_slot.has_value() && host_.state(*entry->host_slot) == HostTier::State::kValid;
  SetListed(&device_order_, &entry->in_device_order,
            is_idle && is_committed && entry->device_children == 0, entry);
  SetListed(&host_order_, &entry->in_host_order,
            is_idle && has_valid_slot && host_.users(*entry->host_slot) == 0 &&
                state != BlockState::kRestoring && entry->first_child == nullptr,
            entry);
  SetListed(&write_back_order_, &entry->in_write_back_order,
            is_idle && is_committed && entry->write_back_wanted && !entry->host_slot.has_value(),
            entry);

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
  if (entry->pins == 0) {
    entry->last_release = now_;
    entry->write_back_wanted = host_.num_slots() > 0 && !entry->host_slot.has_value() &&
                               (entry->was_hit || entry->on_long_chain);
  }
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

void CacheState::CommitBlock(CacheEntry* entry, int32_t block) {
  pool_.Move(block, BlockState::kLeased, BlockState::kCommitted);
  AttachBlock(entry, block);
  MarkLongChain(entry);
  Record(entry->host_slot.has_value() ? CacheEvent::Kind::kTierChanged : CacheEvent::Kind::kStored,
         *entry);
}

void CacheState::MarkLongChain(CacheEntry* entry) {
  if (entry->depth < kLongChainBlocks) return;
  for (CacheEntry* e = entry; e->depth > 0 && !e->on_long_chain; e = e->parent) {
    e->on_long_chain = true;
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
  while (!write_back_order_.empty()) {
    CacheEntry* const entry = *write_back_order_.begin();
    if (host_.num_free() == 0 && host_order_.empty()) return std::nullopt;
    const auto slot = TakeSlotFor(*entry);
    entry->write_back_wanted = false;
    if (!slot.has_value()) {
      Refresh(entry);
      continue;
    }
    entry->host_slot = *slot;
    entry_of_slot_[*slot] = entry;
    SetBlockState(entry, BlockState::kCommitted, BlockState::kCopyingOut);
    const uint64_t copy_id = ++last_copy_id_;
    copies_[copy_id] = {CopyDirection::kToHost, *entry->block, *slot, entry, false};
    return CopyOrder{copy_id, CopyDirection::kToHost, pool_.Named(*entry->block), *slot};
  }
  return std::nullopt;
}

// A slot is only taken from an entry that would be evicted before this one: otherwise two entries
// would push each other out of the host tier for ever.
std::optional<uint32_t> CacheState::TakeSlotFor(const CacheEntry& entry) {
  if (host_.num_free() == 0) {
    CacheEntry* const victim = *host_order_.begin();
    if (!EvictedBefore()(victim, &entry)) return std::nullopt;
    EvictFromHost(victim);
  }
  return host_.Take();
}

bool CacheState::EndCopy(uint64_t copy_id) {
  const auto node = copies_.extract(copy_id);
  if (node.empty()) return false;
  Finish(node.mapped());
  return true;
}

void CacheState::Finish(const Copy& copy) {
  if (copy.direction == CopyDirection::kToHost) {
    const bool is_kept = host_.state(copy.host_slot) == HostTier::State::kFilling;
    if (is_kept) {
      host_.EndFill(copy.host_slot);
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
    Finish(cancelled);
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
  for (CacheEntry* e : doomed | std::views::reverse) {
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
