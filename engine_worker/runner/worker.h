// The life of a worker between Attach and its end: configure, map the pool, execute plans.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>

#include "absl/status/statusor.h"
#include "api_server/work_queue/client/work_queue_client.h"
#include "common/mapped_memory.h"
#include "common/mutex.h"
#include "engine_worker/collectives/rank_group.h"
#include "engine_worker/model/model.h"
#include "engine_worker/runner/step_runner.h"

namespace wintserve {

// Where a worker gets what it shares with other processes.
struct WorkerLinks {
  std::function<absl::StatusOr<std::unique_ptr<Collective>>(const ConfigureWorker&)> join_group;
  std::function<absl::StatusOr<MappedMemory>(const AttachPool&)> fetch_pool;
};

// Ownership: borrows model, group and queue.
// Threading: Run() once, on the thread that executes; RequestStop() from any thread.
class Worker {
 public:
  Worker(Model* model, RankGroup* group, WorkQueueClient* queue, WorkerLinks links);

  // Serves the queue. OK: Shutdown came, or a stop was requested. UNAVAILABLE: the stream to the
  // API server ended. Any other error went to the API server as a Fault, too.
  absl::Status Run();

  // Makes Run() return after the plan in hand. Blocks until that plan is done; one that takes
  // longer than `patience_ms` loses its group, because it may be waiting for a rank that is gone.
  void RequestStop(int64_t patience_ms) EXCLUDES(mutex_);

 private:
  absl::Status Serve();
  absl::Status Handle(const ServerEvent& event);
  absl::Status Configure(const ConfigureWorker& configure);
  absl::Status MapPool(const AttachPool& attach);
  absl::Status Execute(const ReceivedPlan& received);
  bool BeginWork() EXCLUDES(mutex_);
  bool EndWork() EXCLUDES(mutex_);
  // True once a stop was requested, at the latest after timeout_ms.
  bool WaitForStop(int64_t timeout_ms) EXCLUDES(mutex_);
  void BeatUntilEnd() EXCLUDES(mutex_);

  Model* const model_;
  RankGroup* const group_;
  WorkQueueClient* const queue_;
  const WorkerLinks links_;

  std::optional<ConfigureWorker> config_;
  MappedMemory pool_;
  std::unique_ptr<StepRunner> runner_;

  std::atomic<uint64_t> step_started_ = 0;
  std::atomic<uint64_t> step_done_ = 0;

  Mutex mutex_;
  CondVar changed_;
  bool working_ GUARDED_BY(mutex_) = false;  // on something that came from the queue
  bool stopping_ GUARDED_BY(mutex_) = false;
  bool ended_ GUARDED_BY(mutex_) = false;
};

}  // namespace wintserve
