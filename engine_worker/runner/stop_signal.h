// SIGTERM as a call on a thread of its own, outside of any signal handler's restrictions.
#pragma once

#include <functional>
#include <thread>

#include "common/mutex.h"

namespace wintserve {

// While no handler is set, a stop ends the process at once with exit code 0: there is nothing to
// finish while weights are loaded. SIGINT is ignored: a terminal sends it to the whole process
// group, and the supervisor decides in which order its children stop.
//
// Threading: construct before other threads start, since they inherit the blocked signal.
class StopSignal {
 public:
  StopSignal();
  ~StopSignal();
  StopSignal(const StopSignal&) = delete;
  StopSignal& operator=(const StopSignal&) = delete;

  // Waits for a handler that is running. nullptr: none.
  void SetHandler(std::function<void()> handler) EXCLUDES(mutex_);

 private:
  void WaitForSignals() EXCLUDES(mutex_);

  Mutex mutex_;
  std::function<void()> handler_ GUARDED_BY(mutex_);
  bool ended_ GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

}  // namespace wintserve
