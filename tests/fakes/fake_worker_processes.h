// A launcher inside the test's process, as the engine sees it.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "api_server/llm/worker_processes.h"
#include "common/mutex.h"

namespace wintserve {

// Tells the exits that the test makes up, and notes whom it is asked to end. Outlives the watchers.
// Thread-safe.
class FakeWorkerProcesses {
 public:
  WorkerProcessWatcher Watcher() {
    return [this](WorkerProcessEvents events) -> std::unique_ptr<WorkerProcesses> {
      MutexLock lock(&mutex_);
      events_ = std::move(events);
      events_.on_watching(true);
      return std::make_unique<Watch>(this);
    };
  }

  // The rank's process was reaped.
  void TellExit(uint32_t rank, uint64_t worker_id, bool kv_trusted) EXCLUDES(mutex_) {
    MutexLock lock(&mutex_);
    if (events_.on_exit) events_.on_exit(rank, worker_id, kv_trusted, "was ended by signal 9");
  }
  // The launcher is out of reach, or is back.
  void SetWatching(bool watching) EXCLUDES(mutex_) {
    MutexLock lock(&mutex_);
    if (events_.on_watching) events_.on_watching(watching);
  }
  // Of those that were asked for, how many are at fault.
  int num_at_fault() EXCLUDES(mutex_) {
    MutexLock lock(&mutex_);
    return num_at_fault_;
  }
  // Waits until `count` processes have been asked for: rank and worker_id of each.
  std::vector<std::pair<uint32_t, uint64_t>> WaitForEnds(size_t count) EXCLUDES(mutex_) {
    MutexLock lock(&mutex_);
    changed_.WaitFor(&mutex_, std::chrono::seconds(20),
                     [&]() NO_THREAD_SAFETY_ANALYSIS { return ends_.size() >= count; });
    return ends_;
  }

 private:
  class Watch : public WorkerProcesses {
   public:
    explicit Watch(FakeWorkerProcesses* owner) : owner_(owner) {}
    ~Watch() override {
      MutexLock lock(&owner_->mutex_);
      owner_->events_ = {};
    }
    void End(uint32_t rank, uint64_t worker_id, bool at_fault) override {
      MutexLock lock(&owner_->mutex_);
      owner_->ends_.emplace_back(rank, worker_id);
      owner_->num_at_fault_ += at_fault ? 1 : 0;
      owner_->changed_.NotifyAll();
    }

   private:
    FakeWorkerProcesses* const owner_;
  };

  Mutex mutex_;
  CondVar changed_;
  WorkerProcessEvents events_ GUARDED_BY(mutex_);
  std::vector<std::pair<uint32_t, uint64_t>> ends_ GUARDED_BY(mutex_);
  int num_at_fault_ GUARDED_BY(mutex_) = 0;
};

}  // namespace wintserve
