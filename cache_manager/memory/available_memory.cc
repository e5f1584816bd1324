#include "cache_manager/memory/available_memory.h"

#include <fmt/format.h>

#include <algorithm>
#include <fstream>
#include <optional>
#include <string>

#include "common/status_macros.h"

namespace wintserve {
namespace {

namespace fs = std::filesystem;

// The file's first word as a number; nothing when there is no file, or it says "max" (no limit).
std::optional<int64_t> ReadNumber(const fs::path& path) {
  std::ifstream file(path);
  int64_t value = 0;
  if (!(file >> value)) return std::nullopt;
  return value;
}

// The number behind `key` in a file of "key number" lines.
std::optional<int64_t> ReadField(const fs::path& path, const std::string& key) {
  std::ifstream file(path);
  std::string line;
  while (std::getline(file, line)) {
    if (line.starts_with(key)) return std::stoll(line.substr(key.size()));
  }
  return std::nullopt;
}

struct CgroupFiles {
  const char* mount;
  const char* limit;
  const char* usage;
  const char* reclaimable;
};

constexpr CgroupFiles kVersion1 = {"sys/fs/cgroup/memory", "memory.limit_in_bytes",
                                   "memory.usage_in_bytes", "total_inactive_file "};
constexpr CgroupFiles kVersion2 = {"sys/fs/cgroup", "memory.max", "memory.current",
                                   "inactive_file "};

// Lowers *available to what the cgroup at `path` and those above it leave.
void ApplyCgroup(const fs::path& root, const CgroupFiles& files, const std::string& path,
                 int64_t* available) {
  const fs::path top = root / files.mount;
  // A container sees its own cgroup as the mount's top even where the path says otherwise, so the
  // directories of the path that do not exist are passed over.
  for (fs::path dir = top / fs::path(path).relative_path();; dir = dir.parent_path()) {
    const auto limit = ReadNumber(dir / files.limit);
    const auto usage = ReadNumber(dir / files.usage);
    if (limit.has_value() && usage.has_value()) {
      const int64_t reclaimable = ReadField(dir / "memory.stat", files.reclaimable).value_or(0);
      *available = std::min(*available, std::max<int64_t>(*limit - *usage + reclaimable, 0));
    }
    if (dir == top || dir == dir.parent_path()) return;
  }
}

}  // namespace

absl::StatusOr<int64_t> AvailableMemoryBytes(const fs::path& root) {
  const fs::path meminfo = root / "proc/meminfo";
  const auto available_kib = ReadField(meminfo, "MemAvailable:");
  if (!available_kib.has_value()) {
    return absl::UnavailableError(fmt::format("{} has no MemAvailable", meminfo.string()));
  }
  int64_t available = *available_kib * 1024;
  // Lines are "hierarchy:controllers:path"; version 2 is hierarchy 0 without controllers.
  std::ifstream cgroups(root / "proc/self/cgroup");
  std::string line;
  while (std::getline(cgroups, line)) {
    const size_t first = line.find(':');
    const size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    std::string path = line.substr(second + 1);
    while (path.ends_with('/')) path.pop_back();
    if (line.starts_with("0::")) ApplyCgroup(root, kVersion2, path, &available);
    if (controllers.find(",memory,") != std::string::npos) {
      ApplyCgroup(root, kVersion1, path, &available);
    }
  }
  return available;
}

}  // namespace wintserve
