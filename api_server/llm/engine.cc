#include "api_server/llm/engine.h"

#include <fmt/core.h>

#include <algorithm>
#include <utility>

#include "common/check.h"
#include "common/log.h"
#include "common/status_macros.h"

namespace wintserve {
namespace {

using std::chrono::steady_clock;

constexpr int64_t kWorkerExitGraceMs = 2'000;

double Seconds(steady_clock::duration duration) {
  return std::chrono::duration<double>(duration).count();
}

std::string TextOf(const absl::Status& status) { return std::string(status.message()); }

const char* NameOf(FaultKind kind) {
  switch (kind) {
    case FaultKind::kCheckpoint:
      return "checkpoint";
    case FaultKind::kOutOfMemory:
      return "out of memory";
    case FaultKind::kCollective:
      return "collective";
    case FaultKind::kDevice:
      return "device";
    case FaultKind::kInternal:
      return "internal";
  }
  return "unknown";
}

std::vector<PoolBlock> ToPoolBlocks(const std::vector<LeasedBlock>& blocks) {
  std::vector<PoolBlock> out;
  out.reserve(blocks.size());
  for (const LeasedBlock& block : blocks) {
    out.push_back({static_cast<int32_t>(block.id), block.generation});
  }
  return out;
}

}  // namespace

Engine::Engine(EngineConfig config, EngineMetrics* metrics)
    : config_(std::move(config)), metrics_(metrics), startup_(config_.startup) {
  SetReadiness(false, startup_.WaitingFor());
}

absl::StatusOr<std::unique_ptr<Engine>> Engine::Start(EngineConfig config, EngineMetrics* metrics) {
  std::unique_ptr<Engine> engine(new Engine(std::move(config), metrics));
  RETURN_IF_ERROR(engine->Open());
  return engine;
}

absl::Status Engine::Open() {
  ASSIGN_OR_RETURN(work_queue_, WorkQueueServer::Start(config_.work_queue, WorkerEvents()));
  thread_ = std::thread([this] { Run(); });
  cache_connector_ = std::thread([this] { ConnectCache(); });
  return absl::OkStatus();
}

Engine::~Engine() {
  if (!thread_.joinable()) return;  // Open failed
  {
    MutexLock lock(&stop_mutex_);
    stop_connecting_ = true;
    stop_wanted_.NotifyAll();
  }
  inbox_.Push(StopEngine{});
  thread_.join();
  cache_connector_.join();
  work_queue_->Stop(kWorkerExitGraceMs);
  cache_.reset();
}

// gRPC's and the cache client's threads only push.
WorkQueueEvents Engine::WorkerEvents() {
  const auto lost = [this](std::string reason) { inbox_.Push(WorkerLost{std::move(reason)}); };
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
      .on_heartbeat = [](uint32_t, const HeartbeatMessage&) {},
      .on_fault =
          [lost](uint32_t rank, const FaultMessage& fault) {
            lost(fmt::format("engine worker {} reports a fault ({}): {}", rank, NameOf(fault.kind),
                             fault.text));
          },
      .on_disconnected =
          [lost](uint32_t rank, const std::string& reason) {
            lost(fmt::format("engine worker {} is gone: {}", rank, reason));
          },
      .on_refused =
          [](const std::string& reason) { LOG_ERROR("refused an engine worker: {}", reason); },
  };
}

CacheEvents Engine::CacheManagerEvents() {
  return {
      .on_opened =
          [this](absl::StatusOr<OpenedPool> pool) { inbox_.Push(PoolOpened{std::move(pool)}); },
      .on_leased =
          [this](uint64_t tag, std::vector<PoolBlock> blocks) {
            inbox_.Push(BlocksLeased{tag, std::move(blocks)});
          },
      .on_closed = [this](absl::Status status) { inbox_.Push(CacheLost{std::move(status)}); },
  };
}

void Engine::ConnectCache() {
  constexpr auto kPauseBetweenTries = std::chrono::milliseconds(200);
  for (;;) {
    absl::StatusOr<std::unique_ptr<CacheClient>> client =
        config_.connect_cache(config_.startup.group_epoch, CacheManagerEvents());
    if (client.ok()) {
      inbox_.Push(CacheConnected{*std::move(client)});
      return;
    }
    if (!absl::IsUnavailable(client.status()) && !absl::IsDeadlineExceeded(client.status())) {
      inbox_.Push(CacheLost{client.status()});
      return;
    }
    MutexLock lock(&stop_mutex_);
    if (stop_wanted_.WaitFor(&stop_mutex_, kPauseBetweenTries,
                             [this]() NO_THREAD_SAFETY_ANALYSIS { return stop_connecting_; })) {
      return;
    }
  }
}

absl::Status Engine::Submit(std::unique_ptr<ActiveRequest> request) {
  const ReadinessReport readiness = Readiness();
  if (!readiness.ready) return absl::UnavailableError("not ready: " + readiness.reason);
  if (!inbox_.Push(Arrival{std::move(request)})) return absl::UnavailableError("shutting down");
  return absl::OkStatus();
}

void Engine::Cancel(uint64_t request_id) { inbox_.Push(Cancellation{request_id}); }

ReadinessReport Engine::Readiness() const {
  MutexLock lock(&readiness_mutex_);
  return readiness_;
}

EngineLimits Engine::limits() const {
  MutexLock lock(&readiness_mutex_);
  return limits_;
}

void Engine::SetReadiness(bool ready, const std::string& reason) {
  MutexLock lock(&readiness_mutex_);
  readiness_ = {ready, reason};
}

void Engine::Run() {
  while (!stopping_) {
    for (Event& event : inbox_.WaitAndTake()) {
      std::visit([this](auto& body) { Handle(std::move(body)); }, event);
    }
    if (stopping_ || failed_ || scheduler_ == nullptr) continue;
    Schedule();
    DeliverUpdates();
    last_step_ended_.reset();
    metrics_->RecordState(scheduler_->stats());
  }
  SetReadiness(false, "shutting down");
  const absl::Status error = absl::UnavailableError("the server is shutting down");
  for (Event& event : inbox_.Close()) {
    if (auto* arrival = std::get_if<Arrival>(&event)) arrival->request->output.Fail(error);
  }
  FailAll(error);
  work_queue_->Send(ShutdownWorker{});
  if (cache_ != nullptr) cache_->Close();
}

void Engine::Handle(Arrival event) {
  ActiveRequest& request = *event.request;
  if (failed_) return request.output.Fail(absl::UnavailableError(Readiness().reason));
  const uint64_t id = request.scheduled.id;
  metrics_->RecordArrival(request.output.num_prompt_tokens(), request.scheduled.max_tokens);
  if (absl::Status status = scheduler_->Submit(std::move(request.scheduled)); !status.ok()) {
    return request.output.Fail(status);
  }
  requests_[id] = std::move(event.request);
}

void Engine::Handle(Cancellation event) {
  if (requests_.erase(event.request_id) > 0) scheduler_->Cancel(event.request_id);
}

void Engine::Handle(WorkerAttached event) {
  LOG_INFO("engine worker {} of {} is attached: {}", event.hello.rank, config_.startup.world_size,
           event.hello.backend);
  if (absl::Status status = startup_.OnHello(event.hello); !status.ok()) {
    return Fatal(TextOf(status));
  }
  AdvanceStartup();
}

void Engine::Handle(CacheConnected event) {
  LOG_INFO("the cache manager is connected");
  cache_ = std::move(event.client);
  startup_.OnCacheConnected();
  AdvanceStartup();
}

void Engine::Handle(PoolOpened event) {
  if (!event.pool.ok()) {
    return Fatal(fmt::format("the cache manager cannot create the KV pool: {}",
                             TextOf(event.pool.status())));
  }
  startup_.OnPoolOpened(*event.pool);
  work_queue_->Send(startup_.attach_pool());
  AdvanceStartup();
}

void Engine::Handle(WorkerReady event) {
  if (absl::Status status = startup_.OnReady(event.rank, event.ready); !status.ok()) {
    return Fatal(TextOf(status));
  }
  AdvanceStartup();
}

// Does what has become possible, and says what is missing.
void Engine::AdvanceStartup() {
  if (failed_ || scheduler_ != nullptr) return;
  if (startup_.all_attached() && !configured_) {
    configured_ = true;
    work_queue_->Send(startup_.configuration());
  }
  if (startup_.can_open_pool() && !pool_requested_) {
    pool_requested_ = true;
    const absl::StatusOr<PoolSpec> spec = startup_.pool_spec();
    if (!spec.ok()) return Fatal(TextOf(spec.status()));
    cache_->OpenPool(*spec);
  }
  if (startup_.done()) return BecomeReady();
  SetReadiness(false, startup_.WaitingFor());
}

void Engine::BecomeReady() {
  const StartupConfig& config = config_.startup;
  const int num_blocks = static_cast<int>(startup_.pool()->num_blocks);
  scheduler_ = std::make_unique<Scheduler>(
      SchedulerConfig{.max_num_seqs = config.max_num_seqs,
                      .max_num_batched_tokens = config.max_num_batched_tokens,
                      .block_size_tokens = config.block_size_tokens,
                      .num_blocks = num_blocks,
                      .vocab_size = startup_.vocab_size(),
                      .eos_ids = config_.eos_ids});
  metrics_->RecordFacts({.max_num_seqs = config.max_num_seqs,
                         .max_model_len = startup_.max_model_len(),
                         .max_num_batched_tokens = config.max_num_batched_tokens,
                         .block_size_tokens = config.block_size_tokens,
                         .num_blocks = num_blocks,
                         .pool_bytes = startup_.block_bytes() * num_blocks});
  LOG_INFO("ready: {} KV blocks of {} tokens, {} MiB; {} sequences of at most {} tokens",
           num_blocks, config.block_size_tokens, startup_.block_bytes() * num_blocks >> 20,
           config.max_num_seqs, startup_.max_model_len());
  {
    MutexLock lock(&readiness_mutex_);
    limits_ = {startup_.max_model_len(), startup_.vocab_size()};
    readiness_ = {.ready = true, .reason = ""};
  }
  if (config_.on_ready) config_.on_ready();
}

void Engine::Handle(BlocksLeased event) {
  if (scheduler_ == nullptr) return;
  std::vector<LeasedBlock> blocks;
  blocks.reserve(event.blocks.size());
  for (const PoolBlock& block : event.blocks) {
    blocks.push_back({static_cast<BlockId>(block.id), block.generation});
  }
  scheduler_->OnBlocksLeased(event.tag, std::move(blocks));
}

void Engine::Handle(WorkerStepDone event) {
  if (failed_) return;
  if (!step_.has_value() || event.done.step != step_->step ||
      event.done.group_epoch != config_.startup.group_epoch ||
      step_->done[event.rank].has_value()) {
    return Fatal(fmt::format("engine worker {} reports step {} done, in flight is {}", event.rank,
                             event.done.step, step_.has_value() ? step_->step : 0));
  }
  step_->done[event.rank] = std::move(event.done);
  if (++step_->num_done == step_->done.size()) FinishStep();
}

// A step counts once every rank has done it.
void Engine::FinishStep() {
  const TimePoint now = steady_clock::now();
  if (absl::Status status = CheckRanksAgree(); !status.ok()) {
    return Fatal(TextOf(status));
  }
  uint32_t execute_us = 0;
  for (const auto& done : step_->done) execute_us = std::max(execute_us, done->execute_us);
  metrics_->RecordStep(Seconds(now - step_->sent), execute_us / 1e6, step_->num_sequences,
                       step_->num_tokens);
  const absl::StatusOr<std::vector<SequenceToken>> tokens =
      scheduler_->OnStepDone(step_->step, step_->done[0]->sampled);
  step_.reset();
  last_step_ended_ = now;
  if (!tokens.ok()) {
    return Fatal(fmt::format("engine worker 0 is out of step: {}", TextOf(tokens.status())));
  }
  metrics_->RecordGeneratedTokens(static_cast<int>(tokens->size()));
  for (const SequenceToken& news : *tokens) TakeToken(news, now);
}

absl::Status Engine::CheckRanksAgree() const {
  const uint64_t digest = step_->done[0]->sampled_digest;
  for (uint32_t rank = 0; rank < step_->done.size(); ++rank) {
    const StepDone& done = *step_->done[rank];
    if (done.plan_hash != step_->plan_hash) {
      return absl::InternalError(
          fmt::format("engine worker {} ran another plan as step {}: hash {:016x}, sent was "
                      "{:016x}",
                      rank, done.step, done.plan_hash, step_->plan_hash));
    }
    if (digest != 0 && done.sampled_digest != 0 && done.sampled_digest != digest) {
      return absl::InternalError(
          fmt::format("engine workers 0 and {} went on with different tokens after step {}: "
                      "digest {:016x} and {:016x}",
                      rank, done.step, digest, done.sampled_digest));
    }
  }
  return absl::OkStatus();
}

void Engine::TakeToken(const SequenceToken& news, TimePoint now) {
  const auto found = requests_.find(news.sequence.request);
  CHECK(found != requests_.end(), "request={}", news.sequence.request);
  ActiveRequest& request = *found->second;
  if (!request.first_token.has_value()) {
    request.first_token = now;
    metrics_->RecordFirstToken(Seconds(now - request.arrived), Seconds(now - *request.started));
  }
  const auto [last, is_first] = request.last_token.try_emplace(news.sequence.choice, now);
  if (!is_first) metrics_->RecordNextToken(Seconds(now - std::exchange(last->second, now)));
  // Before the next plan is made: a choice that met its stop string gets no further row.
  if (request.output.Append(news)) scheduler_->Cancel(news.sequence);
  if (updated_.empty() || updated_.back() != news.sequence.request) {
    updated_.push_back(news.sequence.request);
  }
}

void Engine::Schedule() {
  SchedulerOutput output = scheduler_->Schedule();
  if (!output.return_blocks.empty()) cache_->ReturnBlocks(ToPoolBlocks(output.return_blocks));
  if (output.lease.has_value()) cache_->LeaseBlocks(output.lease->tag, output.lease->count);
  if (output.plan.has_value()) SendPlan(*std::move(output.plan));
  const TimePoint now = steady_clock::now();
  for (const SequenceKey& key : output.started) {
    ActiveRequest& request = *requests_.at(key.request);
    if (request.started.has_value()) continue;
    request.started = now;
    metrics_->RecordStart(Seconds(now - request.arrived));
  }
  for (const SequenceKey& key : output.failed) {
    FailRequest(key.request, absl::ResourceExhaustedError(
                                 "the KV pool has fewer free blocks than the request needs"));
  }
}

void Engine::SendPlan(StepPlan plan) {
  plan.group_epoch = config_.startup.group_epoch;
  plan.pool_epoch = startup_.pool()->pool_epoch;
  plan.previous_plan_hash = last_plan_hash_;
  StepInFlight step{.step = plan.step, .num_sequences = static_cast<int>(plan.rows.size())};
  for (const PlanRow& row : plan.rows) step.num_tokens += static_cast<int>(row.length);
  step.done.resize(config_.startup.world_size);
  step.plan_hash = last_plan_hash_ = work_queue_->SendPlan(plan);
  step.sent = steady_clock::now();
  if (last_step_ended_.has_value())
    metrics_->RecordSchedule(Seconds(step.sent - *last_step_ended_));
  step_ = std::move(step);
}

// After the next plan has been sent: the workers compute meanwhile.
void Engine::DeliverUpdates() {
  for (const uint64_t id : std::exchange(updated_, {})) {
    const auto found = requests_.find(id);
    if (found == requests_.end()) continue;  // cancelled in the same turn, or failed
    ActiveRequest& request = *found->second;
    request.output.Deliver();
    if (!request.output.finished()) continue;
    const TimePoint now = steady_clock::now();
    metrics_->RecordSuccess(Seconds(now - request.arrived), Seconds(now - *request.started),
                            Seconds(now - *request.first_token), request.output.num_prompt_tokens(),
                            request.output.num_completion_tokens());
    requests_.erase(found);
  }
}

void Engine::FailRequest(uint64_t request_id, const absl::Status& error) {
  const auto found = requests_.find(request_id);
  if (found == requests_.end()) return;
  scheduler_->Cancel(request_id);
  found->second->output.Fail(error);
  requests_.erase(found);
}

void Engine::FailAll(const absl::Status& error) {
  for (auto& [id, request] : std::exchange(requests_, {})) request->output.Fail(error);
  updated_.clear();
}

void Engine::Handle(WorkerLost event) { Fatal(event.reason); }

void Engine::Handle(CacheLost event) {
  Fatal(fmt::format("the cache manager is lost: {}", TextOf(event.status)));
}

void Engine::Handle(StopEngine) { stopping_ = true; }

void Engine::Fatal(const std::string& reason) {
  if (failed_ || stopping_) return;
  failed_ = true;
  LOG_ERROR("the engine stops: {}", reason);
  SetReadiness(false, reason);
  step_.reset();
  FailAll(absl::UnavailableError(reason));
  if (config_.on_fatal) config_.on_fatal(reason);
}

}  // namespace wintserve
