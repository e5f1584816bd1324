// A worker's end of the memory socket: fetches the rank's share of the KV pool and maps it.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "common/mapped_memory.h"

namespace wintserve {

// UNAVAILABLE: no cache manager there within timeout_ms. FAILED_PRECONDITION: another pool_epoch.
absl::StatusOr<MappedMemory> FetchPoolMemory(const std::string& socket_path,
                                             const std::string& token, uint64_t pool_epoch,
                                             int rank, int64_t timeout_ms);

}  // namespace wintserve
