// How much memory this process could still use.
#pragma once

#include <cstdint>
#include <filesystem>

#include "absl/status/statusor.h"

namespace wintserve {

// The least of what the machine has available (MemAvailable) and what each memory cgroup above the
// process, version 1 or 2, has left below its limit. File cache that the kernel would give up
// counts as available. `root` stands for "/" in tests.
absl::StatusOr<int64_t> AvailableMemoryBytes(const std::filesystem::path& root = "/");

}  // namespace wintserve
