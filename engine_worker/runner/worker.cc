#include "engine_worker/runner/worker.h"

#include <fmt/format.h>
#include <unistd.h>

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

FaultKind KindOf(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kUnavailable:
      return FaultKind::kCollective;
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

absl::Status CheckSize(const char* what, const SharedMemory& memory, uint32_t count,
                       const char* unit, int64_t block_bytes) {
  const int64_t expected_bytes = int64_t{count} * block_bytes;
  if (memory.size_bytes == expected_bytes) return absl::OkStatus();
  return absl::InvalidArgumentError(fmt::format("{} has {} bytes, {} {} of {} bytes need {}", what,
                                                memory.size_bytes, count, unit, block_bytes,
                                                expected_bytes));
}

}  // namespace

Worker::Worker(Model* model, RankGroup* group, WorkQueueClient* queue, WorkerLinks links,
               bool use_graphs)
    : model_(model),
      group_(group),
      queue_(queue),
      links_(std::move(links)),
      use_graphs_(use_graphs),
      finisher_([this](const absl::StatusOr<StepDone>& done) { Report(done); }) {}

absl::Status Worker::Run() {
  std::thread heartbeat([this] { BeatUntilEnd(); });
  absl::Status status = Serve();
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
    const absl::StatusOr<ServerEvent> event = queue_->Next();
    // Plans follow each other while the device is still at work on the first; all else waits for
    // it.
    const bool is_plan = event.ok() && std::holds_alternative<ReceivedPlan>(*event);
    if (!is_plan) finisher_.Drain();
    RETURN_IF_ERROR(StepError());
    if (!event.ok()) return WaitForStop(kStopSkewMs) ? absl::OkStatus() : event.status();
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
    if (absl::IsUnavailable(status) && WaitForStop(kStopSkewMs)) return absl::OkStatus();
    // The stream may be gone as well; the caller logs the status in any case.
    queue_->SendFault(KindOf(status), std::string(status.message()), /*kv_trusted=*/false)
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

bool Worker::WaitForStop(int64_t timeout_ms) {
  MutexLock lock(&mutex_);
  return changed_.WaitFor(&mutex_, std::chrono::milliseconds(timeout_ms),
                          [this]() NO_THREAD_SAFETY_ANALYSIS { return stopping_; });
}

void Worker::BeatUntilEnd() {
  bool ended = false;
  while (!ended) {
    // A heartbeat that cannot be sent tells nobody anything; Next() reports the end of the stream.
    queue_->SendHeartbeat(step_started_, step_done_, ResidentBytes()).IgnoreError();
    MutexLock lock(&mutex_);
    ended = changed_.WaitFor(&mutex_, kHeartbeatPeriod,
                             [this]() NO_THREAD_SAFETY_ANALYSIS { return ended_; });
  }
}

absl::Status Worker::Handle(const ServerEvent& event) {
  if (const auto* configure = std::get_if<ConfigureWorker>(&event)) return Configure(*configure);
  if (const auto* attach = std::get_if<AttachPool>(&event)) return MapPool(*attach);
  if (const auto* detach = std::get_if<DetachPool>(&event)) return UnmapPool(*detach);
  if (std::holds_alternative<AbortGroup>(event)) {
    return absl::UnimplementedError("this worker does not join a group anew");
  }
  return Execute(std::get<ReceivedPlan>(event));
}

absl::Status Worker::Configure(const ConfigureWorker& configure) {
  if (config_.has_value()) {
    return absl::FailedPreconditionError("the worker is configured already");
  }
  if (static_cast<int>(configure.world_size) != group_->world_size()) {
    return absl::InvalidArgumentError(
        fmt::format("configured for {} ranks, the model was loaded for {}", configure.world_size,
                    group_->world_size()));
  }
  ASSIGN_OR_RETURN(std::unique_ptr<Collective> group, links_.join_group(configure));
  group_->Bind(std::move(group));
  config_ = configure;
  return absl::OkStatus();
}

absl::Status Worker::MapPool(const AttachPool& attach) {
  if (!config_.has_value() || pool_epoch_.has_value()) {
    return absl::FailedPreconditionError(config_.has_value() ? "a pool is attached already"
                                                             : "a pool before the configuration");
  }
  pool_epoch_ = attach.pool_epoch;
  const absl::Status mapped = MapTiers(attach);
  // UNAVAILABLE would be a peer of the group, or the API server.
  if (absl::IsUnavailable(mapped)) return absl::DeadlineExceededError(mapped.message());
  if (!mapped.ok() && !absl::IsNotFound(mapped)) return mapped;
  ASSIGN_OR_RETURN(const bool all_mapped, AllMapped(mapped.ok()));
  if (!all_mapped) {
    LOG_WARNING("pool epoch {:x} is lost with its cache manager: {}", attach.pool_epoch,
                mapped.ok() ? "another rank could not map it" : std::string(mapped.message()));
    UnmapTiers();
    return absl::OkStatus();  // the API server hears of the loss itself, and detaches
  }
  const StepRunnerConfig config = {.group_epoch = config_->group_epoch,
                                   .pool_epoch = attach.pool_epoch,
                                   .num_blocks = attach.num_blocks,
                                   .num_host_slots = attach.num_host_slots,
                                   .max_slots = config_->max_slots,
                                   .max_tokens = config_->max_tokens,
                                   .max_sequence_tokens = config_->max_sequence_tokens,
                                   .sampled_vocab_size = config_->sampled_vocab_size,
                                   .stop_ids = config_->stop_ids,
                                   .use_graphs = use_graphs_,
                                   .chain = chain_};
  ASSIGN_OR_RETURN(runner_,
                   StepRunner::Create(config, model_, group_, pool_->data(),
                                      host_tier_ == nullptr ? nullptr : host_tier_->data()));
  RETURN_IF_ERROR(runner_->WarmUp());
  if (use_graphs_) {
    const StepGraphs& graphs = runner_->graphs();
    LOG_INFO("decode steps run as {} graphs, captured in {:.2f} s", graphs.size(),
             graphs.capture_seconds());
  }
  LOG_INFO("ready: {} slots, {} blocks and {} host slots of {} bytes", config.max_slots,
           config.num_blocks, config.num_host_slots, model_->kv_block_bytes());
  // Next() reports why, should the stream have ended.
  queue_->SendReady(config.group_epoch, config.pool_epoch).IgnoreError();
  return absl::OkStatus();
}

absl::Status Worker::MapTiers(const AttachPool& attach) {
  kernels::Backend& backend = *model_->backend();
  const int64_t block_bytes = model_->kv_block_bytes();
  ASSIGN_OR_RETURN(SharedMemory pool, links_.fetch_pool(attach));
  RETURN_IF_ERROR(CheckSize("the pool", pool, attach.num_blocks, "blocks", block_bytes));
  ASSIGN_OR_RETURN(pool_, backend.MapDeviceMemory(std::move(pool)));
  if (attach.num_host_slots == 0) return absl::OkStatus();
  ASSIGN_OR_RETURN(SharedMemory host_tier, links_.fetch_host_tier(attach));
  RETURN_IF_ERROR(
      CheckSize("the host tier", host_tier, attach.num_host_slots, "slots", block_bytes));
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
  LOG_INFO("detached from pool epoch {:x} after step {}", detach.pool_epoch, chain_.step);
  queue_->SendPoolDetached(detach.pool_epoch).IgnoreError();
  return absl::OkStatus();
}

absl::Status Worker::Execute(const ReceivedPlan& received) {
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
    // A group that ends because its ranks are stopped is no fault.
    if (absl::IsUnavailable(done.status()) && WaitForStop(kStopSkewMs)) {
      queue_->Close();
      return;
    }
    {
      MutexLock lock(&mutex_);
      step_error_ = absl::InternalError(done.status().message());
    }
    queue_
        ->SendFault(KindOf(done.status()), std::string(done.status().message()),
                    /*kv_trusted=*/false)
        .IgnoreError();
    queue_->Close();  // the thread that serves may be waiting there
    return;
  }
  step_done_ = done->step;
  queue_->SendStepDone(*done).IgnoreError();
}

absl::Status Worker::StepError() {
  MutexLock lock(&mutex_);
  return step_error_;
}

}  // namespace wintserve
