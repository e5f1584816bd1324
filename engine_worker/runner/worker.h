// The life of a worker between Attach and its end: configure, map the pool, execute plans.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>

#include "absl/status/statusor.h"
#include "api_server/work_queue/client/work_queue_client.h"
#include "common/mutex.h"
#include "common/shared_memory.h"
#include "engine_worker/collectives/rank_group.h"
#include "engine_worker/model/model.h"
#include "engine_worker/runner/step_finisher.h"
#include "engine_worker/runner/step_runner.h"
#include "kernels/backend.h"

namespace wintserve {

// Where a worker gets what it shares with other processes.
struct WorkerLinks {
  std::function<absl::StatusOr<std::unique_ptr<Collective>>(const ConfigureWorker&)> join_group;
  // NOT_FOUND: the cache manager no longer has, or never had, this pool. Any other error is a
  // fault.
  std::function<absl::StatusOr<SharedMemory>(const AttachPool&)> fetch_pool;
  // Only called for a pool with host slots.
  std::function<absl::StatusOr<SharedMemory>(const AttachPool&)> fetch_host_tier;
};

// Ownership: borrows model, group and queue.
// Threading: Run() once, on the thread that executes; RequestStop() from any thread.
class Worker {
 public:
  // use_graphs: of the StepRunners that it makes.
  Worker(Model* model, RankGroup* group, WorkQueueClient* queue, WorkerLinks links,
         bool use_graphs = false);

  // Serves the queue. OK: Shutdown came, or a stop was requested. UNAVAILABLE: the stream to the
  // API server ended. Any other error went to the API server as a Fault, too.
  absl::Status Run();

  // True: Run() returns after the plans in hand. Blocks until those are done; if they take longer
  // than `patience_ms`, they lose their group, because they may be waiting for a rank that is gone.
  // False: the worker is at work on something else (joining the group, mapping or warming up a
  // pool), where it may be waiting for another process and has nothing to finish: the caller ends
  // the process at once. The group is aborted, so that no peer waits for this rank.
  bool RequestStop(int64_t patience_ms) EXCLUDES(mutex_);

 private:
  enum class Work { kNone, kPreparation, kPlan };

  absl::Status Serve();
  absl::Status Handle(const ServerEvent& event);
  absl::Status Configure(const ConfigureWorker& configure);
  absl::Status MapPool(const AttachPool& attach);
  absl::Status MapTiers(const AttachPool& attach);
  void UnmapTiers();
  // Whether every rank could map the pool. Blocks until all have said so.
  absl::StatusOr<bool> AllMapped(bool mapped);
  absl::Status UnmapPool(const DetachPool& detach);
  absl::Status Execute(const ReceivedPlan& received);
  void Report(const absl::StatusOr<StepDone>& done) EXCLUDES(mutex_);
  // INTERNAL: a step failed on the device, and Report has said so. OK: none has.
  absl::Status StepError() EXCLUDES(mutex_);
  bool BeginWork(Work work) EXCLUDES(mutex_);
  bool EndWork() EXCLUDES(mutex_);
  // True once a stop was requested, at the latest after timeout_ms.
  bool WaitForStop(int64_t timeout_ms) EXCLUDES(mutex_);
  void BeatUntilEnd() EXCLUDES(mutex_);

  Model* const model_;
  RankGroup* const group_;
  WorkQueueClient* const queue_;
  const WorkerLinks links_;
  const bool use_graphs_;

  std::optional<ConfigureWorker> config_;
  std::unique_ptr<kernels::Buffer> pool_;  // memory of the model's device, of the cache manager's
  std::unique_ptr<kernels::Buffer> host_tier_;  // null: none
  std::optional<uint64_t> pool_epoch_;          // of the attached pool, also if it was gone
  std::unique_ptr<StepRunner> runner_;          // null: no pool is mapped
  PlanChain chain_;                             // of the pools before

  std::atomic<uint64_t> step_started_ = 0;
  std::atomic<uint64_t> step_done_ = 0;

  Mutex mutex_;
  CondVar changed_;
  Work work_ GUARDED_BY(mutex_) = Work::kNone;  // on what came from the queue last
  bool stopping_ GUARDED_BY(mutex_) = false;
  bool ended_ GUARDED_BY(mutex_) = false;
  absl::Status step_error_ GUARDED_BY(mutex_);

  StepFinisher finisher_;  // last: its thread calls Report
};

}  // namespace wintserve
