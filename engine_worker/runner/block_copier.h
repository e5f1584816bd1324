// Moves whole KV blocks between the pool, which is device memory, and the host tier.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"
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

// Ownership: borrows the backend and the two memories.
// Threading: thread-compatible.
class BlockCopier {
 public:
  BlockCopier(kernels::Backend* backend, const BlockTiers& tiers);

  // INVALID_ARGUMENT names the block or host slot that does not exist, or that is the target of two
  // of these copies.
  absl::Status Check(std::span<const BlockCopy> copies);

  // In this order, and in that of the backend's operators: a copy reads what those before it wrote.
  // REQUIRES: copies that Check accepts; the host tier stays until they are done.
  void Run(std::span<const BlockCopy> copies) const;

 private:
  kernels::Backend* const backend_;
  const BlockTiers tiers_;
  uint64_t num_checks_ = 0;
  std::vector<uint64_t> block_check_;  // by block: the last check that saw it as a target
  std::vector<uint64_t> slot_check_;   // by host slot
};

}  // namespace wintserve
