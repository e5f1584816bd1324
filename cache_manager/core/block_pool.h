// The states of the KV pool's blocks and their generations. Deals in ids, never in bytes.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "cache_manager/core/pool_block.h"

namespace wintserve {

enum class BlockState : uint8_t {
  kFree,
  kLeased,      // private to the session
  kCommitted,   // holds the content of an entry
  kCopyingOut,  // as kCommitted, while a copy reads it
  kRestoring,   // of an entry, while a copy writes it
  kQuarantined  // of nobody; something may still write it
};
inline constexpr size_t kNumBlockStates = 6;

std::string_view ToString(BlockState state);

// Threading:  thread-compatible.
// Invariant:  the counts of all states sum up to num_blocks() after every call.
// Generation: starts at 1 and rises whenever the block becomes FREE, so whoever still names a block
//             from before that is told apart from its present holder.
class BlockPool {
 public:
  // All blocks are FREE. REQUIRES: 0 < num_blocks <= 2^31 - 1.
  explicit BlockPool(uint32_t num_blocks);

  // A FREE block, now in `state` (kLeased or kRestoring); nullopt when none is FREE. The block that
  // became FREE last comes first, which keeps the set of pages that are ever touched small.
  std::optional<PoolBlock> TakeFree(BlockState state);

  // REQUIRES: the life cycle of PrefixCache has this transition, and `from` is the present state.
  void Move(int32_t id, BlockState from, BlockState to);

  // INVALID_ARGUMENT: no such block. FAILED_PRECONDITION: stale, which is counted.
  absl::Status CheckCurrent(const PoolBlock& block);
  // As CheckCurrent, and FAILED_PRECONDITION when the block is not LEASED.
  absl::Status CheckLeased(const PoolBlock& block);

  BlockState state(int32_t id) const { return blocks_[id].state; }
  PoolBlock Named(int32_t id) const { return {id, blocks_[id].generation}; }
  uint32_t num_blocks() const { return static_cast<uint32_t>(blocks_.size()); }
  uint32_t num_in(BlockState state) const { return num_in_[static_cast<size_t>(state)]; }
  uint64_t num_refused_stale() const { return num_refused_stale_; }

  // INTERNAL describes the first broken invariant. Linear in num_blocks().
  absl::Status CheckInvariants() const;

 private:
  struct Block {
    BlockState state = BlockState::kFree;
    uint32_t generation = 1;
  };

  std::vector<Block> blocks_;
  std::vector<int32_t> free_;  // a stack
  std::array<uint32_t, kNumBlockStates> num_in_{};
  uint64_t num_refused_stale_ = 0;
};

}  // namespace wintserve
