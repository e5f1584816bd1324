// Moves whole KV blocks between the pool, which is device memory, and the host tier.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "api_server/scheduler/plan.h"
#include "kernels/backend.h"

namespace wintserve {

struct BlockTiers {
  void* pool = nullptr;  // [num_blocks, block_bytes]
  uint32_t num_blocks = 0;
  void* host_tier = nullptr;  // [num_host_slots, block_bytes]: host memory; null: no host tier
  uint32_t num_host_slots = 0;
  int64_t block_bytes = 0;
};

// Copies run beside the operators, behind those that were called before them: a block that goes out
// has been filled by then, and stays as it is until whoever ordered the copy has heard that it is
// done. Operators wait for copies only where they use the blocks that these fill (WaitForBlocks).
//
// Ownership: borrows the backend and the two memories.
// Threading: thread-compatible.
class BlockCopier {
 public:
  static absl::StatusOr<std::unique_ptr<BlockCopier>> Create(kernels::Backend* backend,
                                                             const BlockTiers& tiers);
  // queue: null without a host tier.
  BlockCopier(const BlockTiers& tiers, std::unique_ptr<kernels::CopyQueue> queue);

  // INVALID_ARGUMENT names the block or host slot that does not exist, or that is the target of two
  // of these copies.
  absl::Status Check(std::span<const BlockCopy> copies);

  // Begins the copies, which run in this order: one reads what those before it wrote. The event is
  // done when they are; null: there are none. REQUIRES: copies that Check accepts; the host tier
  // stays until they are done.
  std::unique_ptr<kernels::Event> Begin(std::span<const BlockCopy> copies);

  // Operators that are called from now on come after the copies that fill any of these blocks.
  void WaitForBlocks(std::span<const int32_t> blocks);

 private:
  const BlockTiers tiers_;
  const std::unique_ptr<kernels::CopyQueue> queue_;
  uint64_t num_checks_ = 0;
  std::vector<uint64_t> block_check_;  // by block: the last check that saw it as a target
  std::vector<uint64_t> slot_check_;   // by host slot

  // Calls of Begin are numbered. Operators wait for those up to held_for_; a later one that fills
  // blocks is last_filling_, if it is greater.
  uint64_t num_begins_ = 0;
  uint64_t last_filling_ = 0;
  uint64_t held_for_ = 0;
  std::vector<uint64_t> filled_by_;  // by block: the last that filled it; 0: none
};

}  // namespace wintserve
