#include <algorithm>

#include "api_server/scheduler/scheduler_test_util.h"

namespace wintserve {

FakeCache::FakeCache(int num_blocks, int num_host_slots, int block_size)
    : block_size_(block_size), blocks_(num_blocks), host_used_(num_host_slots) {}

uint64_t FakeCache::Find(uint64_t parent, const std::string& salt,
                         const std::vector<int32_t>& tokens) const {
  for (const auto& [id, entry] : entries_) {
    if (entry.indexed && entry.parent == parent && entry.salt == salt && entry.tokens == tokens) {
      return id;
    }
  }
  return 0;
}

std::vector<uint64_t> FakeCache::Chain(const std::string& salt,
                                       const std::vector<int32_t>& tokens) const {
  std::vector<uint64_t> chain;
  uint64_t parent = 0;
  for (size_t end = block_size_; end < tokens.size(); end += block_size_) {
    parent = Find(parent, salt, {tokens.begin() + (end - block_size_), tokens.begin() + end});
    if (parent == 0) break;
    chain.push_back(parent);
  }
  return chain;
}

PeekResult FakeCache::Peek(const std::string& salt, const std::vector<int32_t>& tokens) const {
  PeekResult result;
  for (const uint64_t id : Chain(salt, tokens)) {
    ++(entries_.at(id).block >= 0 ? result.device_blocks : result.host_blocks);
  }
  return result;
}

MatchResult FakeCache::Match(const std::string& salt, const std::vector<int32_t>& tokens,
                             bool restore) {
  MatchResult result;
  for (const uint64_t id : Chain(salt, tokens)) {
    Entry& entry = entries_.at(id);
    if (entry.block >= 0) {
      if (blocks_[entry.block].state == State::kRestoring) break;
      if (!result.restoring.empty()) break;
      ++entry.pins;
      entry.hit = true;
      result.device.push_back({id, Name(entry.block)});
      continue;
    }
    if (!restore) break;
    ++entry.pins;  // so that it is not evicted for its own block
    const std::optional<int> block = TakeFree();
    if (!block.has_value()) {
      --entry.pins;
      break;
    }
    entry.block = *block;
    blocks_[*block].state = State::kRestoring;
    blocks_[*block].entry = id;
    const CopyOrder order{.copy_id = ++last_copy_,
                          .direction = CopyDirection::kToDevice,
                          .block = Name(*block),
                          .host_slot = static_cast<uint32_t>(entry.host_slot)};
    copies_[order.copy_id] = order;
    result.restoring.push_back({id, Name(*block)});
    result.copies.push_back(order);
  }
  return result;
}

std::optional<uint64_t> FakeCache::Evictable() const {
  std::optional<uint64_t> oldest;
  for (const auto& [id, entry] : entries_) {
    if (entry.pins > 0 || entry.block < 0 || blocks_[entry.block].state != State::kCommitted) {
      continue;
    }
    const uint64_t parent = id;
    const bool has_child =
        std::any_of(entries_.begin(), entries_.end(), [parent](const auto& other) {
          return other.second.parent == parent && other.second.block >= 0;
        });
    if (has_child) continue;
    if (!oldest.has_value() || entry.released_at < entries_.at(*oldest).released_at) oldest = id;
  }
  return oldest;
}

std::optional<int> FakeCache::TakeFree() {
  for (;;) {
    for (size_t i = 0; i < blocks_.size(); ++i) {
      if (blocks_[i].state == State::kFree) return static_cast<int>(i);
    }
    const std::optional<uint64_t> victim = Evictable();
    if (!victim.has_value()) return std::nullopt;
    Entry& entry = entries_.at(*victim);
    Free(entry.block);
    entry.block = -1;
    DropIfUseless(*victim);
  }
}

void FakeCache::Free(int block) {
  blocks_[block] = {.state = State::kFree, .generation = blocks_[block].generation + 1, .entry = 0};
}

void FakeCache::DropIfUseless(uint64_t id) {
  const auto found = entries_.find(id);
  if (found == entries_.end() || found->second.pins > 0) return;
  Entry& entry = found->second;
  if (!entry.indexed) {
    if (entry.block >= 0 && blocks_[entry.block].state == State::kCommitted) Free(entry.block);
    if (entry.block >= 0 && blocks_[entry.block].state != State::kFree) return;
    if (entry.host_slot >= 0) host_used_[entry.host_slot] = false;
    entries_.erase(found);
    return;
  }
  if (entry.block >= 0 || entry.host_slot >= 0) return;
  entries_.erase(found);
  // What hung below it on the host can be reached no more.
  std::vector<uint64_t> orphans;
  for (auto& [other_id, other] : entries_) {
    if (other.parent == id) {
      other.indexed = false;
      orphans.push_back(other_id);
    }
  }
  for (const uint64_t orphan : orphans) DropIfUseless(orphan);
}

std::vector<PoolBlock> FakeCache::Lease(uint32_t count) {
  EXPECT_GT(count, 0u);
  EXPECT_LE(count, blocks_.size());
  std::vector<PoolBlock> leased;
  while (leased.size() < count) {
    const std::optional<int> block = TakeFree();
    if (!block.has_value()) break;
    blocks_[*block].state = State::kLeased;
    leased.push_back(Name(*block));
  }
  return leased;
}

std::vector<CommittedBlock> FakeCache::Commit(const CommitRequest& request) {
  std::vector<CommittedBlock> results;
  uint64_t parent = request.parent;
  bool refused = parent != 0 && (!entries_.contains(parent) || !entries_.at(parent).indexed);
  for (const CommitBlock& commit : request.blocks) {
    Block& block = blocks_.at(commit.block.id);
    EXPECT_EQ(block.generation, commit.block.generation) << "commit of a stale block";
    EXPECT_EQ(block.state, State::kLeased) << "commit of block " << commit.block.id;
    EXPECT_EQ(commit.tokens.size(), block_size_);
    if (refused) {
      results.push_back({});
      continue;
    }
    if (const uint64_t found = Find(parent, request.salt, commit.tokens)) {
      Entry& entry = entries_.at(found);
      // One that the host alone has is as good as none.
      if (entry.block >= 0) {
        ++entry.pins;
        results.push_back({.entry = found, .duplicate = true});
        parent = found;
        continue;
      }
      entry.block = commit.block.id;
      entry.step = std::max(entry.step, request.step);
      ++entry.pins;
      block.state = State::kCommitted;
      block.entry = found;
      results.push_back({.entry = found, .duplicate = false});
      parent = found;
      continue;
    }
    const uint64_t id = ++last_entry_;
    entries_[id] = {.parent = parent, .salt = request.salt, .tokens = commit.tokens};
    entries_[id].block = commit.block.id;
    entries_[id].pins = 1;
    entries_[id].step = request.step;
    block.state = State::kCommitted;
    block.entry = id;
    results.push_back({.entry = id, .duplicate = false});
    parent = id;
  }
  return results;
}

void FakeCache::Release(const std::vector<uint64_t>& entries) {
  for (const uint64_t id : entries) {
    ASSERT_TRUE(entries_.contains(id)) << "release of entry " << id;
    Entry& entry = entries_.at(id);
    ASSERT_GT(entry.pins, 0u) << "release of entry " << id << " without pins";
    entry.released_at = ++clock_;
    if (--entry.pins > 0) continue;
    if (entry.block >= 0) {
      ASSERT_NE(blocks_[entry.block].state, State::kRestoring) << "released before its CopyDone";
    }
    DropIfUseless(id);
  }
}

void FakeCache::Return(const std::vector<PoolBlock>& blocks) {
  for (const PoolBlock& block : blocks) {
    ASSERT_EQ(blocks_.at(block.id).state, State::kLeased) << "return of block " << block.id;
    ASSERT_EQ(blocks_.at(block.id).generation, block.generation) << "stale block " << block.id;
    Free(block.id);
  }
}

std::vector<CopyOrder> FakeCache::TakeCopyOuts() {
  std::vector<CopyOrder> orders;
  for (auto& [id, entry] : entries_) {
    if (!entry.hit || entry.pins > 0 || entry.block < 0 || entry.host_slot >= 0 || !entry.indexed ||
        blocks_[entry.block].state != State::kCommitted) {
      continue;
    }
    const auto slot = std::find(host_used_.begin(), host_used_.end(), false);
    if (slot == host_used_.end()) break;
    *slot = true;
    blocks_[entry.block].state = State::kCopyingOut;
    const CopyOrder order{.copy_id = ++last_copy_,
                          .direction = CopyDirection::kToHost,
                          .block = Name(entry.block),
                          .host_slot = static_cast<uint32_t>(slot - host_used_.begin())};
    copies_[order.copy_id] = order;
    orders.push_back(order);
  }
  return orders;
}

void FakeCache::CopyDone(uint64_t copy_id, uint64_t step) {
  ASSERT_TRUE(copies_.contains(copy_id)) << "copy " << copy_id << " is not under way";
  const CopyOrder order = copies_.extract(copy_id).mapped();
  Block& block = blocks_[order.block.id];
  ASSERT_EQ(block.generation, order.block.generation);
  const uint64_t id = block.entry;
  if (order.direction == CopyDirection::kToHost) {
    ASSERT_EQ(block.state, State::kCopyingOut);
    entries_.at(id).host_slot = static_cast<int>(order.host_slot);
  } else {
    ASSERT_EQ(block.state, State::kRestoring);
  }
  block.state = State::kCommitted;
  entries_.at(id).step = std::max(entries_.at(id).step, step);
  DropIfUseless(id);
}

void FakeCache::Reconcile(const HeldBlocks& held) {
  std::map<uint64_t, uint32_t> pins;
  for (const PinCount& pin : held.pins) {
    ASSERT_TRUE(entries_.contains(pin.entry)) << "claims entry " << pin.entry;
    ASSERT_LE(pin.count, entries_.at(pin.entry).pins) << "claims entry " << pin.entry;
    pins[pin.entry] = pin.count;
  }
  std::set<int> leased;
  for (const PoolBlock& block : held.leased) {
    ASSERT_EQ(blocks_.at(block.id).state, State::kLeased) << "claims block " << block.id;
    ASSERT_EQ(blocks_.at(block.id).generation, block.generation) << "claims block " << block.id;
    ASSERT_TRUE(leased.insert(block.id).second) << "claims block " << block.id << " twice";
  }
  for (const auto& [copy_id, order] : copies_) {
    Block& block = blocks_[order.block.id];
    if (order.direction == CopyDirection::kToHost) {
      host_used_[order.host_slot] = false;
      block.state = State::kCommitted;  // it was only read
      continue;
    }
    ASSERT_FALSE(pins.contains(block.entry)) << "claims a block whose restore may not have run";
    entries_.at(block.entry).block = -1;
    block.state = State::kQuarantined;
  }
  copies_.clear();
  for (auto& [id, entry] : entries_) entry.pins = pins.contains(id) ? pins[id] : 0;
  for (size_t i = 0; i < blocks_.size(); ++i) {
    if (blocks_[i].state == State::kLeased && !leased.contains(static_cast<int>(i))) {
      blocks_[i].state = State::kQuarantined;
    }
  }
  std::vector<uint64_t> ids;
  for (const auto& [id, entry] : entries_) ids.push_back(id);
  for (const uint64_t id : ids) DropIfUseless(id);
}

void FakeCache::Fence() {
  for (size_t i = 0; i < blocks_.size(); ++i) {
    if (blocks_[i].state == State::kQuarantined) Free(static_cast<int>(i));
  }
}

void FakeCache::Unindex(const std::vector<uint64_t>& entries) {
  for (const uint64_t id : entries) entries_.at(id).indexed = false;
  for (const uint64_t id : entries) DropIfUseless(id);
}

void FakeCache::Flush() {
  std::vector<uint64_t> ids;
  for (const auto& [id, entry] : entries_) ids.push_back(id);
  Unindex(ids);
}

void FakeCache::DistrustSteps(uint64_t first_step) {
  std::vector<uint64_t> bad;  // parents come before their children
  for (const auto& [id, entry] : entries_) {
    const bool is_copied = entry.block >= 0 && (blocks_[entry.block].state == State::kRestoring ||
                                                blocks_[entry.block].state == State::kCopyingOut);
    if (entry.step >= first_step || is_copied ||
        std::find(bad.begin(), bad.end(), entry.parent) != bad.end()) {
      bad.push_back(id);
    }
  }
  Unindex(bad);
}

// Unpinned entries have unpinned descendants, so all of them can be evicted, one after the other.
int FakeCache::num_available() const {
  int count = 0;
  for (const Block& block : blocks_) {
    if (block.state == State::kFree) ++count;
    if (block.state == State::kCommitted && entries_.at(block.entry).pins == 0) ++count;
  }
  return count;
}

int FakeCache::num_pins() const {
  int count = 0;
  for (const auto& [id, entry] : entries_) count += static_cast<int>(entry.pins);
  return count;
}

int FakeCache::num_leased() const {
  return static_cast<int>(std::count_if(blocks_.begin(), blocks_.end(), [](const Block& block) {
    return block.state == State::kLeased;
  }));
}

}  // namespace wintserve
