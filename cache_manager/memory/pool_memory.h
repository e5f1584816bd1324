// The bytes of the KV pool: one piece of memory a rank and tier.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/mapped_memory.h"
#include "common/shared_memory.h"

namespace wintserve {

struct PoolSize {
  uint32_t num_blocks = 0;                    // > 0
  std::vector<uint64_t> block_bytes_by_rank;  // 1 rank or more, each > 0
  uint32_t num_host_slots = 0;                // 0: no host tier
};

// One tier of one rank, as it is handed out: SharedMemory with descriptors that stay its owner's.
struct TierMemory {
  struct Part {
    int fd = -1;
    int64_t size_bytes = 0;
  };

  SharedMemory::Kind kind = SharedMemory::Kind::kHost;
  int64_t size_bytes = 0;
  std::vector<Part> parts;
};

// Owns the memory of every rank of one pool. Block b of rank r is the block_bytes_by_rank[r] bytes
// at b * block_bytes_by_rank[r]. The host tier is laid out alike, slot s of every rank holding one
// block. Immutable, so any thread may read it. Workers that have mapped a rank's memory keep it
// beyond this object's end.
class PoolMemory {
 public:
  virtual ~PoolMemory() = default;

  virtual int num_ranks() const = 0;
  virtual TierMemory device_tier(int rank) const = 0;
  virtual bool has_host_tier() const = 0;
  // REQUIRES: has_host_tier().
  virtual TierMemory host_tier(int rank) const = 0;
};

// Makes the memory of a pool. available_bytes: of the host. RESOURCE_EXHAUSTED: more than there is;
// the message names the sizes and the flags that they come from. Any other error is of the machine.
using PoolMemoryMaker = std::function<absl::StatusOr<std::unique_ptr<PoolMemory>>(
    const PoolSize& size, int64_t available_bytes)>;

// What the implementations share.

inline constexpr double kGib = 1 << 30;

// The flags that the number of blocks comes from.
inline constexpr char kPoolFlags[] = "--num-gpu-blocks-override, --max-num-seqs or --max-model-len";

// "32 blocks of 57344 bytes on 2 ranks", or the sizes joined by "+" where ranks differ.
std::string DescribeBlocks(const PoolSize& size);

// Of `count` blocks on all ranks. A double holds any product of the two, so that a hostile size
// cannot wrap around to a small one.
double TotalBytes(uint32_t count, const PoolSize& size);

// Shared memory of `count` blocks for each rank: zeros, which cost memory from their first write
// on, and are left out of core dumps, as the contents are the users'.
absl::StatusOr<std::vector<MappedMemory>> CreateHostMemory(const char* tier, uint32_t count,
                                                           const PoolSize& size);

TierMemory TierOf(const MappedMemory& memory);

}  // namespace wintserve
