// What a session and the cache manager say to each other, as plain structs. They mirror
// proto/cache.proto.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "cache_manager/core/pool_block.h"

namespace wintserve {

struct PeekResult {
  uint32_t device_blocks = 0;
  uint32_t host_blocks = 0;  // that follow them
};

// A reusable block, pinned for whoever asked.
struct PinnedBlock {
  uint64_t entry = 0;
  PoolBlock block;
};

enum class CopyDirection { kToHost, kToDevice };

// The worker copies one block's bytes between the pool and a host slot, on every rank.
struct CopyOrder {
  uint64_t copy_id = 0;
  CopyDirection direction = CopyDirection::kToHost;
  PoolBlock block;
  uint32_t host_slot = 0;
};

// Write-backs travel in plans, so few at a time; a block being copied cannot be evicted.
inline constexpr size_t kMaxCopiesPerPush = 32;
inline constexpr size_t kMaxWriteBacksUnderWay = 64;

// In sequence order: `device` blocks, then `restoring` ones, all of them pinned.
struct MatchResult {
  std::vector<PinnedBlock> device;
  std::vector<PinnedBlock> restoring;
  std::vector<CopyOrder> copies;  // copies[i] fills restoring[i]
};

struct CommitBlock {
  PoolBlock block;
  std::vector<int32_t> tokens;  // block_size_tokens ids
};

struct CommitRequest {
  uint64_t parent = 0;  // entry; 0: the root of `salt`
  std::string salt;
  std::vector<CommitBlock> blocks;
  // The newest step that wrote to one of the blocks. 0: unknown, and so never before the first step
  // of a DistrustSteps.
  uint64_t step = 0;
};

// See PrefixCache::Commit.
struct CommittedBlock {
  uint64_t entry = 0;
  bool duplicate = false;

  friend bool operator==(const CommittedBlock&, const CommittedBlock&) = default;
};

struct PinCount {
  uint64_t entry = 0;
  uint32_t count = 0;
};

struct PrefixCacheStats {
  // Blocks of the device tier by state; they sum up to num_blocks.
  uint32_t num_free = 0;
  uint32_t num_leased = 0;
  uint32_t num_committed_pinned = 0;
  uint32_t num_committed_unpinned = 0;
  uint32_t num_restoring = 0;
  uint32_t num_copying_out = 0;
  uint32_t num_quarantined = 0;
  // Host slots by state.
  uint32_t num_host_free = 0;
  uint32_t num_host_filling = 0;
  uint32_t num_host_valid = 0;
  uint32_t num_host_quarantined = 0;
  uint64_t num_entries = 0;
  // Totals since the pool was created.
  uint64_t matches = 0;
  uint64_t queried_tokens = 0;  // whole prompts
  uint64_t device_hit_tokens = 0;
  uint64_t host_hit_tokens = 0;  // of restores that were started
  uint64_t evicted_device_blocks = 0;
  uint64_t evicted_host_slots = 0;
  uint64_t committed_blocks = 0;
  uint64_t duplicate_commits = 0;
  uint64_t refused_stale = 0;
};

struct CacheEvent {
  // kRemoved: matches no more. kTierChanged: on_device or on_host has changed.
  enum class Kind { kStored, kRemoved, kTierChanged };
  Kind kind = Kind::kStored;
  uint64_t entry = 0;
  uint64_t parent = 0;  // 0: a root
  bool on_device = false;
  bool on_host = false;
  std::vector<int32_t> tokens;  // kStored only
};

}  // namespace wintserve
