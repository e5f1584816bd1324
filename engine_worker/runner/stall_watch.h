// Notices that work gets no further.
#pragma once

#include <cstdint>
#include <functional>
#include <thread>

#include "common/mutex.h"

namespace wintserve {

// What this process has had from disks, in no unit of its own: it rises whenever a read, also one
// of a mapped file, has come back from one.
uint64_t DiskProgress();

// Threading: the calls from one thread; the functions on a thread of the watch's own.
class StallWatch {
 public:
  // `progress` changes whenever the work gets further. When it has been the same for timeout_ms,
  // on_stall is called, once. 0: never.
  StallWatch(int64_t timeout_ms, std::function<uint64_t()> progress,
             std::function<void()> on_stall);
  // The work is done, or somebody else watches it.
  ~StallWatch();
  StallWatch(const StallWatch&) = delete;
  StallWatch& operator=(const StallWatch&) = delete;

 private:
  void Run(int64_t timeout_ms) EXCLUDES(mutex_);

  const std::function<uint64_t()> progress_;
  const std::function<void()> on_stall_;
  Mutex mutex_;
  CondVar changed_;
  bool is_over_ GUARDED_BY(mutex_) = false;
  std::thread thread_;  // last: it uses the rest
};

}  // namespace wintserve
