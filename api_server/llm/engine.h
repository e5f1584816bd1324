// The engine's thread: owns the scheduler and every open request, and talks to workers and cache
// manager.
#pragma once

#include <chrono>
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
#include "api_server/llm/inbox.h"
#include "api_server/llm/llm_factory.h"
#include "api_server/llm/metrics.h"
#include "api_server/llm/request_output.h"
#include "api_server/llm/startup.h"
#include "api_server/scheduler/scheduler.h"
#include "api_server/work_queue/server/work_queue_server.h"
#include "cache_manager/client/cache_client.h"
#include "common/mutex.h"

namespace wintserve {

struct EngineConfig {
  WorkQueueServerOptions work_queue;
  StartupConfig startup;
  std::vector<int32_t> eos_ids;
  CacheConnector connect_cache;
  std::function<void()> on_ready;                           // see LlmOptions
  std::function<void(const std::string& reason)> on_fatal;  // see LlmOptions
};

// One open request, from Submit to its last update.
struct ActiveRequest {
  using TimePoint = std::chrono::steady_clock::time_point;

  ActiveRequest(ScheduledRequest scheduled_in, RequestOutput output_in)
      : scheduled(std::move(scheduled_in)), output(std::move(output_in)) {}

  ScheduledRequest scheduled;
  RequestOutput output;
  TimePoint arrived = std::chrono::steady_clock::now();
  std::optional<TimePoint> started;  // its first prefill was planned
  std::optional<TimePoint> first_token;
  std::map<uint32_t, TimePoint> last_token;  // by choice
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
  using TimePoint = ActiveRequest::TimePoint;
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
  struct WorkerStepDone {
    uint32_t rank;
    StepDone done;
  };
  struct WorkerLost {
    std::string reason;
  };
  struct CacheConnected {
    std::unique_ptr<CacheClient> client;
  };
  struct PoolOpened {
    absl::StatusOr<OpenedPool> pool;
  };
  struct BlocksLeased {
    uint64_t tag;
    std::vector<PoolBlock> blocks;
  };
  struct CacheLost {
    absl::Status status;
  };
  struct StopEngine {};
  using Event =
      std::variant<Arrival, Cancellation, WorkerAttached, WorkerReady, WorkerStepDone, WorkerLost,
                   CacheConnected, PoolOpened, BlocksLeased, CacheLost, StopEngine>;

  // The plan that the workers run.
  struct StepInFlight {
    uint64_t step = 0;
    uint64_t plan_hash = 0;
    int num_tokens = 0;
    int num_sequences = 0;
    TimePoint sent = {};
    std::vector<std::optional<StepDone>> done = {};  // by rank
    uint32_t num_done = 0;
  };

  Engine(EngineConfig config, EngineMetrics* metrics);
  absl::Status Open();
  WorkQueueEvents WorkerEvents();
  CacheEvents CacheManagerEvents();
  void ConnectCache();

  void Run();
  void Handle(Arrival event);
  void Handle(Cancellation event);
  void Handle(WorkerAttached event);
  void Handle(WorkerReady event);
  void Handle(WorkerStepDone event);
  void Handle(WorkerLost event);
  void Handle(CacheConnected event);
  void Handle(PoolOpened event);
  void Handle(BlocksLeased event);
  void Handle(CacheLost event);
  void Handle(StopEngine event);

  void AdvanceStartup();
  void BecomeReady();
  void FinishStep();
  absl::Status CheckRanksAgree() const;
  void TakeToken(const SequenceToken& news, TimePoint now);
  void Schedule();
  void SendPlan(StepPlan plan);
  void DeliverUpdates();
  void FailRequest(uint64_t request_id, const absl::Status& error);
  void FailAll(const absl::Status& error);
  // Ends serving: not ready, open requests fail, on_fatal is told once.
  void Fatal(const std::string& reason);
  void SetReadiness(bool ready, const std::string& reason) EXCLUDES(readiness_mutex_);

  const EngineConfig config_;
  EngineMetrics* const metrics_;
  Inbox<Event> inbox_;

  // Of the engine's thread.
  GroupStartup startup_;
  std::unique_ptr<CacheClient> cache_;
  std::unique_ptr<Scheduler> scheduler_;  // null before the engine is ready
  std::map<uint64_t, std::unique_ptr<ActiveRequest>> requests_;
  std::vector<uint64_t> updated_;  // requests with news to deliver
  std::optional<StepInFlight> step_;
  std::optional<TimePoint> last_step_ended_;  // within this turn of the loop
  uint64_t last_plan_hash_ = 0;
  bool configured_ = false;
  bool pool_requested_ = false;
  bool failed_ = false;
  bool stopping_ = false;

  mutable Mutex readiness_mutex_;
  ReadinessReport readiness_ GUARDED_BY(readiness_mutex_);
  EngineLimits limits_ GUARDED_BY(readiness_mutex_);

  Mutex stop_mutex_;
  CondVar stop_wanted_;
  bool stop_connecting_ GUARDED_BY(stop_mutex_) = false;

  std::unique_ptr<WorkQueueServer> work_queue_;
  std::thread cache_connector_;
  std::thread thread_;
};

}  // namespace wintserve
