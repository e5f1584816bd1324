#include "api_server/llm/engine.h"

#include <fmt/core.h>

#include <algorithm>
#include <chrono>
#include <random>
#include <utility>

#include "common/check.h"
#include "common/log.h"
#include "common/status_macros.h"

namespace wintserve {
namespace {

using std::chrono::steady_clock;

constexpr int64_t kWorkerExitGraceMs = 2'000;

double Seconds(int64_t microseconds) { return static_cast<double>(microseconds) / 1e6; }

int64_t MicrosecondsOf(steady_clock::time_point time) {
  return std::chrono::duration_cast<std::chrono::microseconds>(time.time_since_epoch()).count();
}

std::string TextOf(const absl::Status& status) { return std::string(status.message()); }

// Not 0, which stands for "none" in a message that lacks the field.
uint64_t RandomEpoch() {
  std::random_device random;
  return (uint64_t{random()} << 32 | random()) | 1;
}

}  // namespace

int64_t EngineNowUs() { return MicrosecondsOf(steady_clock::now()); }

Engine::Engine(EngineConfig config, EngineMetrics* metrics)
    : config_(std::move(config)),
      metrics_(metrics),
      api_epoch_(RandomEpoch()),
      startup_(config_.startup),
      group_(config_.startup.world_size, RandomEpoch),
      pool_(config_.startup.world_size),
      steps_(config_.startup.world_size, /*group_epoch=*/0),
      beats_(std::make_unique<Beats[]>(config_.startup.world_size)),
      is_silent_(config_.startup.world_size) {
  SetReadiness({.reason = group_.WaitingFor()});
}

absl::StatusOr<std::unique_ptr<Engine>> Engine::Start(EngineConfig config, EngineMetrics* metrics) {
  std::unique_ptr<Engine> engine(new Engine(std::move(config), metrics));
  RETURN_IF_ERROR(engine->Open());
  return engine;
}

absl::Status Engine::Open() {
  ASSIGN_OR_RETURN(work_queue_, WorkQueueServer::Start(config_.work_queue, WorkerEvents()));
  cache_link_ = std::make_unique<CacheLink>(CacheLinkOptions{
      .connect = config_.connect_cache,
      .api_epoch = api_epoch_,
      .events = CacheManagerEvents(),
      .on_connected =
          [this](std::unique_ptr<CacheClient> client) {
            inbox_.Push(CacheConnected{std::move(client)});
          },
      .on_refused =
          [this](const absl::Status& status) {
            inbox_.Push(
                Broken{fmt::format("no session with the cache manager: {}", TextOf(status))});
          },
      .on_hang = config_.on_cache_hang});
  if (config_.watch_workers) processes_ = config_.watch_workers(ProcessEvents());
  thread_ = std::thread([this] { Run(); });
  return absl::OkStatus();
}

Engine::~Engine() {
  if (!thread_.joinable()) return;  // Open failed
  Stop();
  thread_.join();
  processes_.reset();
  cache_link_.reset();
  work_queue_->Stop(config_.leaves_workers ? 0 : kWorkerExitGraceMs);
  cache_.reset();
}

// gRPC's and the cache client's threads only push.
WorkQueueEvents Engine::WorkerEvents() {
  return {
      .on_hello = [this](const WorkerHello& hello) { inbox_.Push(WorkerAttached{hello}); },
      .on_ready =
          [this](uint32_t rank, const ReadyMessage& ready) {
            inbox_.Push(WorkerReady{rank, ready});
          },
      .on_step_done =
          [this](uint32_t rank, StepDone done) {
            inbox_.Push(WorkerStepDone{rank, std::move(done)});
          },
      .on_heartbeat = [this](uint32_t rank, const HeartbeatMessage& beat) { TakeBeat(rank, beat); },
      .on_pool_detached =
          [this](uint32_t rank, const PoolDetachedMessage& detached) {
            inbox_.Push(WorkerLetGo{rank, detached});
          },
      .on_fault =
          [this](uint32_t rank, const FaultMessage& fault) {
            inbox_.Push(WorkerFault{rank, fault});
          },
      .on_aborted =
          [this](uint32_t rank, const AbortedMessage& aborted) {
            inbox_.Push(WorkerAborted{rank, aborted});
          },
      .on_detached =
          [this](uint32_t rank, uint64_t /*worker_id*/, const absl::Status& status) {
            inbox_.Push(WorkerStreamEnded{rank, TextOf(status)});
          },
      .on_refused =
          [](const std::string& reason) { LOG_ERROR("refused an engine worker: {}", reason); },
  };
}

CacheEvents Engine::CacheManagerEvents() {
  const auto push = [this](std::function<void(Scheduler*)> deliver) {
    inbox_.Push(CacheAnswer{std::move(deliver)});
  };
  return {
      .on_opened =
          [this](absl::StatusOr<OpenedPool> pool) { inbox_.Push(PoolOpened{std::move(pool)}); },
      .on_peeked =
          [push](uint64_t tag, PeekResult result) {
            push([tag, result](Scheduler* scheduler) { scheduler->OnPeeked(tag, result); });
          },
      .on_matched =
          [push](uint64_t tag, MatchResult result) {
            push([tag, result = std::move(result)](Scheduler* scheduler) mutable {
              scheduler->OnMatched(tag, std::move(result));
            });
          },
      .on_leased =
          [push](uint64_t tag, std::vector<PoolBlock> blocks) {
            push([tag, blocks = std::move(blocks)](Scheduler* scheduler) mutable {
              scheduler->OnLeased(tag, std::move(blocks));
            });
          },
      .on_committed =
          [push](uint64_t tag, std::vector<CommittedBlock> blocks) {
            push([tag, blocks = std::move(blocks)](Scheduler* scheduler) {
              scheduler->OnCommitted(tag, blocks);
            });
          },
      .on_copy_out =
          [push](std::vector<CopyOrder> copies) {
            push([copies = std::move(copies)](Scheduler* scheduler) mutable {
              scheduler->OnCopyOut(std::move(copies));
            });
          },
      .on_available = [this](uint32_t count) { inbox_.Push(BlocksAvailable{count}); },
      .on_closed = [this](absl::Status status) { inbox_.Push(CacheLost{std::move(status)}); },
  };
}

WorkerProcessEvents Engine::ProcessEvents() {
  return {.on_watching = [this](bool watching) { inbox_.Push(ExitsAreTold{watching}); },
          .on_exit =
              [this](uint32_t rank, uint64_t worker_id, bool kv_trusted, const std::string& text) {
                inbox_.Push(WorkerExited{rank, worker_id, kv_trusted, text});
              }};
}

absl::Status Engine::Submit(std::unique_ptr<ActiveRequest> request) {
  const ReadinessReport readiness = Readiness();
  if (!readiness.ready && !readiness.is_recovering)
    return absl::UnavailableError("not ready: " + readiness.reason);
  if (!inbox_.Push(Arrival{std::move(request)})) return absl::UnavailableError("shutting down");
  return absl::OkStatus();
}

void Engine::Stop() { inbox_.Push(StopEngine{}); }

void Engine::Cancel(uint64_t request_id) { inbox_.Push(Cancellation{request_id}); }

ReadinessReport Engine::Readiness() const {
  MutexLock lock(&readiness_mutex_);
  return readiness_;
}

EngineLimits Engine::limits() const {
  MutexLock lock(&readiness_mutex_);
  return limits_;
}

void Engine::SetReadiness(ReadinessReport report) {
  MutexLock lock(&readiness_mutex_);
  readiness_ = std::move(report);
}

void Engine::Run() {
  while (!stopping_) {
    const std::optional<steady_clock::time_point> deadline = NextDeadline();
    std::vector<Event> events = inbox_.WaitAndTake(deadline);
    late_us_ = deadline.has_value() ? EngineNowUs() - MicrosecondsOf(*deadline) : 0;
    for (Event& event : events) {
      std::visit([this](auto& body) { Handle(std::move(body)); }, event);
    }
    if (stopping_ || failed_) continue;
    Advance();
    if (!failed_ && scheduler_ != nullptr) {
      Schedule();
      DeliverUpdates();
      step_ended_us_.reset();
      metrics_->RecordState(scheduler_->stats());
    }
  }
  SetReadiness({.reason = "shutting down"});
  const absl::Status error = absl::UnavailableError("the server is shutting down");
  for (Event& event : inbox_.Close()) {
    if (auto* arrival = std::get_if<Arrival>(&event)) arrival->request->output.Fail(error);
  }
  FailAll(error);
  if (!config_.leaves_workers) work_queue_->Send(ShutdownWorker{});
  if (cache_ != nullptr) cache_->Close();
}

void Engine::Advance() {
  const int64_t now_us = EngineNowUs();
  CheckStepDeadline(now_us);
  CheckHeartbeats(now_us);
  CheckStall(now_us);
  CheckDetach(now_us);
  // No plan is to come first, and whoever has finished must not be failed below.
  if (!group_.in_use()) DeliverUpdates();
  while (!failed_ && (AdvanceGroup() || AdvancePool())) {
  }
  if (failed_) return;
  if (scheduler_ != nullptr) {
    scheduler_->SetPaused(pool_paused_ || !group_.in_use());
    if (scheduler_->isolated() != poison_guard_.isolated()) {
      scheduler_->SetIsolated(poison_guard_.isolated());
    }
    FailHeldRequests(now_us);
  }
  ReportReadiness();
}

std::optional<steady_clock::time_point> Engine::NextDeadline() const {
  if (failed_) return std::nullopt;
  std::optional<int64_t> deadline_us = NextGroupDeadlineUs();
  if (scheduler_ != nullptr) {
    const std::optional<int64_t> scheduler_us = scheduler_->NextDeadlineUs();
    if (scheduler_us.has_value()) {
      deadline_us = std::min(*scheduler_us, deadline_us.value_or(*scheduler_us));
    }
  }
  if (!deadline_us.has_value()) return std::nullopt;
  return steady_clock::time_point(std::chrono::microseconds(*deadline_us));
}

void Engine::Handle(Arrival event) {
  ActiveRequest& request = *event.request;
  if (failed_) return request.output.Fail(absl::UnavailableError(Readiness().reason));
  const uint64_t id = request.scheduled.id;
  const int max_tokens = request.scheduled.max_tokens;
  if (absl::Status status = scheduler_->Submit(std::move(request.scheduled), EngineNowUs());
      !status.ok()) {
    return request.output.Fail(status);
  }
  metrics_->RecordArrival(request.output.num_prompt_tokens(), max_tokens);
  request.output.Accept();
  requests_[id] = std::move(event.request);
}

void Engine::Handle(Cancellation event) {
  if (requests_.erase(event.request_id) == 0) return;
  scheduler_->Cancel(event.request_id);
  poison_guard_.OnEnded(event.request_id);
}

void Engine::FinishSteps() {
  for (;;) {
    const int64_t now_us = EngineNowUs();
    absl::StatusOr<std::optional<FinishedStep>> finished = steps_.TakeFinished(now_us);
    if (!finished.ok()) {
      return GroupFault(FaultCause::kDivergence, /*kv_trusted=*/false, TextOf(finished.status()));
    }
    if (!finished->has_value()) return;
    FinishedStep& step = **finished;
    last_acknowledged_step_ = step.step;
    step_deadline_.OnFinished(step.shape, step.running_us);
    metrics_->RecordStep(Seconds(step.latency_us), Seconds(step.execute_us), step.num_sequences,
                         step.num_tokens);
    step_ended_us_ = now_us;
    absl::StatusOr<std::vector<SequenceToken>> tokens = scheduler_->OnStepDone(
        step.step, step.sampled, step.running_us, now_us, std::move(step.prompt_logprobs));
    if (!tokens.ok()) {
      return GroupFault(FaultCause::kDivergence, /*kv_trusted=*/false,
                        fmt::format("engine worker 0 is out of step: {}", TextOf(tokens.status())));
    }
    metrics_->RecordGeneratedTokens(static_cast<int>(tokens->size()));
    for (SequenceToken& news : *tokens) TakeToken(std::move(news), now_us);
  }
}

void Engine::TakeToken(SequenceToken news, int64_t now_us) {
  const SequenceKey key = news.sequence;
  const auto found = requests_.find(key.request);
  CHECK(found != requests_.end(), "request={}", key.request);
  ActiveRequest& request = *found->second;
  if (!request.first_token_us.has_value()) {
    request.first_token_us = now_us;
    metrics_->RecordFirstToken(Seconds(now_us - request.arrived_us),
                               Seconds(now_us - *request.started_us));
  }
  const auto [last, is_first] = request.last_token_us.try_emplace(key.choice, now_us);
  if (!is_first) metrics_->RecordNextToken(Seconds(now_us - std::exchange(last->second, now_us)));
  poison_guard_.OnToken(key.request);
  // Before the next plan is made: a choice that met its stop string gets no further row.
  if (request.output.Append(std::move(news))) scheduler_->Cancel(key);
  if (updated_.empty() || updated_.back() != key.request) updated_.push_back(key.request);
}

void Engine::Schedule() {
  bool planned = true;
  while (planned) {
    SchedulerOutput output = scheduler_->Schedule(EngineNowUs());
    planned = output.plan.has_value();
    SendToCache(std::move(output.cache));
    if (planned) SendPlan(*std::move(output.plan));
    const int64_t now_us = EngineNowUs();
    for (const SequenceStart& start : output.started) TakeStart(start, now_us);
    for (const SequenceFailure& failure : output.failed) {
      FailRequest(failure.sequence.request, failure.error);
    }
  }
}

void Engine::SendPlan(StepPlan plan) {
  plan.group_epoch = group_.epoch();
  plan.pool_epoch = pool_.pool().pool_epoch;
  plan.previous_plan_hash = last_plan_hash_;
  last_plan_hash_ = work_queue_->SendPlan(plan);
  const int64_t now_us = EngineNowUs();
  steps_.Add(plan, last_plan_hash_, now_us);
  if (step_ended_us_.has_value()) metrics_->RecordSchedule(Seconds(now_us - *step_ended_us_));
  step_ended_us_.reset();
}

void Engine::TakeStart(const SequenceStart& start, int64_t now_us) {
  const auto found = requests_.find(start.sequence.request);
  if (found == requests_.end()) return;
  ActiveRequest& request = *found->second;
  if (start.sequence.choice == 0) {
    request.output.set_num_cached_tokens(start.num_cached_tokens);
    metrics_->RecordCacheLookup(start.num_cached_tokens > 0);
  }
  if (request.started_us.has_value()) return;
  request.started_us = now_us;
  metrics_->RecordStart(Seconds(now_us - request.arrived_us));
}

// After the next plan has been sent: the workers compute meanwhile.
void Engine::DeliverUpdates() {
  for (const uint64_t id : std::exchange(updated_, {})) {
    const auto found = requests_.find(id);
    if (found == requests_.end()) continue;  // cancelled in the same turn, or failed
    ActiveRequest& request = *found->second;
    request.output.Deliver();
    if (!request.output.finished()) continue;
    const int64_t now_us = EngineNowUs();
    metrics_->RecordSuccess(
        Seconds(now_us - request.arrived_us), Seconds(now_us - *request.started_us),
        Seconds(now_us - *request.first_token_us), request.output.num_prompt_tokens(),
        request.output.num_completion_tokens());
    poison_guard_.OnEnded(id);
    requests_.erase(found);
  }
}

void Engine::FailRequest(uint64_t request_id, const absl::Status& error) {
  const auto found = requests_.find(request_id);
  if (found == requests_.end()) return;
  scheduler_->Cancel(request_id);
  poison_guard_.OnEnded(request_id);
  found->second->output.Fail(error);
  requests_.erase(found);
}

void Engine::FailAll(const absl::Status& error) {
  DeliverUpdates();  // some may have finished
  // First, so that a client who has seen the error finds nothing running in /metrics.
  if (scheduler_ != nullptr) metrics_->RecordStop(scheduler_->stats());
  for (auto& [id, request] : std::exchange(requests_, {})) request->output.Fail(error);
}

void Engine::Handle(const Broken& event) { Fatal(event.reason); }

void Engine::Handle(StopEngine) { stopping_ = true; }

void Engine::Fatal(const std::string& reason) {
  if (failed_ || stopping_) return;
  failed_ = true;
  LOG_ERROR("the engine stops: {}", reason);
  SetReadiness({.reason = reason});
  FailAll(absl::UnavailableError(reason));
  if (config_.on_fatal) config_.on_fatal(reason);
}

}  // namespace wintserve
