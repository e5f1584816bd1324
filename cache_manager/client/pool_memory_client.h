// A worker's end of the memory socket: fetches the rank's share of the KV pool.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "common/shared_memory.h"

namespace wintserve {

enum class PoolTier {
  kDevice,  // the blocks that are computed in
  kHost,    // the host slots; FAILED_PRECONDITION where the pool has none
};

// A cache manager that dies before it has answered is waited for: the next one answers. NOT_FOUND:
// it does not have this pool. UNAVAILABLE: nobody has answered within timeout_ms. INTERNAL: the
// answer does not fit together.
absl::StatusOr<SharedMemory> FetchPoolMemory(const std::string& socket_path,
                                             const std::string& token, uint64_t pool_epoch,
                                             int rank, PoolTier tier, int64_t timeout_ms);

}  // namespace wintserve
