// The states of the KV pool's blocks. Deals in ids, never in bytes.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "cache_manager/core/pool_block.h"

namespace wintserve {

// Each block is FREE or LEASED:
//
//        Lease             Return
//   FREE ------> LEASED ----------> FREE, one generation later
//
// Threading:  thread-compatible.
// Invariant:  num_free() + num_leased() == num_blocks() after every call.
// Generation: starts at 1 and rises whenever the block becomes FREE, so whoever still holds a block
//             from before that is told apart from its present holder.
class BlockPool {
 public:
  // All blocks are FREE. REQUIRES: 0 < num_blocks <= 2^31 - 1.
  explicit BlockPool(uint32_t num_blocks);

  // All or nothing. The block that was returned last is leased first, which keeps the set of pages
  // that the pool has ever touched small.
  // RESOURCE_EXHAUSTED: fewer than `count` blocks are FREE. INVALID_ARGUMENT: count is 0.
  absl::StatusOr<std::vector<PoolBlock>> Lease(uint32_t count);

  // Whole or nothing: an error names the first bad block and none has been returned.
  // INVALID_ARGUMENT: no such block, or named twice. FAILED_PRECONDITION: stale, or not leased.
  absl::Status Return(std::span<const PoolBlock> blocks);

  uint32_t num_blocks() const { return static_cast<uint32_t>(blocks_.size()); }
  uint32_t num_free() const { return static_cast<uint32_t>(free_.size()); }
  uint32_t num_leased() const { return num_leased_; }

 private:
  enum class State : uint8_t { kFree, kLeased };

  struct Block {
    State state = State::kFree;
    uint32_t generation = 1;
  };

  absl::Status CheckReturnable(const PoolBlock& block) const;

  std::vector<Block> blocks_;
  std::vector<int32_t> free_;  // a stack
  uint32_t num_leased_ = 0;
};

}  // namespace wintserve
