// Waits for steps that the device works on, so that the thread that begins them can go on to the
// next.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <thread>

#include "absl/status/statusor.h"
#include "api_server/scheduler/plan.h"
#include "common/mutex.h"
#include "engine_worker/runner/pending_step.h"

namespace wintserve {

// Hands the results of steps on in the order in which they were added. After one that failed
// nothing more is handed on until Restart().
//
// Threading: thread-safe but for Add, which is for one thread. `done` is called on the adding
// thread, for a step that is done when it is added and has none before it, or on the finisher's
// own.
class StepFinisher {
 public:
  explicit StepFinisher(std::function<void(const absl::StatusOr<StepDone>&)> done);
  ~StepFinisher();  // waits for the steps

  void Add(std::unique_ptr<PendingStep> step) EXCLUDES(mutex_);

  // Returns once every step that was added has been handed on or dropped.
  void Drain() EXCLUDES(mutex_);
  // The same, but false after timeout_ms.
  bool DrainFor(int64_t timeout_ms) EXCLUDES(mutex_);

  // Forgets that a step has failed. For the adding thread, after Drain().
  void Restart() EXCLUDES(mutex_);

 private:
  void Finish(PendingStep* step) EXCLUDES(mutex_);
  void FinishUntilEnd() EXCLUDES(mutex_);
  bool IsIdle() EXCLUDES(mutex_);

  const std::function<void(const absl::StatusOr<StepDone>&)> done_;
  Mutex mutex_;
  CondVar changed_;
  std::deque<std::unique_ptr<PendingStep>> steps_ GUARDED_BY(mutex_);  // the first is waited for
  bool has_failed_ GUARDED_BY(mutex_) = false;
  bool ended_ GUARDED_BY(mutex_) = false;
  std::thread thread_;  // last: it uses the others
};

}  // namespace wintserve
