// A rank's way to the memory of its group.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "common/mapped_memory.h"

namespace wintserve {

// Asks the supervisor for the memory of `group_epoch`; every rank of the group gets the same. The
// first rank that asks decides its size, so size_bytes must be equal on all of them.
// UNAVAILABLE: no supervisor there within timeout_ms. DEADLINE_EXCEEDED: no answer within it.
// INVALID_ARGUMENT: memory of another size. Otherwise what the supervisor says.
absl::StatusOr<MappedMemory> FetchGroupMemory(const std::string& socket_path,
                                              const std::string& token, uint64_t group_epoch,
                                              int64_t size_bytes, int64_t timeout_ms);

}  // namespace wintserve
