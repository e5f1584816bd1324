// Whether the processes of a group's other ranks still live.
#pragma once

#include <cstdint>
#include <span>
#include <type_traits>
#include <vector>

#include "common/unique_fd.h"

namespace wintserve {

// A process as another one of the same container can find it. Goes from process to process as
// bytes.
struct ProcessPlace {
  uint64_t pid_namespace = 0;  // 0: not known
  int64_t pid = 0;
};
static_assert(std::is_trivially_copyable_v<ProcessPlace>);

ProcessPlace OwnProcessPlace();

// Threading: Watch() first; then any thread.
class PeerProcesses {
 public:
  // By rank; they live, or have lived a moment ago.
  void Watch(std::span<const ProcessPlace> places);

  // The rank's process has ended, and the kernel has closed what it had open, its devices among
  // them. Never true of one in another container, of whom nothing is known.
  bool IsGone(int rank) const;
  // Whether any is, at the latest after timeout_ms.
  bool AnyIsGone(int64_t timeout_ms) const;

 private:
  std::vector<UniqueFd> pidfds_;  // by rank; invalid: not to be watched
  std::vector<bool> was_gone_;    // when Watch() came
};

}  // namespace wintserve
