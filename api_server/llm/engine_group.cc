// The engine's dealings with the rank group: what its workers say, how it is lost and made anew.
#include <fmt/core.h>

#include <algorithm>
#include <utility>

#include "api_server/llm/engine.h"
#include "common/log.h"

namespace wintserve {
namespace {

// A worker's thread beats every 250 ms, whatever its step does.
constexpr int64_t kHeartbeatPatienceUs = 3'000'000;

// If this thread has been kept from running for so long, answers may lie where nobody has looked.
constexpr int64_t kOwnPauseUs = 500'000;

// What a rank that went wrong may have written unnoticed before.
constexpr uint64_t kDistrustedSteps = 256;

double Seconds(int64_t microseconds) { return static_cast<double>(microseconds) / 1e6; }

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

}  // namespace

void Engine::Handle(const WorkerAttached& event) {
  if (failed_) return;
  const WorkerHello& hello = event.hello;
  LOG_INFO("engine worker {} of {} is attached: {}", hello.rank, config_.startup.world_size,
           hello.backend);
  if (absl::Status status = startup_.OnHello(hello); !status.ok()) {
    return Fatal(std::string(status.message()));
  }
  beats_[hello.rank].last_us = EngineNowUs();
  is_silent_[hello.rank] = false;
  work_queue_->Accept(hello.rank);
  group_.OnHello(hello.rank, hello.worker_id, EngineNowUs());
  pool_.OnHello(hello.rank, hello.mapped_pool_epoch);
}

void Engine::Handle(WorkerReady event) {
  if (!group_.OnReady(event.rank, event.ready.group_epoch, event.ready.pool_epoch)) {
    return metrics_->RecordStaleMessage();
  }
  attach_us_ = EngineNowUs();
}

void Engine::Handle(WorkerLetGo event) {
  if (!pool_.OnDetached(event.rank, event.detached.pool_epoch)) {
    return metrics_->RecordStaleMessage();
  }
  detach_us_ = EngineNowUs();
}

void Engine::Handle(WorkerAborted event) {
  if (!group_.OnAborted(event.rank, event.aborted.group_epoch)) metrics_->RecordStaleMessage();
}

void Engine::Handle(WorkerFault event) {
  GroupFault(FaultCause::kReported, event.fault.kv_trusted,
             fmt::format("engine worker {} reports a fault ({}): {}", event.rank,
                         NameOf(event.fault.kind), event.fault.text));
}

void Engine::Handle(const WorkerStreamEnded& event) {
  if (failed_) return;
  LOG_WARNING("engine worker {} is gone: {}", event.rank, event.reason);
  group_.OnDisconnected(event.rank, event.reason, EngineNowUs());
  pool_.OnDisconnected(event.rank);
}

void Engine::Handle(const WorkerExited& event) {
  const bool is_known =
      group_.OnExit(event.rank, event.worker_id, event.kv_trusted, event.text, EngineNowUs());
  if (is_known) LOG_WARNING("engine worker {} {}", event.rank, event.text);
}

void Engine::Handle(ExitsAreTold event) { group_.OnWatching(event.watching, EngineNowUs()); }

void Engine::Handle(WorkerStepDone event) {
  if (failed_) return;
  if (!group_.has_group() || event.done.group_epoch != steps_.group_epoch()) {
    return metrics_->RecordStaleMessage();
  }
  if (absl::Status status = steps_.Take(event.rank, std::move(event.done)); !status.ok()) {
    return GroupFault(FaultCause::kDivergence, /*kv_trusted=*/false, std::string(status.message()));
  }
  FinishSteps();
}

void Engine::GroupFault(FaultCause cause, bool kv_trusted, const std::string& text) {
  if (failed_) return;
  LOG_ERROR("{}", text);
  group_.OnFault(cause, kv_trusted, text, EngineNowUs());
}

bool Engine::AdvanceGroup() {
  group_.SetPool(pool_.attachable_pool());
  const std::optional<int64_t> fault_time_us = group_.fault_time_us();
  const int64_t now_us = EngineNowUs();
  const GroupLifecycle::Action action = group_.NextAction(now_us);
  for (uint32_t rank = 0; rank < config_.startup.world_size; ++rank) {
    if (group_.gone(rank)) pool_.OnGone(rank);
  }
  if (action == GroupLifecycle::Action::kNone) return false;
  Perform(action);
  if (action == GroupLifecycle::Action::kUseGroup && fault_time_us.has_value() &&
      scheduler_ != nullptr) {
    LOG_INFO("recovered within {:.3f} s: the rank group of epoch {:016x} goes on",
             Seconds(now_us - *fault_time_us), group_.epoch());
    metrics_->RecordRecovery(Seconds(now_us - *fault_time_us));
  }
  return true;
}

void Engine::Perform(GroupLifecycle::Action action) {
  using Action = GroupLifecycle::Action;
  switch (action) {
    case Action::kNone:
      return;
    case Action::kAbortGroup:
      return work_queue_->Send(group_.rank(),
                               AbortGroup{.group_epoch = group_.epoch(), .reason = group_.fault()});
    case Action::kEndWorker:
      return EndWorker(group_.rank(), group_.worker_id(), group_.at_fault());
    case Action::kLoseGroup:
      return LoseGroup();
    case Action::kDistrustGroup:
      LOG_WARNING("the last KV of the rank group of epoch {:016x} is not trusted any more",
                  group_.epoch());
      return DistrustGroup();
    case Action::kConfigure:
      steps_ = StepTracker(config_.startup.world_size, group_.epoch());
      last_plan_hash_ = 0;
      step_deadline_.OnNewGroup();
      pool_.OnWorkersAttached();
      return work_queue_->Send(startup_.configuration(group_.epoch()));
    case Action::kAttachPool: {
      const OpenedPool& pool = pool_.pool();
      pool_.OnPoolSent();
      attach_us_ = EngineNowUs();
      return work_queue_->Send(AttachPool{.pool_epoch = pool.pool_epoch,
                                          .memory_socket = pool.memory_socket,
                                          .num_blocks = pool.num_blocks,
                                          .num_host_slots = pool.num_host_slots});
    }
    case Action::kUseGroup:
      return pool_.OnPoolAttached();
  }
}

void Engine::EndWorker(uint32_t rank, uint64_t worker_id, bool at_fault) {
  LOG_WARNING("engine worker {} {}: it is ended", rank,
              at_fault ? "hangs or computes wrongly" : "does not leave its group");
  if (processes_ != nullptr) processes_->End(rank, worker_id, at_fault);
  // Nobody ends it: at least it is heard no more.
  if (!group_.watching()) work_queue_->Cut(rank);
}

// Nothing of the old group runs any more: its plans are void.
void Engine::LoseGroup() {
  const bool kv_trusted = group_.kv_trusted();
  LOG_WARNING("the rank group of epoch {:016x} is lost, {}: {}", group_.epoch(),
              kv_trusted ? "its KV is kept" : "its last KV is not trusted", group_.fault());
  metrics_->RecordGroupLoss(group_.fault_cause());
  steps_ = StepTracker(config_.startup.world_size, /*group_epoch=*/0);
  if (!kv_trusted) return DistrustGroup();
  if (scheduler_ == nullptr) return;
  const std::vector<uint64_t> in_flight = scheduler_->RequestsInFlight();
  scheduler_->OnGroupLost(/*kv_trusted=*/true);
  // Who is killed meanwhile proves nothing of the step; but what hangs a device may do so again.
  if (group_.fault_cause() == FaultCause::kDeadline) SuspectRequests(in_flight);
}

void Engine::DistrustGroup() {
  DistrustLastSteps();
  if (scheduler_ == nullptr) return;
  const std::vector<uint64_t> in_flight = scheduler_->RequestsInFlight();
  scheduler_->OnGroupLost(/*kv_trusted=*/false);
  SuspectRequests(in_flight);
}

// The numbers of steps leap from one API server to the next, so that nobody can tell the last steps
// of before: then nothing that the pool holds is trusted.
void Engine::DistrustLastSteps() {
  const bool are_own =
      first_step_ != 0 && last_acknowledged_step_ + 1 >= first_step_ + kDistrustedSteps;
  const uint64_t first_step = are_own ? last_acknowledged_step_ - kDistrustedSteps + 1 : 1;
  // Kept, too: a session that breaks now may not have brought it there.
  first_distrusted_step_ = std::min(first_step, first_distrusted_step_.value_or(first_step));
  if (pool_.has_session()) cache_->DistrustSteps(first_step);
}

void Engine::SuspectRequests(const std::vector<uint64_t>& in_flight) {
  const std::optional<uint64_t> culprit = poison_guard_.OnFault(in_flight);
  for (const uint64_t request : in_flight) {
    if (!requests_.contains(request)) poison_guard_.OnEnded(request);  // had ended before
  }
  if (!culprit.has_value() || !requests_.contains(*culprit)) return;
  LOG_ERROR("request {} fails: the engine workers failed whenever it ran, also alone", *culprit);
  metrics_->RecordPoisonRequest();
  FailRequest(*culprit, absl::InternalError(
                            "the engine workers failed whenever this request ran, also alone"));
}

void Engine::CheckStepDeadline(int64_t now_us) {
  if (!group_.has_group()) return;
  const std::optional<RunningStep> running = steps_.running();
  if (!running.has_value()) return;
  if (late_us_ > kOwnPauseUs) return steps_.RestartClock(now_us);
  const int64_t allowed_us = step_deadline_.AllowedUs(running->shape, now_us);
  if (now_us < running->began_us + allowed_us) return;
  step_deadline_.OnOverdue(now_us);
  GroupFault(FaultCause::kDeadline, /*kv_trusted=*/true,
             fmt::format("engine worker {} has not done step {} within {:.1f} s",
                         running->missing_rank, running->step, Seconds(allowed_us)));
}

// A heartbeat that is missing only raises suspicion: the step's deadline decides.
void Engine::CheckHeartbeats(int64_t now_us) {
  if (steps_.idle()) return;
  for (uint32_t rank = 0; rank < is_silent_.size(); ++rank) {
    const int64_t silence_us = now_us - beats_[rank].last_us;
    const bool is_silent = silence_us >= kHeartbeatPatienceUs && group_.attached(rank);
    if (is_silent && !is_silent_[rank]) {
      LOG_WARNING("no heartbeat of engine worker {} for {:.1f} s", rank, Seconds(silence_us));
    }
    is_silent_[rank] = is_silent;
  }
}

void Engine::TakeBeat(uint32_t rank, const HeartbeatMessage& beat) {
  Beats& beats = beats_[rank];
  const int64_t now_us = EngineNowUs();
  beats.last_us = now_us;
  if (beats.progress.exchange(beat.progress) != beat.progress) beats.progress_us = now_us;
}

// All together: the others wait for the one that hangs. Which one that is shows when they are told
// to leave.
void Engine::CheckStall(int64_t now_us) {
  const std::optional<int64_t> due_us = NextStallUs();
  if (!due_us.has_value() || now_us < *due_us) return;
  if (late_us_ > kOwnPauseUs) {
    attach_us_ = now_us;
    return;
  }
  GroupFault(FaultCause::kStall, /*kv_trusted=*/true,
             fmt::format("{}, and has got no further for {} s (--stall-timeout)",
                         group_.WaitingFor(), Seconds(1'000 * config_.stall_timeout_ms)));
}

std::optional<int64_t> Engine::NextStallUs() const {
  if (config_.stall_timeout_ms == 0 || !group_.attaching()) return std::nullopt;
  int64_t last_us = attach_us_;
  for (uint32_t rank = 0; rank < config_.startup.world_size; ++rank) {
    last_us = std::max<int64_t>(last_us, beats_[rank].progress_us);
  }
  return last_us + 1'000 * config_.stall_timeout_ms;
}

// Of the stall of a group, which ends those that wait for the one that hangs as well, only if there
// is a group.
void Engine::CheckDetach(int64_t now_us) {
  const std::optional<int64_t> due_us = NextDetachLimitUs();
  if (!due_us.has_value() || now_us < *due_us) return;
  detach_us_ = now_us;
  if (late_us_ > kOwnPauseUs) return;
  const uint32_t rank = *pool_.awaited_detach();
  const std::string text = fmt::format(
      "engine worker {} has not let go of KV pool {:016x}, which is lost, and has got no further "
      "for {} s (--stall-timeout)",
      rank, pool_.mapped_pool(rank), Seconds(1'000 * config_.stall_timeout_ms));
  if (group_.has_group()) {
    detach_us_ +=
        GroupLifecycle::kPatienceUs;  // for whoever was kept from it by the one that hangs
    return GroupFault(FaultCause::kStall, /*kv_trusted=*/true, text);
  }
  LOG_ERROR("{}", text);
  EndWorker(rank, group_.worker_id(rank), /*at_fault=*/true);
}

std::optional<int64_t> Engine::NextDetachLimitUs() const {
  const std::optional<uint32_t> rank = pool_.awaited_detach();
  if (config_.stall_timeout_ms == 0 || !rank.has_value()) return std::nullopt;
  return std::max<int64_t>(detach_us_, beats_[*rank].progress_us) +
         1'000 * config_.stall_timeout_ms;
}

void Engine::FailHeldRequests(int64_t now_us) {
  const std::optional<int64_t> due_us = NextHoldEndUs();
  if (!due_us.has_value() || now_us < *due_us) return;
  const absl::Status error = absl::UnavailableError(
      fmt::format("the engine workers have not recovered within {:.0f} s: {}",
                  static_cast<double>(config_.fault_hold_ms) / 1e3, group_.fault()));
  while (!requests_.empty() && now_us >= *NextHoldEndUs()) {
    FailRequest(requests_.begin()->first, error);
  }
}

// Of the request that has waited longest; ids rise with the time of arrival.
std::optional<int64_t> Engine::NextHoldEndUs() const {
  const std::optional<int64_t> fault_time_us = group_.fault_time_us();
  if (!fault_time_us.has_value() || requests_.empty()) return std::nullopt;
  return std::max(*fault_time_us, requests_.begin()->second->arrived_us) +
         1'000 * config_.fault_hold_ms;
}

std::optional<int64_t> Engine::NextGroupDeadlineUs() const {
  std::optional<int64_t> next;
  const auto add = [&next](std::optional<int64_t> time_us) {
    if (time_us.has_value()) next = std::min(*time_us, next.value_or(*time_us));
  };
  add(group_.NextDeadlineUs());
  add(NextHoldEndUs());
  add(next_opening_try_us_);
  add(NextStallUs());
  add(NextDetachLimitUs());
  const std::optional<RunningStep> running = steps_.running();
  if (!group_.has_group() || !running.has_value()) return next;
  add(running->began_us + step_deadline_.AllowedUs(running->shape, EngineNowUs()));
  for (uint32_t rank = 0; rank < is_silent_.size(); ++rank) {
    if (!is_silent_[rank]) add(beats_[rank].last_us + kHeartbeatPatienceUs);
  }
  return next;
}

void Engine::ReportReadiness() {
  const bool is_recovering = scheduler_ != nullptr && group_.fault_time_us().has_value();
  const bool is_ready = scheduler_ != nullptr && !is_recovering;
  if (is_ready && is_reported_ready_) return;
  is_reported_ready_ = is_ready;
  if (is_ready) return SetReadiness({.ready = true});
  std::string reason = group_.WaitingFor();
  if (reason.empty()) reason = pool_.WaitingFor();
  if (group_.fault_time_us().has_value()) reason = fmt::format("{}; {}", group_.fault(), reason);
  SetReadiness({.reason = std::move(reason), .is_recovering = is_recovering});
}

}  // namespace wintserve
