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
// Ranks that are stopped together do not get their signals together: a peer that is gone already
// need not be a fault.
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

}  // namespace

Worker::Worker(Model* model, RankGroup* group, WorkQueueClient* queue, WorkerLinks links)
    : model_(model), group_(group), queue_(queue), links_(std::move(links)) {}

absl::Status Worker::Run() {
  std::thread heartbeat([this] { BeatUntilEnd(); });
  absl::Status status = Serve();
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
    if (!event.ok()) return WaitForStop(0) ? absl::OkStatus() : event.status();
    if (std::holds_alternative<ShutdownWorker>(*event)) return absl::OkStatus();
    if (!BeginWork()) return absl::OkStatus();
    const absl::Status status = Handle(*event);
    const bool go_on = EndWork();
    if (!status.ok()) {
      if (absl::IsUnavailable(status) && WaitForStop(kStopSkewMs)) return absl::OkStatus();
      // The stream may be gone as well; the caller logs the status in any case.
      queue_->SendFault(KindOf(status), std::string(status.message())).IgnoreError();
      return absl::Status(absl::StatusCode::kInternal, status.message());
    }
    if (!go_on) return absl::OkStatus();
  }
}

void Worker::RequestStop(int64_t patience_ms) {
  MutexLock lock(&mutex_);
  stopping_ = true;
  changed_.NotifyAll();
  if (!working_) {
    queue_->Close();
    return;
  }
  const bool done = changed_.WaitFor(&mutex_, std::chrono::milliseconds(patience_ms),
                                     [this]() NO_THREAD_SAFETY_ANALYSIS { return !working_; });
  if (!done) group_->Abort();
}

bool Worker::BeginWork() {
  MutexLock lock(&mutex_);
  working_ = !stopping_;
  return working_;
}

bool Worker::EndWork() {
  MutexLock lock(&mutex_);
  working_ = false;
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
  if (!config_.has_value() || runner_ != nullptr) {
    return absl::FailedPreconditionError(config_.has_value() ? "a pool is attached already"
                                                             : "a pool before the configuration");
  }
  ASSIGN_OR_RETURN(pool_, links_.fetch_pool(attach));
  const int64_t expected_bytes = int64_t{attach.num_blocks} * model_->kv_block_bytes();
  if (pool_.size_bytes() != expected_bytes) {
    return absl::InvalidArgumentError(
        fmt::format("the pool has {} bytes, {} blocks of {} bytes need {}", pool_.size_bytes(),
                    attach.num_blocks, model_->kv_block_bytes(), expected_bytes));
  }
  const StepRunnerConfig config = {.group_epoch = config_->group_epoch,
                                   .pool_epoch = attach.pool_epoch,
                                   .num_blocks = attach.num_blocks,
                                   .max_slots = config_->max_slots,
                                   .max_tokens = config_->max_tokens,
                                   .max_sequence_tokens = config_->max_sequence_tokens,
                                   .sampled_vocab_size = config_->sampled_vocab_size};
  ASSIGN_OR_RETURN(runner_, StepRunner::Create(config, model_, group_, pool_.data()));
  RETURN_IF_ERROR(runner_->WarmUp());
  LOG_INFO("ready: {} slots, {} blocks of {} bytes", config.max_slots, config.num_blocks,
           model_->kv_block_bytes());
  // Next() reports why, should the stream have ended.
  queue_->SendReady(config.group_epoch, config.pool_epoch).IgnoreError();
  return absl::OkStatus();
}

absl::Status Worker::Execute(const ReceivedPlan& received) {
  if (runner_ == nullptr) return absl::FailedPreconditionError("a plan before the pool");
  step_started_ = received.plan.step;
  ASSIGN_OR_RETURN(const StepDone done, runner_->Apply(received.plan, received.plan_hash));
  step_done_ = done.step;
  queue_->SendStepDone(done).IgnoreError();
  return absl::OkStatus();
}

}  // namespace wintserve
