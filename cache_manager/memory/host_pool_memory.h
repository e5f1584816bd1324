// A KV pool in the host's memory.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "cache_manager/memory/pool_memory.h"
#include "common/mapped_memory.h"

namespace wintserve {

// One sealed shared memory a rank and tier. It starts as zeros, and costs memory from its first
// write on.
class HostPoolMemory final : public PoolMemory {
 public:
  // RESOURCE_EXHAUSTED: more than available_bytes, or than the kernel gives.
  static absl::StatusOr<std::unique_ptr<HostPoolMemory>> Create(const PoolSize& size,
                                                                int64_t available_bytes);

  int num_ranks() const override { return static_cast<int>(ranks_.size()); }
  TierMemory device_tier(int rank) const override { return TierOf(ranks_[rank]); }
  bool has_host_tier() const override { return !host_ranks_.empty(); }
  TierMemory host_tier(int rank) const override { return TierOf(host_ranks_[rank]); }

  const MappedMemory& rank(int rank) const { return ranks_[rank]; }
  const MappedMemory& host_rank(int rank) const { return host_ranks_[rank]; }

 private:
  std::vector<MappedMemory> ranks_;
  std::vector<MappedMemory> host_ranks_;  // empty: no host tier
};

}  // namespace wintserve
