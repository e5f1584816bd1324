// The bytes of the KV pool: one sealed shared memory a rank and tier.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "common/mapped_memory.h"

namespace wintserve {

// Owns the memory of every rank of one pool. Block b of rank r is the block_bytes_by_rank[r] bytes
// at b * block_bytes_by_rank[r]; it starts as zeros, and costs memory from its first write on. The
// host tier is laid out alike, slot s of every rank holding one block. Left out of core dumps: the
// contents are the users'. Immutable after Create, so any thread may read it. Workers that have
// mapped a rank's memory keep it beyond this object's end.
class PoolMemory {
 public:
  // REQUIRES: num_blocks > 0; 1 rank or more; every size > 0.
  // RESOURCE_EXHAUSTED: more than available_bytes, or than the kernel gives.
  static absl::StatusOr<PoolMemory> Create(uint32_t num_blocks,
                                           const std::vector<uint64_t>& block_bytes_by_rank,
                                           int64_t available_bytes, uint32_t num_host_slots = 0);

  int num_ranks() const { return static_cast<int>(ranks_.size()); }
  const MappedMemory& rank(int rank) const { return ranks_[rank]; }
  bool has_host_tier() const { return !host_ranks_.empty(); }
  // REQUIRES: has_host_tier().
  const MappedMemory& host_rank(int rank) const { return host_ranks_[rank]; }

 private:
  std::vector<MappedMemory> ranks_;
  std::vector<MappedMemory> host_ranks_;  // empty: no host tier
};

}  // namespace wintserve
