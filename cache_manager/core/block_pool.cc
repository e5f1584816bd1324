#include "cache_manager/core/block_pool.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <numeric>

#include "common/check.h"
#include "common/status_macros.h"

namespace wintserve {

BlockPool::BlockPool(uint32_t num_blocks) : blocks_(num_blocks), free_(num_blocks) {
  CHECK(num_blocks > 0 && num_blocks <= std::numeric_limits<int32_t>::max(), "num_blocks={}",
        num_blocks);
  std::iota(free_.rbegin(), free_.rend(), 0);
}

absl::StatusOr<std::vector<PoolBlock>> BlockPool::Lease(uint32_t count) {
  if (count == 0) return absl::InvalidArgumentError("a lease of 0 blocks; at least 1");
  if (count > num_free()) {
    return absl::ResourceExhaustedError(
        fmt::format("a lease of {} blocks; {} of {} are free", count, num_free(), num_blocks()));
  }
  std::vector<PoolBlock> leased;
  leased.reserve(count);
  for (uint32_t i = 0; i < count; ++i) {
    const int32_t id = free_.back();
    free_.pop_back();
    CHECK(blocks_[id].state == State::kFree, "block {} is on the free list and not free", id);
    blocks_[id].state = State::kLeased;
    leased.push_back({id, blocks_[id].generation});
  }
  num_leased_ += count;
  return leased;
}

absl::Status BlockPool::CheckReturnable(const PoolBlock& block) const {
  if (block.id < 0 || block.id >= static_cast<int64_t>(blocks_.size())) {
    return absl::InvalidArgumentError(fmt::format("block {} is not in the pool, which has 0 to {}",
                                                  block.id, blocks_.size() - 1));
  }
  const Block& now = blocks_[block.id];
  if (block.generation != now.generation) {
    return absl::FailedPreconditionError(
        fmt::format("block {} of generation {} is stale: the block has reached generation {}",
                    block.id, block.generation, now.generation));
  }
  if (now.state != State::kLeased) {
    return absl::FailedPreconditionError(fmt::format("block {} is not leased", block.id));
  }
  return absl::OkStatus();
}

absl::Status BlockPool::Return(std::span<const PoolBlock> blocks) {
  std::vector<int32_t> ids;
  ids.reserve(blocks.size());
  for (const PoolBlock& block : blocks) {
    RETURN_IF_ERROR(CheckReturnable(block));
    ids.push_back(block.id);
  }
  std::sort(ids.begin(), ids.end());
  if (const auto twice = std::adjacent_find(ids.begin(), ids.end()); twice != ids.end()) {
    return absl::InvalidArgumentError(fmt::format("block {} is returned twice", *twice));
  }
  for (const PoolBlock& block : blocks) {
    blocks_[block.id].state = State::kFree;
    ++blocks_[block.id].generation;
    free_.push_back(block.id);
  }
  num_leased_ -= static_cast<uint32_t>(blocks.size());
  return absl::OkStatus();
}

}  // namespace wintserve
