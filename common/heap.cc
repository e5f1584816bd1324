#include "common/heap.h"

#include <malloc.h>

namespace wintserve {

void ReturnFreeMemory() { ::malloc_trim(/*pad=*/0); }

void ReturnLargePiecesAtOnce() { ::mallopt(M_MMAP_THRESHOLD, 1 << 20); }

HeapTrimmer::HeapTrimmer(std::chrono::milliseconds period)
    : period_(period), thread_([this] { Run(); }) {}

HeapTrimmer::~HeapTrimmer() {
  {
    MutexLock lock(&mutex_);
    stopping_ = true;
    changed_.NotifyAll();
  }
  thread_.join();
}

void HeapTrimmer::Run() {
  const auto stopping = [this]() NO_THREAD_SAFETY_ANALYSIS { return stopping_; };
  while (true) {
    {
      MutexLock lock(&mutex_);
      if (changed_.WaitFor(&mutex_, period_, stopping)) return;
    }
    ReturnFreeMemory();
  }
}

std::string HeapTunables(HeapArenas arenas, const char* inherited) {
  std::string tunables = "GLIBC_TUNABLES=glibc.malloc.tcache_count=0";
  if (arenas == HeapArenas::kOne) tunables += ":glibc.malloc.arena_max=1";
  // The last one counts where a name stands twice.
  if (inherited != nullptr && *inherited != '\0') tunables.append(":").append(inherited);
  return tunables;
}

}  // namespace wintserve
