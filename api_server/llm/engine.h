// The engine's thread: owns the scheduler and every open request, and talks to workers, cache
// manager and launcher.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "api_server/llm/cache_link.h"
#include "api_server/llm/group_lifecycle.h"
#include "api_server/llm/inbox.h"
#include "api_server/llm/llm_factory.h"
#include "api_server/llm/metrics.h"
#include "api_server/llm/poison_guard.h"
#include "api_server/llm/pool_lifecycle.h"
#include "api_server/llm/request_output.h"
#include "api_server/llm/startup.h"
#include "api_server/llm/step_deadline.h"
#include "api_server/llm/step_tracker.h"
#include "api_server/llm/worker_processes.h"
#include "api_server/scheduler/scheduler.h"
#include "api_server/work_queue/server/work_queue_server.h"
#include "cache_manager/client/cache_client.h"
#include "common/mutex.h"

namespace wintserve {

struct EngineConfig {
  WorkQueueServerOptions work_queue;
  StartupConfig startup;
  // Policy and limits; what only the workers and the pool can tell is filled in.
  SchedulerConfig scheduler;
  CacheConnector connect_cache;
  WorkerProcessWatcher watch_workers;  // see LlmOptions
  // How long a request waits for a rank group, see LlmOptions.
  int64_t fault_hold_ms = 60'000;
  bool leaves_workers = false;  // see LlmOptions
  // Ranks that are to get ready get further within this time; 0: there is no limit.
  int64_t stall_timeout_ms = 300'000;
  StepDeadlineLimits step_deadline = {};
  std::function<void()> on_ready;                           // see LlmOptions
  std::function<void()> on_cache_hang;                      // see LlmOptions
  std::function<void(const std::string& reason)> on_fatal;  // see LlmOptions
};

// The engine's clock, microseconds.
int64_t EngineNowUs();

// One open request, from Submit to its last update. Times are of the engine's clock.
struct ActiveRequest {
  ActiveRequest(ScheduledRequest scheduled_in, RequestOutput output_in)
      : scheduled(std::move(scheduled_in)), output(std::move(output_in)) {}

  ScheduledRequest scheduled;
  RequestOutput output;
  int64_t arrived_us = EngineNowUs();
  std::optional<int64_t> started_us;  // its first prefill was planned
  std::optional<int64_t> first_token_us;
  std::map<uint32_t, int64_t> last_token_us;  // by choice
};

// What the engine knows once it is ready; fixed from then on.
struct EngineLimits {
  int max_model_len = 0;
  int vocab_size = 0;  // ids at and above are unknown to the model
};

// Threading: any thread may call; nothing blocks on the engine.
class Engine {
 public:
  // UNAVAILABLE: the work queue cannot listen. `metrics` outlives the engine.
  static absl::StatusOr<std::unique_ptr<Engine>> Start(EngineConfig config, EngineMetrics* metrics);
  // Stop(), and joins the threads.
  ~Engine();

  // UNAVAILABLE: was not ready yet or can serve no more, with the reason, or is shutting down.
  absl::Status Submit(std::unique_ptr<ActiveRequest> request);
  void Cancel(uint64_t request_id);
  // Fails every open request, and tells the workers to exit or leaves them. Does not wait for it.
  void Stop();
  ReadinessReport Readiness() const EXCLUDES(readiness_mutex_);
  // Zeros before the engine was ready for the first time.
  EngineLimits limits() const EXCLUDES(readiness_mutex_);

 private:
  struct Arrival {
    std::unique_ptr<ActiveRequest> request;
  };
  struct Cancellation {
    uint64_t request_id;
  };
  struct WorkerAttached {
    WorkerHello hello;
  };
  struct WorkerReady {
    uint32_t rank;
    ReadyMessage ready;
  };
  struct WorkerLetGo {  // of a pool
    uint32_t rank;
    PoolDetachedMessage detached;
  };
  struct WorkerAborted {
    uint32_t rank;
    AbortedMessage aborted;
  };
  struct WorkerFault {
    uint32_t rank;
    FaultMessage fault;
  };
  struct WorkerStreamEnded {
    uint32_t rank;
    std::string reason;
  };
  struct WorkerExited {
    uint32_t rank;
    uint64_t worker_id;
    bool kv_trusted;
    std::string text;
  };
  struct ExitsAreTold {
    bool watching;
  };
  struct WorkerStepDone {
    uint32_t rank;
    StepDone done;
  };
  struct CacheConnected {
    std::unique_ptr<CacheClient> client;
  };
  struct PoolOpened {
    absl::StatusOr<OpenedPool> pool;
  };
  // Called with the scheduler, which is there: no answer comes before a pool.
  struct CacheAnswer {
    std::function<void(Scheduler*)> deliver;
  };
  struct BlocksAvailable {
    uint32_t count;
  };
  struct CacheLost {
    absl::Status status;
  };
  struct Broken {  // the cache manager, for good
    std::string reason;
  };
  struct StopEngine {};
  using Event = std::variant<Arrival, Cancellation, WorkerAttached, WorkerReady, WorkerLetGo,
                             WorkerAborted, WorkerFault, WorkerStreamEnded, WorkerExited,
                             ExitsAreTold, WorkerStepDone, CacheConnected, PoolOpened, CacheAnswer,
                             BlocksAvailable, CacheLost, Broken, StopEngine>;

  Engine(EngineConfig config, EngineMetrics* metrics);
  absl::Status Open();
  WorkQueueEvents WorkerEvents();
  CacheEvents CacheManagerEvents();
  WorkerProcessEvents ProcessEvents();

  void Run();
  // Does what has become possible with group and pool, and says what is missing.
  void Advance();
  void Handle(Arrival event);
  void Handle(Cancellation event);
  void Handle(const WorkerAttached& event);
  void Handle(WorkerReady event);
  void Handle(WorkerLetGo event);
  void Handle(WorkerAborted event);
  void Handle(WorkerFault event);
  void Handle(const WorkerStreamEnded& event);
  void Handle(const WorkerExited& event);
  void Handle(ExitsAreTold event);
  void Handle(WorkerStepDone event);
  void Handle(CacheConnected event);
  void Handle(PoolOpened event);
  void Handle(const CacheAnswer& event);
  void Handle(BlocksAvailable event);
  void Handle(const CacheLost& event);
  void Handle(const Broken& event);
  void Handle(StopEngine event);

  // The rank group: engine_group.cc.
  bool AdvanceGroup();  // false: there is nothing to do
  void Perform(GroupLifecycle::Action action);
  void GroupFault(FaultCause cause, bool kv_trusted, const std::string& text);
  void EndWorker(uint32_t rank, uint64_t worker_id, bool at_fault);
  void LoseGroup();
  // What ran in the lost group is computed again.
  void DistrustGroup();
  // What the last steps have written, and all that were not acknowledged, may be wrong.
  void DistrustLastSteps();
  void SuspectRequests(const std::vector<uint64_t>& in_flight);
  void CheckStepDeadline(int64_t now_us);
  void CheckHeartbeats(int64_t now_us);
  void TakeBeat(uint32_t rank, const HeartbeatMessage& beat);  // on gRPC's threads
  void CheckStall(int64_t now_us);
  std::optional<int64_t> NextStallUs() const;
  void CheckDetach(int64_t now_us);
  std::optional<int64_t> NextDetachLimitUs() const;
  void FailHeldRequests(int64_t now_us);
  std::optional<int64_t> NextHoldEndUs() const;
  std::optional<int64_t> NextGroupDeadlineUs() const;
  void ReportReadiness();

  // The pool: engine_pool.cc.
  bool AdvancePool();  // false: there is nothing to do
  void Perform(PoolLifecycle::Action action);
  void OpenPool(PoolLifecycle::Action action);
  // False: it has been tried for long enough.
  bool RetryOpening(const absl::Status& refusal);
  void UseNewPool();
  SchedulerConfig SchedulerConfigOf(const OpenedPool& pool) const;
  void RecordFacts();
  void BecomeReady();
  void ReconcileSession();
  void SendToCache(std::vector<CacheCommand> commands);

  // Steps.
  void FinishSteps();
  void TakeToken(SequenceToken news, int64_t now_us);
  void Schedule();
  void SendPlan(StepPlan plan);
  void TakeStart(const SequenceStart& start, int64_t now_us);
  std::optional<std::chrono::steady_clock::time_point> NextDeadline() const;

  void DeliverUpdates();
  void FailRequest(uint64_t request_id, const absl::Status& error);
  void FailAll(const absl::Status& error);  // and no plan is made any more
  // Ends serving: not ready, open requests fail, on_fatal is told once.
  void Fatal(const std::string& reason);
  void SetReadiness(ReadinessReport report) EXCLUDES(readiness_mutex_);

  const EngineConfig config_;
  EngineMetrics* const metrics_;
  Inbox<Event> inbox_;

  // Of the engine's thread.
  const uint64_t api_epoch_;
  GroupStartup startup_;
  GroupLifecycle group_;
  PoolLifecycle pool_;
  std::unique_ptr<CacheClient> cache_;    // null while there is no session
  uint32_t num_blocks_available_ = 0;     // at the cache manager, as last told
  std::unique_ptr<Scheduler> scheduler_;  // null before the engine is ready
  StepTracker steps_;                     // of the present rank group
  StepDeadline step_deadline_{config_.step_deadline};
  PoisonGuard poison_guard_;
  // Of this pool, and what every session that resumes it is told.
  std::optional<uint64_t> first_distrusted_step_;
  bool pool_paused_ = false;
  bool is_reported_ready_ = false;
  int64_t late_us_ = 0;                  // by which this turn of the loop began after its deadline
  uint64_t first_step_ = 0;              // of this API server; 0: none was planned yet
  uint64_t last_acknowledged_step_ = 0;  // of any group
  // Of a pool that the session of an API server which has just died still holds.
  std::optional<int64_t> first_opening_try_us_;
  std::optional<int64_t> next_opening_try_us_;
  std::map<uint64_t, std::unique_ptr<ActiveRequest>> requests_;
  std::vector<uint64_t> updated_;         // requests with news to deliver
  std::optional<int64_t> step_ended_us_;  // within this turn of the loop
  uint64_t last_plan_hash_ = 0;
  bool failed_ = false;
  bool stopping_ = false;

  mutable Mutex readiness_mutex_;
  ReadinessReport readiness_ GUARDED_BY(readiness_mutex_);
  EngineLimits limits_ GUARDED_BY(readiness_mutex_);

  // By rank: its last heartbeat, and the last one that told of progress; and whether its silence
  // has been logged.
  struct Beats {
    std::atomic<int64_t> last_us = 0;
    std::atomic<int64_t> progress_us = 0;
    std::atomic<uint64_t> progress = 0;
  };
  std::unique_ptr<Beats[]> beats_;
  std::vector<bool> is_silent_;
  int64_t attach_us_ = 0;  // ranks were sent the pool, or one of them has got ready
  int64_t detach_us_ = 0;  // a rank was told to let go of a pool, or one has

  std::unique_ptr<WorkQueueServer> work_queue_;
  std::unique_ptr<WorkerProcesses> processes_;  // null: no launcher in reach, ever
  std::unique_ptr<CacheLink> cache_link_;
  std::thread thread_;
};

}  // namespace wintserve
