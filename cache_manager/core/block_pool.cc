#include "cache_manager/core/block_pool.h"

#include <fmt/format.h>

#include <limits>
#include <numeric>
#include <set>

#include "common/check.h"
#include "common/status_macros.h"

namespace wintserve {
namespace {

bool IsInLifeCycle(BlockState from, BlockState to) {
  using enum BlockState;
  switch (from) {
    case kFree:
      return to == kLeased || to == kRestoring;
    case kLeased:
      return to == kFree || to == kCommitted || to == kQuarantined;
    case kCommitted:
      return to == kFree || to == kCopyingOut;
    case kCopyingOut:
      return to == kCommitted;
    case kRestoring:
      return to == kCommitted || to == kFree || to == kQuarantined;
    case kQuarantined:
      return to == kFree;
  }
  return false;
}

}  // namespace

std::string_view ToString(BlockState state) {
  switch (state) {
    case BlockState::kFree:
      return "free";
    case BlockState::kLeased:
      return "leased";
    case BlockState::kCommitted:
      return "committed";
    case BlockState::kCopyingOut:
      return "copying out";
    case BlockState::kRestoring:
      return "restoring";
    case BlockState::kQuarantined:
      return "quarantined";
  }
  return "unknown";
}

BlockPool::BlockPool(uint32_t num_blocks) : blocks_(num_blocks), free_(num_blocks) {
  CHECK(num_blocks > 0 && num_blocks <= std::numeric_limits<int32_t>::max(), "num_blocks={}",
        num_blocks);
  std::iota(free_.rbegin(), free_.rend(), 0);
  num_in_[static_cast<size_t>(BlockState::kFree)] = num_blocks;
}

std::optional<PoolBlock> BlockPool::TakeFree(BlockState state) {
  if (free_.empty()) return std::nullopt;
  const int32_t id = free_.back();
  free_.pop_back();
  Move(id, BlockState::kFree, state);
  return Named(id);
}

void BlockPool::Move(int32_t id, BlockState from, BlockState to) {
  Block& block = blocks_[id];
  CHECK(block.state == from && IsInLifeCycle(from, to), "block {}, which is {}, from {} to {}", id,
        ToString(block.state), ToString(from), ToString(to));
  --num_in_[static_cast<size_t>(from)];
  ++num_in_[static_cast<size_t>(to)];
  block.state = to;
  if (to == BlockState::kFree) {
    ++block.generation;
    free_.push_back(id);
  }
}

absl::Status BlockPool::CheckCurrent(const PoolBlock& block) {
  if (block.id < 0 || block.id >= static_cast<int64_t>(blocks_.size())) {
    return absl::InvalidArgumentError(fmt::format("block {} is not in the pool, which has 0 to {}",
                                                  block.id, blocks_.size() - 1));
  }
  const uint32_t generation = blocks_[block.id].generation;
  if (block.generation != generation) {
    ++num_refused_stale_;
    return absl::FailedPreconditionError(
        fmt::format("block {} of generation {} is stale: the block has reached generation {}",
                    block.id, block.generation, generation));
  }
  return absl::OkStatus();
}

absl::Status BlockPool::CheckLeased(const PoolBlock& block) {
  RETURN_IF_ERROR(CheckCurrent(block));
  if (state(block.id) != BlockState::kLeased) {
    return absl::FailedPreconditionError(
        fmt::format("block {} is not leased but {}", block.id, ToString(state(block.id))));
  }
  return absl::OkStatus();
}

absl::Status BlockPool::CheckInvariants() const {
  std::array<uint32_t, kNumBlockStates> counted{};
  for (const Block& block : blocks_) ++counted[static_cast<size_t>(block.state)];
  if (counted != num_in_) return absl::InternalError("the counts of block states are off");
  for (const int32_t id : free_) {
    if (state(id) != BlockState::kFree) {
      return absl::InternalError(
          fmt::format("block {} is on the free stack, and {}", id, ToString(state(id))));
    }
  }
  const std::set<int32_t> distinct(free_.begin(), free_.end());
  if (distinct.size() != free_.size() || free_.size() != num_in(BlockState::kFree)) {
    return absl::InternalError(fmt::format("the free stack holds {} ids, {} distinct, of {}",
                                           free_.size(), distinct.size(),
                                           num_in(BlockState::kFree)));
  }
  return absl::OkStatus();
}

}  // namespace wintserve
