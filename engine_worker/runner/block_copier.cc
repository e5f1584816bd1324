#include "engine_worker/runner/block_copier.h"

#include <fmt/format.h>

#include <utility>

#include "common/check.h"
#include "common/status_macros.h"

namespace wintserve {
namespace {

template <typename... Args>
absl::Status Invalid(fmt::format_string<Args...> format, Args&&... args) {
  return absl::InvalidArgumentError("copies: " + fmt::format(format, std::forward<Args>(args)...));
}

}  // namespace

absl::StatusOr<std::unique_ptr<BlockCopier>> BlockCopier::Create(kernels::Backend* backend,
                                                                 const BlockTiers& tiers) {
  CHECK(tiers.num_host_slots == 0 || tiers.host_tier != nullptr);
  std::unique_ptr<kernels::CopyQueue> queue;
  if (tiers.num_host_slots > 0) {
    ASSIGN_OR_RETURN(queue, backend->CreateCopyQueue());
  }
  return std::make_unique<BlockCopier>(tiers, std::move(queue));
}

BlockCopier::BlockCopier(const BlockTiers& tiers, std::unique_ptr<kernels::CopyQueue> queue)
    : tiers_(tiers),
      queue_(std::move(queue)),
      block_check_(tiers.num_blocks, 0),
      slot_check_(tiers.num_host_slots, 0),
      filled_by_(tiers.num_host_slots > 0 ? tiers.num_blocks : 0, 0) {}

absl::Status BlockCopier::Check(std::span<const BlockCopy> copies) {
  ++num_checks_;
  for (const BlockCopy& copy : copies) {
    const auto block = static_cast<int32_t>(copy.block);
    if (block < 0 || static_cast<uint32_t>(block) >= tiers_.num_blocks) {
      return Invalid("block {} is not in 0 … {}", block, int64_t{tiers_.num_blocks} - 1);
    }
    if (tiers_.num_host_slots == 0) {
      return Invalid("host slot {}, but this pool has no host tier", copy.host_slot);
    }
    if (copy.host_slot >= tiers_.num_host_slots) {
      return Invalid("host slot {} is not in 0 … {}", copy.host_slot, tiers_.num_host_slots - 1);
    }
    uint64_t& last_check = copy.to_device ? block_check_[block] : slot_check_[copy.host_slot];
    if (last_check == num_checks_) {
      return copy.to_device ? Invalid("block {} is the target of two", block)
                            : Invalid("host slot {} is the target of two", copy.host_slot);
    }
    last_check = num_checks_;
  }
  return absl::OkStatus();
}

std::unique_ptr<kernels::Event> BlockCopier::Begin(std::span<const BlockCopy> copies) {
  if (copies.empty()) return nullptr;
  CHECK(queue_ != nullptr);
  ++num_begins_;
  queue_->WaitForOperators();
  for (const BlockCopy& copy : copies) {
    const auto id = static_cast<int32_t>(copy.block);
    char* const block = static_cast<char*>(tiers_.pool) + int64_t{id} * tiers_.block_bytes;
    char* const slot =
        static_cast<char*>(tiers_.host_tier) + int64_t{copy.host_slot} * tiers_.block_bytes;
    if (copy.to_device) {
      queue_->CopyFromHost(block, slot, tiers_.block_bytes);
      filled_by_[id] = last_filling_ = num_begins_;
    } else {
      queue_->CopyToHost(slot, block, tiers_.block_bytes);
    }
  }
  return queue_->Record();
}

void BlockCopier::WaitForBlocks(std::span<const int32_t> blocks) {
  if (last_filling_ <= held_for_) return;  // as a rule
  for (const int32_t block : blocks) {
    if (filled_by_[block] <= held_for_) continue;
    queue_->HoldOperators();
    held_for_ = num_begins_;
    return;
  }
}

}  // namespace wintserve
