// CacheState::CheckInvariants: what the transitions maintain step by step, recomputed from scratch.
#include <fmt/format.h>

#include <set>
#include <string_view>

#include "absl/container/flat_hash_set.h"
#include "cache_manager/core/cache_state.h"
#include "common/status_macros.h"

namespace wintserve {
namespace {

// `what` is what should hold.
absl::Status Expect(bool holds, const CacheEntry& entry, std::string_view what) {
  if (holds) return absl::OkStatus();
  return absl::InternalError(fmt::format("entry {}: not so: {}", entry.handle, what));
}

}  // namespace

absl::Status CacheState::CheckEntry(const CacheEntry& entry) const {
  using enum BlockState;
  const auto state = StateOf(entry);
  const bool is_committed = state == kCommitted;
  const bool is_ready = is_committed || state == kCopyingOut;
  const auto slot = entry.host_slot;
  RETURN_IF_ERROR(Expect(!state || is_ready || state == kRestoring, entry,
                         "its block is committed, copying out or restoring"));
  RETURN_IF_ERROR(Expect(!state || EntryOf(*entry.block) == &entry, entry, "its block is its own"));
  RETURN_IF_ERROR(Expect(!is_ready || entry.block_step > 0, entry, "a step has written its block"));
  RETURN_IF_ERROR(Expect(!slot || entry_of_slot_[*slot] == &entry, entry, "its slot is its own"));
  RETURN_IF_ERROR(Expect(state || slot, entry, "it has a copy on a tier"));
  RETURN_IF_ERROR(Expect(state || entry.pins == 0, entry, "with pins it has a block"));
  if (slot) {
    const auto slot_state = host_.state(*slot);
    RETURN_IF_ERROR(Expect(slot_state == HostTier::State::kValid ||
                               (slot_state == HostTier::State::kFilling && state == kCopyingOut),
                           entry, "its slot is valid, or its block is being copied there"));
    RETURN_IF_ERROR(Expect(slot_state != HostTier::State::kValid || entry.slot_step > 0, entry,
                           "a step has written its slot"));
  }

  uint32_t device_children = 0;
  uint32_t busy_children = 0;
  for (const CacheEntry* child = entry.first_child; child != nullptr; child = child->next_sibling) {
    RETURN_IF_ERROR(Expect(child->parent == &entry && child->indexed, *child, "it has its parent"));
    RETURN_IF_ERROR(Expect(!child->block || state, *child, "its parent is on the device too"));
    RETURN_IF_ERROR(Expect(!StateOf(*child) || IsRestoring(*child) || is_ready, *child,
                           "its parent is complete, as it is"));
    device_children += child->block.has_value() ? 1 : 0;
    busy_children += child->busy ? 1 : 0;
  }
  RETURN_IF_ERROR(
      Expect(entry.device_children == device_children && entry.busy_children == busy_children,
             entry, "its children are counted"));
  const bool busy =
      entry.pins > 0 || busy_children > 0 || state == kCopyingOut || state == kRestoring;
  RETURN_IF_ERROR(Expect(entry.busy == busy, entry, "busy means pins or copies here or below"));

  RETURN_IF_ERROR(CheckOrders(entry));
  if (entry.indexed) {
    RETURN_IF_ERROR(Expect(index_.FindHash(entry.hash) == &entry, entry, "its hash finds it"));
    RETURN_IF_ERROR(Expect(entry.hash == index_.HashOf(*entry.parent, entry.tokens) &&
                               entry.depth == entry.parent->depth + 1,
                           entry, "its hash and depth follow from its parent's"));
  } else {
    RETURN_IF_ERROR(
        Expect(!entry.parent && !entry.first_child && !slot, entry, "flushed, it stands alone"));
    RETURN_IF_ERROR(Expect(entry.pins > 0 || !is_committed, entry, "flushed, it is still of use"));
  }
  return absl::OkStatus();
}

// Whether the entry is listed where it belongs, and nowhere else.
absl::Status CacheState::CheckOrders(const CacheEntry& entry) const {
  auto* const key = const_cast<CacheEntry*>(&entry);
  const auto check = [&](const auto& order, bool is_marked, bool belongs, std::string_view what) {
    return Expect(is_marked == belongs && belongs == order.contains(key), entry, what);
  };
  const auto state = StateOf(entry);
  const bool is_idle = entry.indexed && entry.pins == 0 && state == BlockState::kCommitted;
  const auto slot = entry.host_slot;
  const bool has_unused_copy = entry.indexed && slot &&
                               host_.state(*slot) == HostTier::State::kValid &&
                               host_.users(*slot) == 0;
  const bool is_worth_a_copy = entry.was_hit || entry.on_long_chain;
  const bool has_tier = host_.num_slots() > 0;
  RETURN_IF_ERROR(check(device_order_, entry.in_device_order, is_idle && entry.device_children == 0,
                        "it is in the device's order of eviction if it can be evicted"));
  RETURN_IF_ERROR(check(host_order_, entry.in_host_order,
                        has_unused_copy && !state && entry.first_child == nullptr,
                        "it is in the host tier's order of eviction if it can be evicted"));
  RETURN_IF_ERROR(check(idle_order_, entry.in_idle_order, has_tier && is_idle,
                        "it is in the order of idle entries if it is one"));
  RETURN_IF_ERROR(check(write_back_order_, entry.in_write_back_order,
                        has_tier && is_idle && !slot && is_worth_a_copy,
                        "it is in the order of write-backs if it is worth one"));
  RETURN_IF_ERROR(check(idle_copies_, entry.in_idle_copies, is_idle && has_unused_copy,
                        "it is among the idle copies if it has one"));
  return check(pinned_copies_, entry.in_pinned_copies,
               state == BlockState::kCommitted && entry.pins > 0 && has_unused_copy,
               "it is among the pinned copies if it has one");
}

absl::Status CacheState::CheckCopies() const {
  std::vector<uint32_t> users(host_.num_slots());
  std::set<int32_t> copied;
  for (const auto& [id, copy] : copies_) {
    ++users[copy.host_slot];
    const BlockState state = pool_.state(copy.block);
    const BlockState expected = copy.direction == CopyDirection::kToHost ? BlockState::kCopyingOut
                                : copy.cancelled                         ? BlockState::kQuarantined
                                                                         : BlockState::kRestoring;
    if (state != expected || !copied.insert(copy.block).second) {
      return absl::InternalError(fmt::format("copy {}: block {} is {}, or in two copies", id,
                                             copy.block, ToString(state)));
    }
    // A cancelled copy is waited for, and nothing comes of it.
    const bool comes_to_something = copy.direction == CopyDirection::kToHost
                                        ? host_.state(copy.host_slot) == HostTier::State::kFilling
                                        : copy.entry != nullptr;
    if (copy.cancelled && comes_to_something) {
      return absl::InternalError(
          fmt::format("copy {} is cancelled, and block {} or host slot {} still wants it", id,
                      copy.block, copy.host_slot));
    }
    if (copy.entry != nullptr && copy.entry->block != copy.block) {
      return absl::InternalError(
          fmt::format("copy {}: block {} is not its entry's", id, copy.block));
    }
  }
  for (uint32_t slot = 0; slot < host_.num_slots(); ++slot) {
    const HostTier::State state = host_.state(slot);
    if (entry_of_slot_[slot] != nullptr &&
        (state == HostTier::State::kFree || state == HostTier::State::kQuarantined)) {
      return absl::InternalError(fmt::format("host slot {} is nobody's, and entry {}'s", slot,
                                             entry_of_slot_[slot]->handle));
    }
    if (host_.users(slot) != users[slot]) {
      return absl::InternalError(fmt::format("host slot {} has {} users, and is in {} copies", slot,
                                             host_.users(slot), users[slot]));
    }
  }
  return absl::OkStatus();
}

// I5: a block that is free, leased or quarantined holds nothing that could be matched. A
// quarantined one is listed nowhere else: only Fence, or the end of the copy into it, frees it.
absl::Status CacheState::CheckBlocksOfNobody() const {
  for (int32_t id = 0; id < static_cast<int32_t>(pool_.num_blocks()); ++id) {
    const BlockState state = pool_.state(id);
    const bool has_owner = state == BlockState::kCommitted || state == BlockState::kCopyingOut ||
                           state == BlockState::kRestoring;
    if (has_owner != (EntryOf(id) != nullptr)) {
      return absl::InternalError(fmt::format("I5: block {} is {}, and {}", id, ToString(state),
                                             has_owner ? "no entry's" : "an entry's"));
    }
  }
  return absl::OkStatus();
}

// I10: evicting never orphans a child. Every indexed entry is reached from a root over entries that
// are indexed too; that each has a copy, and none on the device below one that has left it, is
// CheckEntry's.
absl::Status CacheState::CheckNoOrphans() const {
  absl::flat_hash_set<const CacheEntry*> reached;
  for (const CacheEntry* root : index_.AllRoots()) {
    RETURN_IF_ERROR(Expect(root->first_child != nullptr, *root, "a root has children"));
    for (const CacheEntry* entry : PrefixIndex::Descendants(*root)) {
      RETURN_IF_ERROR(Expect(reached.insert(entry).second, *entry, "it has one place"));
    }
  }
  for (const CacheEntry* entry : index_.AllEntries()) {
    RETURN_IF_ERROR(Expect(entry->indexed == reached.contains(entry), *entry,
                           "I10: it is matchable and no orphan, or neither"));
  }
  return absl::OkStatus();
}

absl::Status CacheState::CheckInvariants() const {
  RETURN_IF_ERROR(pool_.CheckInvariants());
  RETURN_IF_ERROR(host_.CheckInvariants());
  RETURN_IF_ERROR(CheckCopies());
  RETURN_IF_ERROR(CheckBlocksOfNobody());
  uint32_t num_indexed = 0;
  uint32_t num_evictable = 0;
  uint32_t num_pinned = 0;
  uint32_t num_with_block = 0;
  size_t num_listed = 0;
  for (const CacheEntry* entry : index_.AllEntries()) {
    RETURN_IF_ERROR(CheckEntry(*entry));
    const bool is_committed = StateOf(*entry) == BlockState::kCommitted;
    num_indexed += entry->indexed ? 1 : 0;
    num_with_block += entry->block.has_value() ? 1 : 0;
    num_pinned += is_committed && entry->pins > 0 ? 1 : 0;
    num_evictable += is_committed && entry->indexed && !entry->busy ? 1 : 0;
    num_listed += entry->in_device_order + entry->in_host_order + entry->in_idle_order +
                  entry->in_write_back_order + entry->in_idle_copies + entry->in_pinned_copies;
  }
  using enum BlockState;
  const uint32_t num_blocks_of_entries =
      pool_.num_in(kCommitted) + pool_.num_in(kCopyingOut) + pool_.num_in(kRestoring);
  const size_t num_in_orders = device_order_.size() + host_order_.size() + idle_order_.size() +
                               write_back_order_.size() + idle_copies_.size() +
                               pinned_copies_.size();
  if (num_indexed != index_.num_indexed() || num_with_block != num_blocks_of_entries ||
      num_pinned != num_committed_pinned_ || num_evictable != num_evictable_ ||
      num_listed != num_in_orders) {
    return absl::InternalError(fmt::format(
        "counted: {} indexed, {} with a block, {} committed and pinned, {} evictable, {} places in "
        "orders; kept: {}, {}, {}, {}, {}",
        num_indexed, num_with_block, num_pinned, num_evictable, num_listed, index_.num_indexed(),
        num_blocks_of_entries, num_committed_pinned_, num_evictable_, num_in_orders));
  }
  return CheckNoOrphans();
}

}  // namespace wintserve
