#include "engine_worker/runner/block_copier.h"

#include <fmt/format.h>

#include "common/check.h"

namespace wintserve {
namespace {

template <typename... Args>
absl::Status Invalid(fmt::format_string<Args...> format, Args&&... args) {
  return absl::InvalidArgumentError("copies: " + fmt::format(format, std::forward<Args>(args)...));
}

}  // namespace

BlockCopier::BlockCopier(kernels::Backend* backend, const BlockTiers& tiers)
    : backend_(backend),
      tiers_(tiers),
      block_check_(tiers.num_blocks, 0),
      slot_check_(tiers.num_host_slots, 0) {
  CHECK(tiers.num_host_slots == 0 || tiers.host_tier != nullptr);
}

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

void BlockCopier::Run(std::span<const BlockCopy> copies) const {
  for (const BlockCopy& copy : copies) {
    char* const block = static_cast<char*>(tiers_.pool) +
                        int64_t{static_cast<int32_t>(copy.block)} * tiers_.block_bytes;
    char* const slot =
        static_cast<char*>(tiers_.host_tier) + int64_t{copy.host_slot} * tiers_.block_bytes;
    if (copy.to_device) {
      backend_->CopyFromHostAsync(block, slot, tiers_.block_bytes);
    } else {
      backend_->CopyToHostAsync(slot, block, tiers_.block_bytes);
    }
  }
}

}  // namespace wintserve
