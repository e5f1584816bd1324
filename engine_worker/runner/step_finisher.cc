#include "engine_worker/runner/step_finisher.h"

#include <chrono>
#include <utility>

#include "common/check.h"

namespace wintserve {

StepFinisher::StepFinisher(std::function<void(const absl::StatusOr<StepDone>&)> done)
    : done_(std::move(done)), thread_([this] { FinishUntilEnd(); }) {}

StepFinisher::~StepFinisher() {
  {
    MutexLock lock(&mutex_);
    ended_ = true;
    changed_.NotifyAll();
  }
  thread_.join();
}

void StepFinisher::Add(std::unique_ptr<PendingStep> step) {
  // On a CPU every step is done by now: a thread between would cost more than it does.
  if (IsIdle() && step->IsDone()) {
    Finish(step.get());
    return;
  }
  MutexLock lock(&mutex_);
  steps_.push_back(std::move(step));
  changed_.NotifyAll();
}

void StepFinisher::Drain() {
  MutexLock lock(&mutex_);
  changed_.Wait(&mutex_, [this]() NO_THREAD_SAFETY_ANALYSIS { return steps_.empty(); });
}

bool StepFinisher::DrainFor(int64_t timeout_ms) {
  MutexLock lock(&mutex_);
  return changed_.WaitFor(&mutex_, std::chrono::milliseconds(timeout_ms),
                          [this]() NO_THREAD_SAFETY_ANALYSIS { return steps_.empty(); });
}

void StepFinisher::Restart() {
  MutexLock lock(&mutex_);
  CHECK(steps_.empty(), "{} steps", steps_.size());
  has_failed_ = false;
}

bool StepFinisher::IsIdle() {
  MutexLock lock(&mutex_);
  return steps_.empty();
}

void StepFinisher::Finish(PendingStep* step) {
  const absl::StatusOr<StepDone> done = step->Wait();
  {
    MutexLock lock(&mutex_);
    if (has_failed_) return;
    has_failed_ = !done.ok();
  }
  done_(done);
}

void StepFinisher::FinishUntilEnd() {
  while (true) {
    PendingStep* step = nullptr;
    {
      MutexLock lock(&mutex_);
      changed_.Wait(&mutex_,
                    [this]() NO_THREAD_SAFETY_ANALYSIS { return ended_ || !steps_.empty(); });
      if (steps_.empty()) return;
      step = steps_.front().get();
    }
    Finish(step);
    MutexLock lock(&mutex_);
    steps_.pop_front();
    changed_.NotifyAll();
  }
}

}  // namespace wintserve
