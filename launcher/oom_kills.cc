#include "launcher/oom_kills.h"

#include <fstream>
#include <optional>
#include <string>
#include <vector>

namespace wintserve {
namespace {

namespace fs = std::filesystem;

// Of a file of lines "name value".
std::optional<int64_t> ReadCount(const fs::path& file) {
  std::ifstream in(file);
  std::string name;
  int64_t value = 0;
  while (in >> name >> value) {
    if (name == "oom_kill") return value;
  }
  return std::nullopt;
}

// Where the count may stand, the most specific first.
std::vector<fs::path> Candidates(const fs::path& root) {
  std::vector<fs::path> found;
  // "HIERARCHY:CONTROLLERS:/PATH"; version 2 has hierarchy 0 and names no controllers.
  std::ifstream groups(root / "proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {
    const size_t controllers = line.find(':');
    const size_t path = line.find(":/");
    if (controllers == line.npos || path == line.npos) continue;
    const std::string names = line.substr(controllers, path - controllers);
    const bool version_2 = line.compare(0, 3, "0::") == 0;
    if (!version_2 && names != ":memory") continue;
    const fs::path mounted = root / (version_2 ? "sys/fs/cgroup" : "sys/fs/cgroup/memory");
    const char* file = version_2 ? "memory.events" : "memory.oom_control";
    found.push_back(mounted / line.substr(path + 2) / file);
    // A container may see its own group at the root of the mount, and the path of the host.
    found.push_back(mounted / file);
  }
  found.push_back(root / "proc/vmstat");
  return found;
}

}  // namespace

OomKills::OomKills(const fs::path& root) {
  for (const fs::path& file : Candidates(root)) {
    const std::optional<int64_t> count = ReadCount(file);
    if (!count.has_value()) continue;
    file_ = file;
    seen_ = *count;
    return;
  }
}

int64_t OomKills::TakeNew() {
  if (file_.empty()) return 0;
  const int64_t count = ReadCount(file_).value_or(seen_);
  const int64_t num_new = count - seen_;
  seen_ = count;
  return num_new;
}

}  // namespace wintserve
