// The entries of the prefix cache as a forest: one root per salt, one entry per cached block.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "cache_manager/core/chain_hash.h"

namespace wintserve {

// The content of one block in its context. A root has depth 0, no tokens and no copies.
struct CacheEntry {
  // Identity and place in the forest; kept by PrefixIndex.
  uint64_t handle = 0;           // 0: a root
  CacheEntry* parent = nullptr;  // of an indexed entry never null, but for a root
  CacheEntry* first_child = nullptr;
  CacheEntry* next_sibling = nullptr;
  CacheEntry* previous_sibling = nullptr;
  uint32_t depth = 0;
  bool indexed = false;
  Hash128 hash;
  std::vector<int32_t> tokens;
  RootDigest root_digest{};  // of a root

  // Copies and use; kept by CacheState.
  std::optional<int32_t> block;
  std::optional<uint32_t> host_slot;
  uint64_t block_step = 0;  // the newest step that wrote the block; nothing while RESTORING
  uint64_t slot_step = 0;   // the same of the host slot; nothing while it is FILLING
  uint32_t pins = 0;
  uint64_t last_release = 0;
  uint64_t restore_copy = 0;  // while RESTORING: the copy that writes its block
  bool restored = false;      // while RESTORING: that copy is done, an ancestor's is not
  bool was_hit = false;
  bool on_long_chain = false;
  uint32_t device_children = 0;  // with a block
  uint32_t busy_children = 0;
  // What CacheState has counted it as.
  bool busy = false;  // it or a descendant is pinned or being copied
  bool counted_evictable = false;
  bool counted_pinned = false;
  bool in_device_order = false;
  bool in_host_order = false;
  bool in_idle_order = false;
  bool in_write_back_order = false;
  bool in_idle_copies = false;
  bool in_pinned_copies = false;
};

// Owns all entries. An entry is found by hash and then compared exactly: parent and tokens. Two
// entries of one hash are never indexed together, so a collision costs a miss.
//
// Threading: thread-compatible. Pointers stay valid until Erase of their entry; a root goes with
//            its last child.
class PrefixIndex {
 public:
  explicit PrefixIndex(ChainHash chain_hash) : chain_hash_(chain_hash) {}

  CacheEntry* FindRoot(const RootDigest& digest) const;
  CacheEntry* FindOrAddRoot(const RootDigest& digest);
  // Of any entry, indexed or not; nullptr: none.
  CacheEntry* FindHandle(uint64_t handle) const;
  CacheEntry* FindChild(const CacheEntry& parent, std::span<const int32_t> tokens) const;

  // The child of `parent` (indexed, or a root) with these tokens, and whether it is new; {nullptr,
  // false} when another entry has its hash.
  std::pair<CacheEntry*, bool> FindOrAddChild(CacheEntry* parent, std::span<const int32_t> tokens);

  // Takes the entry out of the index and out of the forest; its handle goes on naming it.
  // REQUIRES: indexed, no children.
  void Unindex(CacheEntry* entry);
  // Ends the entry and its handle. REQUIRES: not indexed.
  void Erase(CacheEntry* entry);
  // A root that has never got a child, or has lost its last one.
  void EraseRootIfUnused(CacheEntry* root);

  uint64_t num_indexed() const { return by_hash_.size(); }
  std::vector<CacheEntry*> AllEntries() const;
  std::vector<CacheEntry*> AllRoots() const;
  // Parents before their children, without the root.
  static std::vector<CacheEntry*> Descendants(const CacheEntry& root);

  Hash128 HashOf(const CacheEntry& parent, std::span<const int32_t> tokens) const {
    return chain_hash_(parent.hash, tokens);
  }
  CacheEntry* FindHash(const Hash128& hash) const;

 private:
  const ChainHash chain_hash_;
  uint64_t last_handle_ = 0;
  absl::flat_hash_map<uint64_t, std::unique_ptr<CacheEntry>> by_handle_;
  absl::flat_hash_map<Hash128, CacheEntry*> by_hash_;
  absl::flat_hash_map<RootDigest, std::unique_ptr<CacheEntry>> roots_;
};

}  // namespace wintserve
