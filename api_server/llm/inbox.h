// Many threads push, one takes: how everything reaches the engine's thread.
#pragma once

#include <chrono>
#include <optional>
#include <utility>
#include <vector>

#include "common/mutex.h"

namespace wintserve {

template <typename T>
class Inbox {
 public:
  // False once the inbox is closed; `item` is then untouched.
  bool Push(T&& item) EXCLUDES(mutex_) {
    MutexLock lock(&mutex_);
    if (closed_) return false;
    items_.push_back(std::move(item));
    // Under the lock, so that the taker cannot have destroyed the inbox meanwhile.
    if (items_.size() == 1) arrived_.NotifyOne();
    return true;
  }

  // Waits for at least one item; all that are there, in order of arrival. Empty: the deadline has
  // come first.
  std::vector<T> WaitAndTake(std::optional<std::chrono::steady_clock::time_point> deadline = {})
      EXCLUDES(mutex_) {
    MutexLock lock(&mutex_);
    const auto any = [this]() NO_THREAD_SAFETY_ANALYSIS { return !items_.empty(); };
    if (deadline.has_value()) {
      arrived_.WaitFor(&mutex_, *deadline - std::chrono::steady_clock::now(), any);
    } else {
      arrived_.Wait(&mutex_, any);
    }
    return std::exchange(items_, {});
  }

  // What is left; nothing can be pushed from now on.
  std::vector<T> Close() EXCLUDES(mutex_) {
    MutexLock lock(&mutex_);
    closed_ = true;
    return std::exchange(items_, {});
  }

 private:
  Mutex mutex_;
  CondVar arrived_;
  std::vector<T> items_ GUARDED_BY(mutex_);
  bool closed_ GUARDED_BY(mutex_) = false;
};

}  // namespace wintserve
