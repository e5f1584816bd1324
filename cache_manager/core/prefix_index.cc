#include "cache_manager/core/prefix_index.h"

#include <algorithm>
#include <utility>

#include "common/check.h"

namespace wintserve {
namespace {

bool IsChild(const CacheEntry& entry, const CacheEntry& parent, std::span<const int32_t> tokens) {
  return entry.parent == &parent && std::ranges::equal(entry.tokens, tokens);
}

}  // namespace

CacheEntry* PrefixIndex::FindRoot(const RootDigest& digest) const {
  const auto found = roots_.find(digest);
  return found == roots_.end() ? nullptr : found->second.get();
}

CacheEntry* PrefixIndex::FindOrAddRoot(const RootDigest& digest) {
  std::unique_ptr<CacheEntry>& root = roots_[digest];
  if (root == nullptr) {
    root = std::make_unique<CacheEntry>();
    root->root_digest = digest;
    root->hash = HashOfRoot(digest);
  }
  return root.get();
}

CacheEntry* PrefixIndex::FindHandle(uint64_t handle) const {
  const auto found = by_handle_.find(handle);
  return found == by_handle_.end() ? nullptr : found->second.get();
}

CacheEntry* PrefixIndex::FindHash(const Hash128& hash) const {
  const auto found = by_hash_.find(hash);
  return found == by_hash_.end() ? nullptr : found->second;
}

CacheEntry* PrefixIndex::FindChild(const CacheEntry& parent,
                                   std::span<const int32_t> tokens) const {
  CacheEntry* const found = FindHash(HashOf(parent, tokens));
  return found != nullptr && IsChild(*found, parent, tokens) ? found : nullptr;
}

std::pair<CacheEntry*, bool> PrefixIndex::FindOrAddChild(CacheEntry* parent,
                                                         std::span<const int32_t> tokens) {
  const Hash128 hash = HashOf(*parent, tokens);
  const auto [found, is_new] = by_hash_.try_emplace(hash, nullptr);
  if (!is_new) {
    if (!IsChild(*found->second, *parent, tokens)) return {nullptr, false};
    return {found->second, false};
  }
  auto entry = std::make_unique<CacheEntry>();
  entry->handle = ++last_handle_;
  entry->parent = parent;
  entry->depth = parent->depth + 1;
  entry->hash = hash;
  entry->tokens.assign(tokens.begin(), tokens.end());
  entry->indexed = true;
  entry->next_sibling = parent->first_child;
  if (parent->first_child != nullptr) parent->first_child->previous_sibling = entry.get();
  parent->first_child = entry.get();
  found->second = entry.get();
  CacheEntry* const added = entry.get();
  by_handle_.emplace(added->handle, std::move(entry));
  return {added, true};
}

void PrefixIndex::Unindex(CacheEntry* entry) {
  CHECK(entry->indexed && entry->first_child == nullptr, "entry={}", entry->handle);
  by_hash_.erase(entry->hash);
  if (entry->next_sibling != nullptr) {
    entry->next_sibling->previous_sibling = entry->previous_sibling;
  }
  if (entry->previous_sibling != nullptr) {
    entry->previous_sibling->next_sibling = entry->next_sibling;
  } else {
    entry->parent->first_child = entry->next_sibling;
  }
  entry->parent = entry->next_sibling = entry->previous_sibling = nullptr;
  entry->indexed = false;
}

void PrefixIndex::Erase(CacheEntry* entry) {
  CHECK(!entry->indexed, "entry={}", entry->handle);
  by_handle_.erase(entry->handle);
}

void PrefixIndex::EraseRootIfUnused(CacheEntry* root) {
  if (root->first_child == nullptr) roots_.erase(RootDigest(root->root_digest));
}

std::vector<CacheEntry*> PrefixIndex::AllEntries() const {
  std::vector<CacheEntry*> entries;
  entries.reserve(by_handle_.size());
  for (const auto& [handle, entry] : by_handle_) entries.push_back(entry.get());
  // By handle: what follows from the order must not depend on a hash table.
  std::ranges::sort(entries, {}, &CacheEntry::handle);
  return entries;
}

std::vector<CacheEntry*> PrefixIndex::AllRoots() const {
  std::vector<CacheEntry*> roots;
  for (const auto& [digest, root] : roots_) roots.push_back(root.get());
  std::ranges::sort(roots, {}, &CacheEntry::root_digest);
  return roots;
}

std::vector<CacheEntry*> PrefixIndex::Descendants(const CacheEntry& root) {
  std::vector<CacheEntry*> entries;
  const auto add_children = [&entries](const CacheEntry& parent) {
    for (CacheEntry* child = parent.first_child; child != nullptr; child = child->next_sibling) {
      entries.push_back(child);
    }
  };
  add_children(root);
  for (size_t i = 0; i < entries.size(); ++i) add_children(*entries[i]);
  return entries;
}

}  // namespace wintserve
