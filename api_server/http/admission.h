// How many generation requests may be open at once.
#pragma once

#include <chrono>
#include <utility>

#include "common/mutex.h"

namespace wintserve {

// Thread-safe. Outlives its permits.
class Admission {
 public:
  // Move-only proof of being let in; leaving is its destruction.
  class Permit {
   public:
    Permit() = default;
    Permit(Permit&& other) noexcept : admission_(std::exchange(other.admission_, nullptr)) {}
    Permit& operator=(Permit&&) = delete;
    ~Permit() {
      if (admission_ != nullptr) admission_->Leave();
    }
    explicit operator bool() const { return admission_ != nullptr; }

   private:
    friend class Admission;
    explicit Permit(Admission* admission) : admission_(admission) {}
    Admission* admission_ = nullptr;
  };

  explicit Admission(int max_open) : max_open_(max_open) {}

  // An empty permit: too many are open.
  Permit TryEnter() EXCLUDES(mutex_);
  // True as soon as none is open, false at the deadline.
  bool WaitUntilEmpty(std::chrono::milliseconds timeout) EXCLUDES(mutex_);
  int max_open() const { return max_open_; }

 private:
  void Leave() EXCLUDES(mutex_);

  const int max_open_;
  Mutex mutex_;
  CondVar changed_;
  int num_open_ GUARDED_BY(mutex_) = 0;
};

}  // namespace wintserve
