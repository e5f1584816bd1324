#pragma once

#include <chrono>

#include "common/mutex.h"

namespace wintserve::eval {

// Says once and for all that work is to end. Threading: any thread.
class StopFlag {
 public:
  void Set() EXCLUDES(mu_) {
    {
      const MutexLock lock(&mu_);
      is_set_ = true;
    }
    changed_.NotifyAll();
  }
  bool IsSet() EXCLUDES(mu_) {
    const MutexLock lock(&mu_);
    return is_set_;
  }
  // Returns IsSet() at the end of the time, or as soon as it is true.
  bool WaitFor(std::chrono::milliseconds time) EXCLUDES(mu_) {
    const MutexLock lock(&mu_);
    return changed_.WaitFor(&mu_, time, [this]() NO_THREAD_SAFETY_ANALYSIS { return is_set_; });
  }

 private:
  Mutex mu_;
  CondVar changed_;
  bool is_set_ GUARDED_BY(mu_) = false;
};

}  // namespace wintserve::eval
