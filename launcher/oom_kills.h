// Tells a process that the kernel killed for want of memory from one that somebody killed: both
// have died of SIGKILL.
#pragma once

#include <cstdint>
#include <filesystem>

namespace wintserve {

// Counts the processes that the kernel has killed for want of memory in our control group and those
// below it; where the memory of a group is not accounted for, on the whole machine. Threading: one
// thread.
class OomKills {
 public:
  // root: of the file system that holds proc and sys/fs/cgroup; another one is a test's.
  explicit OomKills(const std::filesystem::path& root = "/");

  // Since the call before, or since the constructor. 0 where the kernel does not tell.
  int64_t TakeNew();

 private:
  std::filesystem::path file_;  // empty: the kernel does not tell
  int64_t seen_ = 0;
};

}  // namespace wintserve
