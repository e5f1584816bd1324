// std::mutex with clang's thread-safety annotations. (TSan reports Debian's absl::Mutex, which is
// not instrumented, as racy; it understands std::mutex.)
#pragma once

#include <chrono>
#include <condition_variable>
#include <mutex>

#include "absl/base/thread_annotations.h"  // GUARDED_BY and NO_THREAD_SAFETY_ANALYSIS

#if defined(__clang__)
#define WINTSERVE_THREAD_ANNOTATION(x) __attribute__((x))
#else
#define WINTSERVE_THREAD_ANNOTATION(x)
#endif
#define CAPABILITY(x) WINTSERVE_THREAD_ANNOTATION(capability(x))
#define SCOPED_CAPABILITY WINTSERVE_THREAD_ANNOTATION(scoped_lockable)
#define REQUIRES(...) WINTSERVE_THREAD_ANNOTATION(requires_capability(__VA_ARGS__))
#define EXCLUDES(...) WINTSERVE_THREAD_ANNOTATION(locks_excluded(__VA_ARGS__))
#define ACQUIRE(...) WINTSERVE_THREAD_ANNOTATION(acquire_capability(__VA_ARGS__))
#define RELEASE(...) WINTSERVE_THREAD_ANNOTATION(release_capability(__VA_ARGS__))

namespace wintserve {

class CAPABILITY("mutex") Mutex {
 public:
  void Lock() ACQUIRE() { mutex_.lock(); }
  void Unlock() RELEASE() { mutex_.unlock(); }

 private:
  friend class CondVar;
  std::mutex mutex_;
};

class SCOPED_CAPABILITY MutexLock {
 public:
  explicit MutexLock(Mutex* mutex) ACQUIRE(mutex) : mutex_(mutex) { mutex_->Lock(); }
  ~MutexLock() RELEASE() { mutex_->Unlock(); }
  MutexLock(const MutexLock&) = delete;
  MutexLock& operator=(const MutexLock&) = delete;

 private:
  Mutex* const mutex_;
};

// Waits only on a condition, so that a spurious wake-up cannot pass for an event.
class CondVar {
 public:
  void NotifyOne() { cv_.notify_one(); }
  void NotifyAll() { cv_.notify_all(); }

  // REQUIRES: *mutex is held. Returns once condition() is true.
  template <typename Condition>
  void Wait(Mutex* mutex, Condition condition) REQUIRES(mutex) {
    std::unique_lock<std::mutex> lock(mutex->mutex_, std::adopt_lock);
    cv_.wait(lock, condition);
    lock.release();
  }

  // REQUIRES: *mutex is held. Returns condition() at the deadline or as soon as it is true.
  template <typename Condition>
  bool WaitFor(Mutex* mutex, std::chrono::steady_clock::duration timeout, Condition condition)
      REQUIRES(mutex) {
    std::unique_lock<std::mutex> lock(mutex->mutex_, std::adopt_lock);
    const bool met = cv_.wait_for(lock, timeout, condition);
    lock.release();
    return met;
  }

 private:
  std::condition_variable cv_;
};

}  // namespace wintserve
