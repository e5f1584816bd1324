#include "engine_worker/runner/worker.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <string>
#include <thread>
#include <utility>

#include "common/log.h"
#include "common/status_macros.h"

namespace wintserve {
namespace {

constexpr std::chrono::milliseconds kHeartbeatPeriod(250);
// Processes that are stopped together do not get their signals together: a peer or an API server
// that is gone already need not be a fault.
constexpr int64_t kStopSkewMs = 1000;
// Of one look for an API server: also how long a stop may wait for it.
constexpr int64_t kAttachSliceMs = 250;
// For a server that refuses this rank because it has yet to find out that its last stream has
// ended. Longer than its keepalive takes.
constexpr std::chrono::milliseconds kRefusalPatience(5'000);

FaultKind KindOf(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kResourceExhausted:
      return FaultKind::kOutOfMemory;
    default:
      return FaultKind::kInternal;
  }
}

// 0 when the kernel does not say.
uint64_t ResidentBytes() {
  uint64_t total_pages = 0;
  uint64_t resident_pages = 0;
  std::FILE* file = std::fopen("/proc/self/statm", "re");
  if (file == nullptr) return 0;
  const int num_read = std::fscanf(file, "%lu %lu", &total_pages, &resident_pages);
  std::fclose(file);
  return num_read == 2 ? resident_pages * ::sysconf(_SC_PAGESIZE) : 0;
}

absl::Status CheckSize(const char* what, int64_t size_bytes, uint32_t count, const char* unit,
                       int64_t block_bytes) {
  const int64_t expected_bytes = int64_t{count} * block_bytes;
  if (size_bytes == expected_bytes) return absl::OkStatus();
  return absl::InvalidArgumentError(fmt::format("{} has {} bytes, {} {} of {} bytes need {}", what,
                                                size_bytes, count, unit, block_bytes,
                                                expected_bytes));
}

}  // namespace

Worker::Worker(Model* model, RankGroup* group, WorkQueueClient* queue, WorkerLinks links,
               const WorkerOptions& options)
    : model_(model),
      group_(group),
      links_(std::move(links)),
      options_(options),
      queue_(queue, [](WorkQueueClient*) {}),  // borrowed
      finisher_([this](const absl::StatusOr<StepDone>& done) { Report(done); }) {}

absl::Status Worker::Run() {
  UseQueue(Queue());
  std::thread heartbeat([this] { BeatUntilEnd(); });
  absl::Status status = Serve();
  Queue()->SetInterrupt(nullptr);
  finisher_.Drain();
  runner_.reset();
  group_->Unbind();  // before the device that the model's owner takes away
  {
    MutexLock lock(&mutex_);
    ended_ = true;
    changed_.NotifyAll();
  }
  heartbeat.join();
  return status;
}

absl::Status Worker::Serve() {
  while (true) {
    const absl::StatusOr<ServerEvent> event = Queue()->Next();
    // Plans follow each other while the device is still at work on the first; all else waits for
    // it.
    const bool is_plan = event.ok() && std::holds_alternative<ReceivedPlan>(*event);
    if (!is_plan) finisher_.Drain();
    RETURN_IF_ERROR(StepError());
    if (!event.ok()) {
      ASSIGN_OR_RETURN(const bool go_on, AttachAgain(event.status()));
      if (go_on) continue;
      return absl::OkStatus();
    }
    if (std::holds_alternative<ShutdownWorker>(*event)) return absl::OkStatus();
    if (!BeginWork(is_plan ? Work::kPlan : Work::kPreparation)) {
      finisher_.Drain();
      return StepError();
    }
    const absl::Status status = Handle(*event);
    const bool go_on = EndWork();
    if (status.ok() && go_on) continue;

    finisher_.Drain();
    RETURN_IF_ERROR(StepError());
    if (status.ok()) return absl::OkStatus();
    // The stream may be gone as well; the caller logs the status in any case.
    Queue()
        ->SendFault(KindOf(status), std::string(status.message()), /*kv_trusted=*/false)
        .IgnoreError();
    return absl::Status(absl::StatusCode::kInternal, status.message());
  }
}

bool Worker::RequestStop(int64_t patience_ms) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(patience_ms);
  {
    MutexLock lock(&mutex_);
    stopping_ = true;
    changed_.NotifyAll();
    if (work_ == Work::kPreparation) {
      group_->Abort();
      return false;
    }
    // Nobody is at work on a plan: Next() must return.
    if (work_ == Work::kNone) queue_->Close();
    const bool handled =
        changed_.WaitFor(&mutex_, deadline - std::chrono::steady_clock::now(),
                         [this]() NO_THREAD_SAFETY_ANALYSIS { return work_ == Work::kNone; });
    if (!handled) {
      group_->Abort();
      return true;
    }
  }
  const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(
      deadline - std::chrono::steady_clock::now());
  if (!finisher_.DrainFor(left.count())) group_->Abort();
  return true;
}

bool Worker::BeginWork(Work work) {
  MutexLock lock(&mutex_);
  if (!stopping_) work_ = work;
  return !stopping_;
}

bool Worker::EndWork() {
  MutexLock lock(&mutex_);
  work_ = Work::kNone;
  changed_.NotifyAll();
  return !stopping_;
}

bool Worker::IsStopping() {
  MutexLock lock(&mutex_);
  return stopping_;
}

bool Worker::WaitForStop(int64_t timeout_ms) {
  MutexLock lock(&mutex_);
  return changed_.WaitFor(&mutex_, std::chrono::milliseconds(timeout_ms),
                          [this]() NO_THREAD_SAFETY_ANALYSIS { return stopping_; });
}

void Worker::BeatUntilEnd() {
  bool ended = false;
  while (!ended) {
    // A heartbeat that cannot be sent tells nobody anything; Next() reports the end of the stream.
    Queue()
        ->SendHeartbeat({.step_started = step_started_,
                         .step_done = step_done_,
                         .resident_bytes = ResidentBytes(),
                         .progress = progress_})
        .IgnoreError();
    ReportALostGroup();
    MutexLock lock(&mutex_);
    LimitTheWaitForAnAbort();
    ended = changed_.WaitFor(&mutex_, kHeartbeatPeriod,
                             [this]() NO_THREAD_SAFETY_ANALYSIS { return ended_; });
  }
}

void Worker::ReportALostGroup() {
  MutexLock report(&report_mutex_);
  std::string reason;
  {
    MutexLock lock(&mutex_);
    if (!loss_.has_value() || loss_->is_told || !interrupted_.empty()) return;
    const auto due = loss_->at + std::chrono::milliseconds(options_.lost_group_report_ms);
    if (std::chrono::steady_clock::now() < due) return;
    loss_->is_told = true;
    reason = loss_->reason;
  }
  Queue()->SendFault(FaultKind::kCollective, reason, /*kv_trusted=*/true).IgnoreError();
}

void Worker::NoteLoss(const absl::Status& reason) {
  if (loss_.has_value()) return;
  loss_ = {.at = std::chrono::steady_clock::now(), .reason = std::string(reason.message())};
}

void Worker::LimitTheWaitForAnAbort() {
  if (!loss_.has_value()) return;
  const auto limit = loss_->at + std::chrono::milliseconds(options_.orphan_timeout_ms);
  if (std::chrono::steady_clock::now() < limit) return;
  waited_too_long_ = true;
  queue_->Close();
}

absl::Status Worker::Handle(const ServerEvent& event) {
  const auto handle = [&] {
    if (const auto* configure = std::get_if<ConfigureWorker>(&event)) return Configure(*configure);
    if (const auto* attach = std::get_if<AttachPool>(&event)) return MapPool(*attach);
    if (const auto* detach = std::get_if<DetachPool>(&event)) return UnmapPool(*detach);
    if (const auto* abort = std::get_if<AbortGroup>(&event)) return Abort(*abort);
    return Execute(std::get<ReceivedPlan>(event));
  };
  const absl::Status status = handle();
  // A peer that is gone, or an abort: no fault of this rank.
  return absl::IsUnavailable(status) ? LoseGroup(status) : status;
}

absl::Status Worker::Configure(const ConfigureWorker& configure) {
  if (config_.has_value() || awaited_abort_.has_value()) {
    return absl::FailedPreconditionError(config_.has_value()
                                             ? "the worker is configured already"
                                             : "a configuration before the abort of the group");
  }
  if (static_cast<int>(configure.world_size) != group_->world_size()) {
    return absl::InvalidArgumentError(
        fmt::format("configured for {} ranks, the model was loaded for {}", configure.world_size,
                    group_->world_size()));
  }
  config_ = configure;
  if (!BeginGroup(configure.group_epoch)) {
    return absl::UnavailableError("it was aborted before it was joined");
  }
  ASSIGN_OR_RETURN(std::unique_ptr<Collective> group, links_.join_group(configure));
  group_->Bind(std::move(group));
  ++progress_;
  return absl::OkStatus();
}

bool Worker::BeginGroup(uint64_t group_epoch) {
  MutexLock lock(&mutex_);
  if (stream_has_ended_ || interrupted_.contains(group_epoch)) return false;
  group_epoch_ = group_epoch;
  group_->BeginJoin();
  return true;
}

void Worker::Interrupt(uint64_t group_epoch) {
  MutexLock lock(&mutex_);
  if (group_epoch == 0) {
    stream_has_ended_ = true;
  } else {
    interrupted_.insert(group_epoch);
  }
  if (group_epoch_ != 0 && (group_epoch == 0 || group_epoch == group_epoch_)) group_->Abort();
}

bool Worker::GroupIsOver() {
  MutexLock lock(&mutex_);
  return stream_has_ended_ || loss_.has_value() || interrupted_.contains(group_epoch_);
}

// NCCL demands this order: the abort is carried out by a thread of the collective's own while this
// one waits for the device and destroys the graphs, which hold the communicator.
absl::Status Worker::LeaveGroup() {
  group_->Abort();
  finisher_.Drain();
  runner_.reset();
  // Also what a step had called when it failed, and so is in no PendingStep.
  const absl::Status drained = model_->backend()->Record()->Wait();
  group_->Unbind();
  finisher_.Restart();
  config_.reset();
  chain_ = {};
  pool_is_attached_ = false;
  {
    MutexLock lock(&mutex_);
    group_epoch_ = 0;
  }
  // Whatever the device says: no peer is at fault.
  return drained.ok() ? drained : absl::InternalError(drained.message());
}

absl::Status Worker::LoseGroup(const absl::Status& reason) {
  LOG_WARNING("group {:x} is over: {}", config_->group_epoch, std::string(reason.message()));
  awaited_abort_ = config_->group_epoch;
  {
    MutexLock lock(&mutex_);
    NoteLoss(reason);
  }
  return LeaveGroup();
}

absl::Status Worker::Abort(const AbortGroup& abort) {
  // Of an epoch that it is not in, nothing runs here.
  const bool is_in_it = config_.has_value() && config_->group_epoch == abort.group_epoch;
  if (is_in_it) RETURN_IF_ERROR(LeaveGroup());
  const bool was_awaited = awaited_abort_ == abort.group_epoch;
  if (was_awaited) awaited_abort_.reset();
  {
    MutexLock report(&report_mutex_);
    MutexLock lock(&mutex_);
    if (is_in_it || was_awaited) loss_.reset();
    interrupted_.erase(abort.group_epoch);
  }
  LOG_INFO("left group {:x}: {}", abort.group_epoch, abort.reason);
  Queue()->SendAborted(abort.group_epoch).IgnoreError();
  return absl::OkStatus();
}

absl::StatusOr<bool> Worker::AttachAgain(const absl::Status& end) {
  if (IsStopping()) return false;
  {
    MutexLock lock(&mutex_);
    if (waited_too_long_) {
      return absl::DeadlineExceededError(
          fmt::format("the group is over, and the API server has not aborted it for {} ms",
                      options_.orphan_timeout_ms));
    }
  }
  if (links_.attach_again == nullptr || !absl::IsUnavailable(end)) {
    return WaitForStop(kStopSkewMs) ? absl::StatusOr<bool>(false) : end;
  }
  if (!BeginWork(Work::kPreparation)) return false;
  LOG_WARNING("{}; keeping weights and pool for up to {} ms", std::string(end.message()),
              options_.orphan_timeout_ms);
  RETURN_IF_ERROR(LeaveGroup());
  awaited_abort_.reset();
  {
    MutexLock report(&report_mutex_);
    MutexLock lock(&mutex_);
    loss_.reset();  // nobody is there to end it
  }
  if (pool_ == nullptr) pool_epoch_.reset();
  absl::StatusOr<std::unique_ptr<WorkQueueClient>> queue = FindServer();
  if (!queue.ok()) return IsStopping() ? absl::StatusOr<bool>(false) : queue.status();
  UseQueue(*std::move(queue));
  LOG_INFO("attached to the next API server");
  return EndWork();
}

absl::StatusOr<std::unique_ptr<WorkQueueClient>> Worker::FindServer() {
  using std::chrono::milliseconds;
  using std::chrono::steady_clock;
  const auto begin = steady_clock::now();
  const milliseconds timeout(options_.orphan_timeout_ms);
  while (true) {
    absl::StatusOr<std::unique_ptr<WorkQueueClient>> queue =
        links_.attach_again(pool_epoch_.value_or(0), kAttachSliceMs);
    const bool is_refused = absl::IsFailedPrecondition(queue.status());
    if (!absl::IsUnavailable(queue.status()) && !is_refused) return queue;
    const auto waited = steady_clock::now() - begin;
    if (is_refused && waited >= std::min(timeout, kRefusalPatience)) return queue;
    if (waited >= timeout) {
      return absl::UnavailableError(fmt::format("{}; no other came within {} ms",
                                                std::string(queue.status().message()),
                                                options_.orphan_timeout_ms));
    }
    if (WaitForStop(is_refused ? kAttachSliceMs : 10)) return queue;
  }
}

void Worker::UseQueue(std::shared_ptr<WorkQueueClient> queue) {
  Queue()->SetInterrupt(nullptr);
  std::shared_ptr<WorkQueueClient> before;  // ends outside of the lock
  {
    MutexLock lock(&mutex_);
    before = std::exchange(queue_, queue);
    interrupted_.clear();
    stream_has_ended_ = false;
  }
  queue->SetInterrupt([this](uint64_t group_epoch) { Interrupt(group_epoch); });
}

std::shared_ptr<WorkQueueClient> Worker::Queue() {
  MutexLock lock(&mutex_);
  return queue_;
}

absl::Status Worker::MapPool(const AttachPool& attach) {
  if (awaited_abort_.has_value()) {
    if (!pool_epoch_.has_value()) pool_epoch_ = attach.pool_epoch;
    return absl::OkStatus();
  }
  if (!config_.has_value()) {
    return absl::FailedPreconditionError("a pool before the configuration");
  }
  if (pool_is_attached_ || (pool_epoch_.has_value() && *pool_epoch_ != attach.pool_epoch)) {
    return absl::FailedPreconditionError("a pool is attached already");
  }
  pool_epoch_ = attach.pool_epoch;
  pool_is_attached_ = true;
  const absl::Status mapped = MapTiers(attach);
  ++progress_;
  if (!mapped.ok()) UnmapTiers();
  // UNAVAILABLE would be a peer of the group, or the API server.
  if (absl::IsUnavailable(mapped)) return absl::DeadlineExceededError(mapped.message());
  if (!mapped.ok() && !absl::IsNotFound(mapped)) return mapped;
  if (mapped.ok()) LOG_DEBUG("pool epoch {:x} is mapped", attach.pool_epoch);
  ASSIGN_OR_RETURN(const bool all_mapped, AllMapped(mapped.ok()));
  if (!all_mapped) {
    LOG_WARNING("pool epoch {:x} is lost with its cache manager: {}", attach.pool_epoch,
                mapped.ok() ? "another rank could not map it" : std::string(mapped.message()));
    UnmapTiers();
    return absl::OkStatus();  // the API server hears of the loss itself, and detaches
  }
  return MakeRunner(attach);
}

absl::Status Worker::MakeRunner(const AttachPool& attach) {
  const StepRunnerConfig config = {.group_epoch = config_->group_epoch,
                                   .pool_epoch = attach.pool_epoch,
                                   .num_blocks = attach.num_blocks,
                                   .num_host_slots = attach.num_host_slots,
                                   .max_slots = config_->max_slots,
                                   .max_tokens = config_->max_tokens,
                                   .max_sequence_tokens = config_->max_sequence_tokens,
                                   .sampled_vocab_size = config_->sampled_vocab_size,
                                   .stop_ids = config_->stop_ids,
                                   .use_graphs = options_.use_graphs,
                                   .chain = chain_};
  ASSIGN_OR_RETURN(runner_,
                   StepRunner::Create(config, model_, group_, pool_->data(),
                                      host_tier_ == nullptr ? nullptr : host_tier_->data()));
  ++progress_;
  RETURN_IF_ERROR(runner_->WarmUp());
  ++progress_;
  if (options_.use_graphs) {
    const StepGraphs& graphs = runner_->graphs();
    LOG_INFO("decode steps run as {} graphs, captured in {:.2f} s", graphs.size(),
             graphs.capture_seconds());
  }
  LOG_INFO("ready: {} slots, {} blocks and {} host slots of {} bytes", config.max_slots,
           config.num_blocks, config.num_host_slots, model_->kv_block_bytes());
  // Next() reports why, should the stream have ended.
  Queue()->SendReady(config.group_epoch, config.pool_epoch).IgnoreError();
  return absl::OkStatus();
}

absl::Status Worker::MapTiers(const AttachPool& attach) {
  kernels::Backend& backend = *model_->backend();
  const int64_t block_bytes = model_->kv_block_bytes();
  if (pool_ != nullptr) {
    const int64_t host_bytes = host_tier_ == nullptr ? 0 : host_tier_->size_bytes();
    RETURN_IF_ERROR(
        CheckSize("the pool", pool_->size_bytes(), attach.num_blocks, "blocks", block_bytes));
    return CheckSize("the host tier", host_bytes, attach.num_host_slots, "slots", block_bytes);
  }
  ASSIGN_OR_RETURN(SharedMemory pool, links_.fetch_pool(attach));
  RETURN_IF_ERROR(CheckSize("the pool", pool.size_bytes, attach.num_blocks, "blocks", block_bytes));
  ASSIGN_OR_RETURN(pool_, backend.MapDeviceMemory(std::move(pool)));
  if (attach.num_host_slots == 0) return absl::OkStatus();
  ASSIGN_OR_RETURN(SharedMemory host_tier, links_.fetch_host_tier(attach));
  RETURN_IF_ERROR(CheckSize("the host tier", host_tier.size_bytes, attach.num_host_slots, "slots",
                            block_bytes));
  ASSIGN_OR_RETURN(host_tier_, backend.MapHostMemory(std::move(host_tier)));
  return absl::OkStatus();
}

void Worker::UnmapTiers() {
  host_tier_.reset();
  pool_.reset();
}

absl::StatusOr<bool> Worker::AllMapped(bool mapped) {
  // A rank that went on alone would wait in its warm-up for one that has no pool.
  kernels::Backend& backend = *model_->backend();
  float num_mapped = mapped ? 1 : 0;
  ASSIGN_OR_RETURN(const std::unique_ptr<kernels::Buffer> sum, backend.Allocate(sizeof(float)));
  backend.CopyFromHost(sum->data(), &num_mapped, sizeof(float));
  RETURN_IF_ERROR(group_->AllReduceSum(static_cast<float*>(sum->data()), 1));
  RETURN_IF_ERROR(backend.CopyToHost(&num_mapped, sum->data(), sizeof(float)));
  RETURN_IF_ERROR(group_->DeviceStatus());
  return num_mapped == static_cast<float>(group_->world_size());
}

absl::Status Worker::UnmapPool(const DetachPool& detach) {
  if (!pool_epoch_.has_value() && !config_.has_value()) {
    // A replacement, to which nobody has given a pool yet.
    Queue()->SendPoolDetached(detach.pool_epoch).IgnoreError();
    return absl::OkStatus();
  }
  if (!pool_epoch_.has_value()) {
    return absl::FailedPreconditionError(
        fmt::format("detach of pool epoch {:x}, but no pool is attached", detach.pool_epoch));
  }
  if (detach.pool_epoch != *pool_epoch_) {
    return absl::FailedPreconditionError(fmt::format(
        "detach of pool epoch {:x}, the attached pool is {:x}", detach.pool_epoch, *pool_epoch_));
  }
  if (runner_ != nullptr) chain_ = runner_->chain();
  runner_.reset();
  UnmapTiers();
  pool_epoch_.reset();
  pool_is_attached_ = false;
  LOG_INFO("detached from pool epoch {:x} after step {}", detach.pool_epoch, chain_.step);
  Queue()->SendPoolDetached(detach.pool_epoch).IgnoreError();
  return absl::OkStatus();
}

absl::Status Worker::Execute(const ReceivedPlan& received) {
  if (awaited_abort_.has_value()) return absl::OkStatus();  // nobody waits for it any more
  if (config_.has_value() && GroupIsOver()) return absl::UnavailableError("it was aborted");
  if (runner_ == nullptr) {
    return absl::FailedPreconditionError(
        fmt::format("plan of step {}, but no pool is mapped", received.plan.step));
  }
  step_started_ = received.plan.step;
  ASSIGN_OR_RETURN(std::unique_ptr<PendingStep> step,
                   runner_->Begin(received.plan, received.plan_hash));
  finisher_.Add(std::move(step));
  return absl::OkStatus();
}

void Worker::Report(const absl::StatusOr<StepDone>& done) {
  if (!done.ok()) {
    {
      MutexLock lock(&mutex_);
      if (absl::IsUnavailable(done.status())) {
        if (loss_.has_value()) return;
        LOG_WARNING("a step was not done, the group of ranks is over: {}",
                    std::string(done.status().message()));
        NoteLoss(done.status());
        return;  // the thread that serves leaves the group with the next that comes
      }
      step_error_ = absl::InternalError(done.status().message());
    }
    const auto queue = Queue();
    queue
        ->SendFault(KindOf(done.status()), std::string(done.status().message()),
                    /*kv_trusted=*/false)
        .IgnoreError();
    queue->Close();  // the thread that serves may be waiting there
    return;
  }
  step_done_ = done->step;
  Queue()->SendStepDone(*done).IgnoreError();
}

absl::Status Worker::StepError() {
  MutexLock lock(&mutex_);
  return step_error_;
}

}  // namespace wintserve
