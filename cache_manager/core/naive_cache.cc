#include "cache_manager/core/naive_cache.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <set>
#include <tuple>
#include <utility>

namespace wintserve {
namespace {

// Least recently released first, of one release the deeper first.
bool GoesBefore(const NaiveCache::Entry& a, const NaiveCache::Entry& b) {
  return std::tuple(a.released_at, -a.depth, a.handle) <
         std::tuple(b.released_at, -b.depth, b.handle);
}

// REQUIRES: sorted by GoesBefore, not empty.
uint64_t LastOfFirstRelease(const std::vector<NaiveCache::Entry>& entries) {
  uint64_t last = 0;
  for (const NaiveCache::Entry& entry : entries) {
    if (entry.released_at == entries[0].released_at) last = entry.handle;
  }
  return last;
}

// 0 is unknown, and later than any.
uint64_t StepOf(uint64_t step) { return step == 0 ? ~uint64_t{0} : step; }

}  // namespace

const NaiveCache::Entry* NaiveCache::Find(uint64_t handle) const {
  const auto found = std::ranges::find(entries_, handle, &Entry::handle);
  return found == entries_.end() ? nullptr : &*found;
}

NaiveCache::Entry* NaiveCache::Find(uint64_t handle) {
  return const_cast<Entry*>(std::as_const(*this).Find(handle));
}

NaiveCache::Entry* NaiveCache::FindChild(const std::string& salt, uint64_t parent,
                                         std::span<const int32_t> tokens) {
  for (Entry& entry : entries_) {
    if (!entry.flushed && entry.parent == parent && std::ranges::equal(entry.tokens, tokens) &&
        (parent != 0 || entry.salt == salt)) {
      return &entry;
    }
  }
  return nullptr;
}

NaiveCache::Entry* NaiveCache::OwnerOf(int32_t block) {
  for (Entry& entry : entries_) {
    if (entry.block == block) return &entry;
  }
  return nullptr;
}

bool NaiveCache::IsCurrent(const PoolBlock& block) const {
  return block.id >= 0 && block.id < static_cast<int32_t>(blocks_.size()) &&
         blocks_[block.id].generation == block.generation;
}

bool NaiveCache::HasChild(const Entry& entry, bool on_device) const {
  return std::ranges::any_of(entries_, [&](const Entry& child) {
    return !child.flushed && child.parent == entry.handle && (!on_device || child.block);
  });
}

bool NaiveCache::IsSlotInCopy(uint32_t slot) const {
  return std::ranges::count(copies_, slot, &Copy::slot) > 0;
}

bool NaiveCache::IsSlotFree(uint32_t slot) const {
  return !IsSlotInCopy(slot) &&
         std::ranges::count(entries_, std::optional(slot), &Entry::slot) == 0;
}

bool NaiveCache::HasUnusedCopy(const Entry& entry) const {
  return entry.slot && entry.slot_is_valid && !IsSlotInCopy(*entry.slot);
}

std::vector<uint64_t> NaiveCache::Chain(const std::string& salt,
                                        std::span<const int32_t> tokens) const {
  std::vector<uint64_t> chain;
  uint64_t parent = 0;
  for (size_t begin = 0; begin + block_size_ < tokens.size(); begin += block_size_) {
    const Entry* entry =
        const_cast<NaiveCache*>(this)->FindChild(salt, parent, tokens.subspan(begin, block_size_));
    if (entry == nullptr || UseOf(*entry) == Use::kRestoring) break;
    chain.push_back(parent = entry->handle);
  }
  return chain;
}

PeekResult NaiveCache::Peek(const std::string& salt, std::span<const int32_t> tokens) const {
  PeekResult result;
  for (const uint64_t handle : Chain(salt, tokens)) {
    ++(Find(handle)->block ? result.device_blocks : result.host_blocks);
  }
  return result;
}

std::string NaiveCache::Match(const std::string& salt, std::span<const int32_t> tokens,
                              bool allow_restore, const MatchResult& real) {
  if (real.copies.size() != real.restoring.size()) return "not one copy a restored block";
  const auto chain = Chain(salt, tokens);
  size_t num_device = 0;
  for (const uint64_t handle : chain) {
    Entry& entry = *Find(handle);
    if (!entry.block) break;
    if (real.device.size() <= num_device || real.device[num_device].entry != handle ||
        real.device[num_device].block !=
            PoolBlock{*entry.block, blocks_[*entry.block].generation}) {
      return fmt::format("entry {} is not matched, or with another block", handle);
    }
    ++entry.pins;
    entry.hit = true;
    ++num_device;
  }
  if (real.device.size() != num_device) return "too many device blocks are matched";
  size_t num_restored = 0;
  for (size_t i = num_device; allow_restore && i < chain.size(); ++i, ++num_restored) {
    if (std::ranges::count(blocks_, Use::kFree, &Block::use) == 0 && !EvictFromDevice()) break;
    if (num_restored >= real.restoring.size()) return "too few blocks are restored";
    Entry& entry = *Find(chain[i]);
    const PoolBlock block = real.restoring[num_restored].block;
    const CopyOrder& copy = real.copies[num_restored];
    if (real.restoring[num_restored].entry != chain[i]) return "another entry is restored";
    if (!IsCurrent(block) || blocks_[block.id].use != Use::kFree) {
      return fmt::format("block {} is restored into and was not free", block.id);
    }
    if (copy.block != block || copy.host_slot != entry.slot ||
        copy.direction != CopyDirection::kToDevice) {
      return fmt::format("copy {} does not fit its entry", copy.copy_id);
    }
    ++entry.pins;
    entry.hit = true;
    entry.block = block.id;
    blocks_[block.id].use = Use::kRestoring;
    copies_.push_back({copy.copy_id, true, block.id, *entry.slot, false});
  }
  return real.restoring.size() == num_restored ? "" : "too many blocks are restored";
}

std::string NaiveCache::Lease(uint32_t count, const std::vector<PoolBlock>& real) {
  const size_t expected = std::min(count, num_available());
  if (real.size() != expected) return fmt::format("{} leased, not {}", real.size(), expected);
  while (std::ranges::count(blocks_, Use::kFree, &Block::use) < static_cast<int64_t>(real.size())) {
    if (!EvictFromDevice()) return "nothing to evict";
  }
  for (const PoolBlock& block : real) {
    if (!IsCurrent(block) || blocks_[block.id].use != Use::kFree) {
      return fmt::format("block {} is leased and was not free", block.id);
    }
    blocks_[block.id].use = Use::kLeased;
  }
  return "";
}

std::optional<std::vector<CommittedBlock>> NaiveCache::Commit(const CommitRequest& request) {
  const Entry* const start = Find(request.parent);
  const bool has_start = request.parent == 0 || (start != nullptr && !start->flushed);
  std::set<int32_t> distinct;
  uint64_t parent = request.parent;
  bool has_parent = has_start;
  for (const CommitBlock& block : request.blocks) {
    if (!IsCurrent(block.block) || block.tokens.size() != block_size_) return std::nullopt;
    if (!distinct.insert(block.block.id).second) return std::nullopt;
    const Entry* next = has_parent ? FindChild(request.salt, parent, block.tokens) : nullptr;
    if (blocks_[block.block.id].use != Use::kLeased) {
      const Entry* own = OwnerOf(block.block.id);
      if (own == nullptr || !IsReady(*own) || own->tokens != block.tokens) return std::nullopt;
      if (!own->flushed && own != next) return std::nullopt;
      next = own;
    }
    has_parent = next != nullptr && !next->flushed;
    parent = next == nullptr ? 0 : next->handle;
  }

  std::vector<CommittedBlock> result;
  parent = request.parent;
  has_parent = has_start;
  for (const CommitBlock& block : request.blocks) {
    if (Entry* own = OwnerOf(block.block.id); own != nullptr) {
      own->pins = std::max(own->pins, 1u);
      result.push_back({own->handle, false});
      parent = own->handle;
      has_parent = !own->flushed;
      continue;
    }
    Entry* entry = has_parent ? FindChild(request.salt, parent, block.tokens) : nullptr;
    const bool parent_is_ready = has_parent && (parent == 0 || IsReady(*Find(parent)));
    if (!parent_is_ready || (entry != nullptr && UseOf(*entry) == Use::kRestoring)) {
      has_parent = false;
      result.push_back({});
      continue;
    }
    const bool duplicate = entry != nullptr && entry->block;
    if (entry == nullptr) {
      Entry added;
      added.handle = ++last_handle_;
      added.parent = parent;
      added.depth = parent == 0 ? 1 : Find(parent)->depth + 1;
      added.salt = parent == 0 ? request.salt : Find(parent)->salt;
      added.tokens = block.tokens;
      entries_.push_back(added);
      entry = &entries_.back();
    }
    if (!duplicate) {
      entry->block = block.block.id;
      entry->block_step = StepOf(request.step);
      blocks_[block.block.id].use = Use::kCommitted;
    }
    ++entry->pins;
    parent = entry->handle;
    result.push_back({parent, duplicate});
    if (entry->depth >= 4) {
      for (Entry* e = entry; e != nullptr; e = Find(e->parent)) e->on_long_chain = true;
    }
  }
  return result;
}

bool NaiveCache::Release(std::span<const uint64_t> entries) {
  std::map<uint64_t, uint32_t> counts;
  for (const uint64_t handle : entries) ++counts[handle];
  for (const auto& [handle, count] : counts) {
    const Entry* entry = Find(handle);
    if (entry == nullptr || entry->pins < count) return false;
  }
  ++now_;
  for (const auto& [handle, count] : counts) Unpin(handle, count);
  EndFlushed();
  return true;
}

bool NaiveCache::Return(std::span<const PoolBlock> blocks) {
  std::set<int32_t> distinct;
  for (const PoolBlock& block : blocks) {
    if (!IsCurrent(block) || blocks_[block.id].use != Use::kLeased) return false;
    if (!distinct.insert(block.id).second) return false;
  }
  for (const PoolBlock& block : blocks) Free(block.id);
  return true;
}

std::string NaiveCache::TakeCopyOuts(size_t max_copies, const std::vector<CopyOrder>& real) {
  size_t num_taken = 0;
  while (num_taken < max_copies) {
    const WriteBack next = NextWriteBack();
    if (next.entry == 0) break;
    if (num_taken >= real.size()) return "too few write-backs";
    if (next.donor != 0) EvictFromHost(next.donor);
    Entry& entry = *Find(next.entry);
    const CopyOrder& copy = real[num_taken];
    if (copy.block != PoolBlock{*entry.block, blocks_[*entry.block].generation}) {
      return fmt::format("copy {} does not write back entry {}", copy.copy_id, next.entry);
    }
    if (copy.host_slot >= num_slots_ || !IsSlotFree(copy.host_slot)) {
      return fmt::format("copy {} goes to a slot in use", copy.copy_id);
    }
    entry.slot = copy.host_slot;
    blocks_[*entry.block].use = Use::kCopyingOut;
    copies_.push_back({copy.copy_id, false, *entry.block, copy.host_slot, false});
    ++num_taken;
  }
  return real.size() == num_taken ? "" : "too many write-backs";
}

bool NaiveCache::CopyDone(uint64_t copy_id, uint64_t step) {
  const auto found = std::ranges::find(copies_, copy_id, &Copy::id);
  if (found == copies_.end()) return false;
  const Copy copy = *found;
  copies_.erase(found);
  FinishCopy(copy, StepOf(step));
  return true;
}

void NaiveCache::FinishCopy(const Copy& copy, uint64_t step) {
  if (copy.to_device && copy.cancelled) {
    Free(copy.block);
    return;
  }
  Entry& entry = *OwnerOf(copy.block);
  if (copy.to_device) {
    entry.restored = true;
    entry.block_step = std::max(entry.slot_step, step);
    CompleteRestores();
  } else {
    blocks_[copy.block].use = Use::kCommitted;
    entry.slot_is_valid = entry.slot.has_value();
    entry.slot_step = std::max(entry.block_step, step);
  }
  EndFlushed();
}

void NaiveCache::CompleteRestores() {
  for (bool changed = true; changed;) {
    changed = false;
    for (Entry& entry : entries_) {
      if (UseOf(entry) != Use::kRestoring || !entry.restored) continue;
      const Entry* parent = entry.flushed ? nullptr : Find(entry.parent);
      if (parent != nullptr && !IsReady(*parent)) continue;
      blocks_[*entry.block].use = Use::kCommitted;
      entry.restored = false;
      changed = true;
    }
  }
}

bool NaiveCache::Reconcile(std::span<const PinCount> pins, std::span<const PoolBlock> leased) {
  std::map<uint64_t, uint32_t> claims;
  for (const PinCount& pin : pins) {
    if (Find(pin.entry) == nullptr) return false;
    claims[pin.entry] += pin.count;
  }
  std::set<int32_t> kept;
  for (const PoolBlock& block : leased) {
    if (!IsCurrent(block) || !kept.insert(block.id).second) return false;
    const Use use = blocks_[block.id].use;
    if (use == Use::kLeased) continue;
    if (use != Use::kCommitted && use != Use::kCopyingOut) return false;
    ++claims[OwnerOf(block.id)->handle];
  }
  for (const auto& [handle, count] : claims) {
    const Entry& entry = *Find(handle);
    if (count > entry.pins) return false;
    const Entry* parent = entry.flushed ? nullptr : Find(entry.parent);
    if (count > 0 && UseOf(entry) == Use::kRestoring && parent != nullptr &&
        UseOf(*parent) == Use::kRestoring && claims[parent->handle] == 0) {
      return false;
    }
  }
  ++now_;
  std::vector<uint64_t> cancelled;
  for (const Entry& entry : entries_) {
    if (entry.pins > claims[entry.handle]) Unpin(entry.handle, entry.pins - claims[entry.handle]);
    if (UseOf(entry) == Use::kRestoring && claims[entry.handle] == 0) {
      cancelled.push_back(entry.handle);
    }
  }
  for (const uint64_t handle : cancelled) CancelRestore(handle);
  EndFlushed();
  for (int32_t id = 0; id < static_cast<int32_t>(blocks_.size()); ++id) {
    if (blocks_[id].use == Use::kLeased && !kept.contains(id)) Free(id);
  }
  return true;
}

void NaiveCache::EndSession() {
  ++now_;
  std::vector<uint64_t> restoring;
  for (const Entry& entry : entries_) {
    if (entry.pins > 0) Unpin(entry.handle, entry.pins);
    if (UseOf(entry) == Use::kRestoring) restoring.push_back(entry.handle);
  }
  for (const uint64_t handle : restoring) CancelRestore(handle);
  for (Copy& copy : copies_) {
    if (copy.to_device || copy.cancelled) continue;
    copy.cancelled = true;
    OwnerOf(copy.block)->slot.reset();
  }
  EndFlushed();
  for (Block& block : blocks_) {
    if (block.use == Use::kLeased) block.use = Use::kQuarantined;
  }
}

void NaiveCache::CancelRestore(uint64_t handle) {
  Entry& entry = *Find(handle);
  const int32_t block = *entry.block;
  entry.block.reset();
  if (entry.restored) {
    entry.restored = false;
    Free(block);
    return;
  }
  blocks_[block].use = Use::kQuarantined;
  for (Copy& copy : copies_) {
    if (copy.block == block) copy.cancelled = true;
  }
}

void NaiveCache::Fence() {
  const std::vector<Copy> copies = copies_;
  std::erase_if(copies_, [](const Copy& copy) { return copy.cancelled; });
  for (const Copy& copy : copies) {
    if (copy.cancelled) FinishCopy(copy, /*step=*/1);
  }
  for (int32_t id = 0; id < static_cast<int32_t>(blocks_.size()); ++id) {
    if (blocks_[id].use == Use::kQuarantined) Free(id);
  }
}

uint64_t NaiveCache::Flush(const std::optional<std::string>& salt) {
  std::set<uint64_t> flushed;
  for (Entry& entry : entries_) {  // parents come before their children
    if (entry.flushed) continue;
    const bool is_hit =
        entry.parent == 0 ? !salt || entry.salt == *salt : flushed.contains(entry.parent);
    if (is_hit) flushed.insert(entry.handle);
  }
  FlushEntries(flushed);
  return flushed.size();
}

void NaiveCache::FlushEntries(const std::set<uint64_t>& handles) {
  for (Entry& entry : entries_) {
    if (!handles.contains(entry.handle)) continue;
    entry.flushed = true;
    entry.slot.reset();
    entry.slot_is_valid = false;
  }
  CompleteRestores();
  EndFlushed();
}

uint64_t NaiveCache::DistrustSteps(uint64_t first_step) {
  std::set<uint64_t> flushed;
  for (Entry& entry : entries_) {  // parents come before their children
    if (entry.flushed) continue;
    const uint64_t step = UseOf(entry) == Use::kRestoring ? ~uint64_t{0}
                          : entry.block                   ? entry.block_step
                                                          : entry.slot_step;
    if (step >= first_step || flushed.contains(entry.parent)) {
      flushed.insert(entry.handle);
    } else if (entry.slot && (!entry.slot_is_valid || entry.slot_step >= first_step)) {
      entry.slot.reset();
      entry.slot_is_valid = false;
    }
  }
  FlushEntries(flushed);
  return flushed.size();
}

void NaiveCache::EndFlushed() {
  std::erase_if(entries_, [this](const Entry& entry) {
    if (!entry.flushed || entry.pins > 0) return false;
    if (UseOf(entry) == Use::kCopyingOut || UseOf(entry) == Use::kRestoring) return false;
    if (entry.block) Free(*entry.block);
    return true;
  });
}

void NaiveCache::Unpin(uint64_t handle, uint32_t count) {
  Entry& entry = *Find(handle);
  entry.pins -= count;
  if (entry.pins > 0) return;
  entry.released_at = now_;
}

void NaiveCache::Free(int32_t block) {
  blocks_[block].use = Use::kFree;
  ++blocks_[block].generation;
}

uint64_t NaiveCache::NextToEvict(bool from_device) const {
  const Entry* next = nullptr;
  for (const Entry& entry : entries_) {
    if (entry.flushed || entry.pins > 0 || HasChild(entry, from_device)) continue;
    if (from_device ? UseOf(entry) != Use::kCommitted : entry.block || !HasUnusedCopy(entry)) {
      continue;
    }
    if (next == nullptr || GoesBefore(entry, *next)) next = &entry;
  }
  return next == nullptr ? 0 : next->handle;
}

std::vector<NaiveCache::Entry> NaiveCache::IdleEntries() const {
  std::vector<Entry> idle;
  for (const Entry& entry : entries_) {
    if (!entry.flushed && entry.pins == 0 && UseOf(entry) == Use::kCommitted) idle.push_back(entry);
  }
  std::ranges::sort(idle, GoesBefore);
  return idle;
}

// Each block that is FREE, or will soon be had at no cost, postpones an eviction.
size_t NaiveCache::NumAboutToGo(const std::vector<Entry>& idle) const {
  size_t num_ready = 0;
  for (const Block& block : blocks_) {
    num_ready += block.use == Use::kFree || block.use == Use::kCopyingOut;
  }
  size_t num_going = 0;
  for (const Entry& entry : idle) {
    const bool is_of_a_release_that_goes =
        num_going > 0 && idle[num_going - 1].released_at == entry.released_at;
    if (num_ready + num_going >= write_back_ahead_ && !is_of_a_release_that_goes) break;
    ++num_going;
  }
  return num_going;
}

NaiveCache::WriteBack NaiveCache::NextWriteBack() const {
  const std::vector<Entry> idle = IdleEntries();
  const size_t num_going = NumAboutToGo(idle);
  std::vector<Entry> due;
  for (size_t i = 0; i < num_going; ++i) {
    if (!idle[i].slot && (idle[i].hit || idle[i].on_long_chain)) due.push_back(idle[i]);
  }
  if (due.empty()) return {};
  for (uint32_t slot = 0; slot < num_slots_; ++slot) {
    if (IsSlotFree(slot)) return {LastOfFirstRelease(due), 0};
  }
  uint64_t pinned = 0;
  for (const Entry& entry : entries_) {
    if (entry.pins == 0 || UseOf(entry) != Use::kCommitted || !HasUnusedCopy(entry)) continue;
    if (pinned == 0 || entry.handle < pinned) pinned = entry.handle;
  }
  if (pinned != 0) return {LastOfFirstRelease(due), pinned};
  for (size_t i = idle.size(); i-- > num_going;) {
    if (HasUnusedCopy(idle[i])) return {LastOfFirstRelease(due), idle[i].handle};
  }
  const uint64_t on_host = NextToEvict(/*from_device=*/false);
  if (on_host == 0) return {};
  std::erase_if(due, [&](const Entry& entry) { return GoesBefore(entry, *Find(on_host)); });
  if (due.empty()) return {};
  return {LastOfFirstRelease(due), on_host};
}

bool NaiveCache::EvictFromDevice() {
  Entry* entry = Find(NextToEvict(/*from_device=*/true));
  if (entry == nullptr) return false;
  Free(*entry->block);
  entry->block.reset();
  if (!entry->slot) RemoveWithDescendants(entry->handle);
  return true;
}

void NaiveCache::EvictFromHost(uint64_t handle) {
  Entry& entry = *Find(handle);
  entry.slot.reset();
  entry.slot_is_valid = false;
  if (!entry.block) RemoveWithDescendants(handle);
}

void NaiveCache::RemoveWithDescendants(uint64_t handle) {
  std::set<uint64_t> removed = {handle};
  for (const Entry& entry : entries_) {
    if (!entry.flushed && removed.contains(entry.parent)) removed.insert(entry.handle);
  }
  std::erase_if(entries_, [&](const Entry& entry) { return removed.contains(entry.handle); });
}

uint32_t NaiveCache::num_available() const {
  NaiveCache copy = *this;
  while (copy.EvictFromDevice()) {
  }
  return static_cast<uint32_t>(std::ranges::count(copy.blocks_, Use::kFree, &Block::use));
}

std::string NaiveCache::CompareCounts(const PrefixCacheStats& real) const {
  const auto count = [this](Use use) {
    return static_cast<uint32_t>(std::ranges::count(blocks_, use, &Block::use));
  };
  PrefixCacheStats naive;
  naive.num_free = count(Use::kFree);
  naive.num_leased = count(Use::kLeased);
  naive.num_restoring = count(Use::kRestoring);
  naive.num_copying_out = count(Use::kCopyingOut);
  naive.num_quarantined = count(Use::kQuarantined);
  for (const Entry& entry : entries_) {
    naive.num_entries += entry.flushed ? 0 : 1;
    if (UseOf(entry) != Use::kCommitted) continue;
    ++(entry.pins > 0 ? naive.num_committed_pinned : naive.num_committed_unpinned);
  }
  for (uint32_t slot = 0; slot < num_slots_; ++slot) {
    const auto owner = std::ranges::find(entries_, std::optional(slot), &Entry::slot);
    ++(IsSlotFree(slot)          ? naive.num_host_free
       : owner == entries_.end() ? naive.num_host_quarantined
       : owner->slot_is_valid    ? naive.num_host_valid
                                 : naive.num_host_filling);
  }
  const auto listed = [](const PrefixCacheStats& s) {
    return fmt::format(
        "free {}, leased {}, pinned {}, unpinned {}, restoring {}, copying out {}, quarantined {}; "
        "host free {}, filling {}, valid {}, quarantined {}; entries {}",
        s.num_free, s.num_leased, s.num_committed_pinned, s.num_committed_unpinned, s.num_restoring,
        s.num_copying_out, s.num_quarantined, s.num_host_free, s.num_host_filling, s.num_host_valid,
        s.num_host_quarantined, s.num_entries);
  };
  if (listed(naive) == listed(real)) return "";
  return fmt::format("counts: naive: {}; real: {}", listed(naive), listed(real));
}

}  // namespace wintserve
