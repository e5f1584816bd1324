// The life of a worker between Attach and its end: configure, map the pool, execute plans; and
// again with the next rank group, or the next API server.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <set>

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
  // UNAVAILABLE: another rank is gone, or the group was aborted. Any other error is a fault.
  std::function<absl::StatusOr<std::unique_ptr<Collective>>(const ConfigureWorker&)> join_group;
  // NOT_FOUND: the cache manager no longer has, or never had, this pool. Any other error is a
  // fault.
  std::function<absl::StatusOr<SharedMemory>(const AttachPool&)> fetch_pool;
  // Only called for a pool with host slots.
  std::function<absl::StatusOr<SharedMemory>(const AttachPool&)> fetch_host_tier;
  // The way to the API server that comes after one that is gone, with the pool that this worker
  // still maps, 0 for none. UNAVAILABLE: none came within timeout_ms; any other error ends the
  // worker. Null: there is none to come.
  std::function<absl::StatusOr<std::unique_ptr<WorkQueueClient>>(uint64_t mapped_pool_epoch,
                                                                 int64_t timeout_ms)>
      attach_again = nullptr;
};

struct WorkerOptions {
  bool use_graphs = false;  // of the StepRunners that it makes
  // How long it keeps weights and pool without an API server, or in a group that is over while the
  // API server says nothing about it.
  int64_t orphan_timeout_ms = 120'000;
  // How long after its group has ended without an abort the API server is told. As a rule it knows
  // earlier, and better, of the peer that has died.
  int64_t lost_group_report_ms = 1'000;
};

// A worker outlives its rank group. When a peer is gone, or an abort comes, it leaves the group:
// nothing that it has begun runs any more, its slots are empty; weights and the mapped pool stay.
// It answers AbortGroup, and takes the next Configure. When the API server is gone it leaves its
// group as well, and attaches to the next one. Only what is wrong with itself is a fault.
//
// Ownership: borrows model, group and the first queue.
// Threading: Run() once, on the thread that executes; RequestStop() from any thread.
class Worker {
 public:
  Worker(Model* model, RankGroup* group, WorkQueueClient* queue, WorkerLinks links,
         const WorkerOptions& options = {});

  // Serves the queue. OK: Shutdown came, or a stop was requested. UNAVAILABLE: the API server is
  // gone, and no other came in time. DEADLINE_EXCEEDED: the API server has not ended a group that
  // is over. Any other error went to the API server as a Fault, too, if there was one.
  absl::Status Run();

  // True: Run() returns after the plans in hand. Blocks until those are done; if they take longer
  // than `patience_ms`, they lose their group, because they may be waiting for a rank that is gone.
  // False: the worker is at work on something else (joining or leaving a group, mapping or warming
  // up a pool, looking for an API server), where it may be waiting for another process and has
  // nothing to finish: the caller ends the process at once. The group is aborted, so that no peer
  // waits for this rank.
  bool RequestStop(int64_t patience_ms) EXCLUDES(mutex_);

 private:
  enum class Work { kNone, kPreparation, kPlan };

  absl::Status Serve();
  // Of what can end a step or a preparation: OK for a loss of the group, which is left then.
  absl::Status Handle(const ServerEvent& event);
  absl::Status Configure(const ConfigureWorker& configure);
  absl::Status MapPool(const AttachPool& attach);
  // Whether the pool is mapped, newly or still. NOT_FOUND: it is gone.
  absl::Status MapTiers(const AttachPool& attach);
  void UnmapTiers();
  // Whether every rank could map the pool. Blocks until all have said so.
  absl::StatusOr<bool> AllMapped(bool mapped);
  absl::Status MakeRunner(const AttachPool& attach);
  absl::Status UnmapPool(const DetachPool& detach);
  absl::Status Execute(const ReceivedPlan& received);
  void Report(const absl::StatusOr<StepDone>& done) EXCLUDES(mutex_);
  // INTERNAL: a step failed on the device, and Report has said so. OK: none has.
  absl::Status StepError() EXCLUDES(mutex_);

  // On the stream's thread: the group of that epoch, 0 for any, is to end now.
  void Interrupt(uint64_t group_epoch) EXCLUDES(mutex_);
  // False: the group is to end before it has begun.
  bool BeginGroup(uint64_t group_epoch) EXCLUDES(mutex_);
  bool GroupIsOver() EXCLUDES(mutex_);
  // Ends this rank's part in the group. INTERNAL: the device failed.
  absl::Status LeaveGroup() EXCLUDES(mutex_);
  absl::Status LoseGroup(const absl::Status& reason) EXCLUDES(mutex_);
  absl::Status Abort(const AbortGroup& abort) EXCLUDES(mutex_);

  // The stream has ended. Whether the worker goes on, with the next API server; false: a stop.
  absl::StatusOr<bool> AttachAgain(const absl::Status& end) EXCLUDES(mutex_);
  absl::StatusOr<std::unique_ptr<WorkQueueClient>> FindServer() EXCLUDES(mutex_);
  void UseQueue(std::shared_ptr<WorkQueueClient> queue) EXCLUDES(mutex_);
  std::shared_ptr<WorkQueueClient> Queue() EXCLUDES(mutex_);

  bool BeginWork(Work work) EXCLUDES(mutex_);
  bool EndWork() EXCLUDES(mutex_);
  bool IsStopping() EXCLUDES(mutex_);
  // True once a stop was requested, at the latest after timeout_ms.
  bool WaitForStop(int64_t timeout_ms) EXCLUDES(mutex_);
  void BeatUntilEnd() EXCLUDES(mutex_);
  // Tells the API server of a group that is over though nobody has aborted it: of its ranks, all
  // may live, and would only be missed once a step is overdue.
  void ReportALostGroup() EXCLUDES(report_mutex_, mutex_);
  // The group is over without an abort. A second time nothing happens.
  void NoteLoss(const absl::Status& reason) REQUIRES(mutex_);
  // Closes the stream when a group has been over for too long.
  void LimitTheWaitForAnAbort() REQUIRES(mutex_);

  Model* const model_;
  RankGroup* const group_;
  const WorkerLinks links_;
  const WorkerOptions options_;

  std::optional<ConfigureWorker> config_;  // absent: in no group
  std::optional<uint64_t> awaited_abort_;  // of a group that it has left by itself
  std::unique_ptr<kernels::Buffer> pool_;  // memory of the model's device, of the cache manager's
  std::unique_ptr<kernels::Buffer> host_tier_;  // null: none
  std::optional<uint64_t> pool_epoch_;          // of the attached pool, also if it was gone
  bool pool_is_attached_ = false;               // to this group
  std::unique_ptr<StepRunner> runner_;          // null: no pool is mapped
  PlanChain chain_;                             // of this group, on the pools before

  std::atomic<uint64_t> step_started_ = 0;
  std::atomic<uint64_t> step_done_ = 0;
  std::atomic<uint64_t> progress_ = 0;  // rises with each part of what makes this rank ready

  // Before mutex_. Held from the decision to tell a loss until that is sent, and while a loss is
  // settled: the news must not come behind Aborted, where it would be of the next group.
  Mutex report_mutex_;
  Mutex mutex_;
  CondVar changed_;
  std::shared_ptr<WorkQueueClient> queue_ GUARDED_BY(mutex_);
  Work work_ GUARDED_BY(mutex_) = Work::kNone;  // on what came from the queue last
  bool stopping_ GUARDED_BY(mutex_) = false;
  bool ended_ GUARDED_BY(mutex_) = false;
  absl::Status step_error_ GUARDED_BY(mutex_);

  uint64_t group_epoch_ GUARDED_BY(mutex_) = 0;  // of the group that it is in or joins; 0: none
  std::set<uint64_t> interrupted_ GUARDED_BY(mutex_);  // epochs whose AbortGroup is on its way
  bool stream_has_ended_ GUARDED_BY(mutex_) = false;
  // Of a group whose AbortGroup has not come yet.
  struct Loss {
    std::chrono::steady_clock::time_point at;
    std::string reason;
    bool is_told = false;
  };
  std::optional<Loss> loss_ GUARDED_BY(mutex_);
  bool waited_too_long_ GUARDED_BY(mutex_) = false;

  StepFinisher finisher_;  // last: its thread calls Report
};

}  // namespace wintserve
