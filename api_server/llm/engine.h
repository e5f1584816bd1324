// The engine's thread: owns the scheduler and every open request, and talks to workers and cache
// manager.
#pragma once

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
#include "api_server/llm/inbox.h"
#include "api_server/llm/llm_factory.h"
#include "api_server/llm/metrics.h"
#include "api_server/llm/pool_lifecycle.h"
#include "api_server/llm/request_output.h"
#include "api_server/llm/startup.h"
#include "api_server/llm/step_tracker.h"
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
  // Tells the workers to exit, fails every open request, joins the threads.
  ~Engine();

  // UNAVAILABLE: not ready, with the reason, or shutting down.
  absl::Status Submit(std::unique_ptr<ActiveRequest> request);
  void Cancel(uint64_t request_id);
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
  struct WorkerDetached {
    uint32_t rank;
    PoolDetachedMessage detached;
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
  struct Broken {  // a worker or the cache manager, for good
    std::string reason;
  };
  struct StopEngine {};
  using Event = std::variant<Arrival, Cancellation, WorkerAttached, WorkerReady, WorkerDetached,
                             WorkerStepDone, CacheConnected, PoolOpened, CacheAnswer,
                             BlocksAvailable, CacheLost, Broken, StopEngine>;

  Engine(EngineConfig config, EngineMetrics* metrics);
  absl::Status Open();
  WorkQueueEvents WorkerEvents();
  CacheEvents CacheManagerEvents();

  void Run();
  void Handle(Arrival event);
  void Handle(Cancellation event);
  void Handle(WorkerAttached event);
  void Handle(WorkerReady event);
  void Handle(WorkerDetached event);
  void Handle(WorkerStepDone event);
  void Handle(CacheConnected event);
  void Handle(PoolOpened event);
  void Handle(const CacheAnswer& event);
  void Handle(BlocksAvailable event);
  void Handle(const CacheLost& event);
  void Handle(const Broken& event);
  void Handle(StopEngine event);

  // The pool: engine_pool.cc.
  void AdvancePool();
  void Perform(PoolLifecycle::Action action);
  void UseNewPool();
  SchedulerConfig SchedulerConfigOf(const OpenedPool& pool) const;
  void RecordFacts();
  void BecomeReady();
  void ReconcileSession();
  void SendToCache(std::vector<CacheCommand> commands);

  // Steps.
  void FinishSteps();
  void TakeToken(const SequenceToken& news, int64_t now_us);
  void Schedule();
  void SendPlan(StepPlan plan);
  void TakeStart(const SequenceStart& start, int64_t now_us);
  std::optional<std::chrono::steady_clock::time_point> NextDeadline() const;

  void DeliverUpdates();
  void FailRequest(uint64_t request_id, const absl::Status& error);
  void FailAll(const absl::Status& error);  // and no plan is made any more
  // Ends serving: not ready, open requests fail, on_fatal is told once.
  void Fatal(const std::string& reason);
  void SetReadiness(bool ready, const std::string& reason) EXCLUDES(readiness_mutex_);

  const EngineConfig config_;
  EngineMetrics* const metrics_;
  Inbox<Event> inbox_;

  // Of the engine's thread.
  GroupStartup startup_;
  PoolLifecycle pool_;
  std::unique_ptr<CacheClient> cache_;    // null while there is no session
  uint32_t num_blocks_available_ = 0;     // at the cache manager, as last told
  std::unique_ptr<Scheduler> scheduler_;  // null before the engine is ready
  StepTracker steps_;
  std::map<uint64_t, std::unique_ptr<ActiveRequest>> requests_;
  std::vector<uint64_t> updated_;         // requests with news to deliver
  std::optional<int64_t> step_ended_us_;  // within this turn of the loop
  uint64_t last_plan_hash_ = 0;
  bool configured_ = false;
  bool failed_ = false;
  bool stopping_ = false;

  mutable Mutex readiness_mutex_;
  ReadinessReport readiness_ GUARDED_BY(readiness_mutex_);
  EngineLimits limits_ GUARDED_BY(readiness_mutex_);

  std::unique_ptr<WorkQueueServer> work_queue_;
  std::unique_ptr<CacheLink> cache_link_;
  std::thread thread_;
};

}  // namespace wintserve
