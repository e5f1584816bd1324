#include "launcher/supervisor.h"

#include <fmt/format.h>
#include <poll.h>
#include <signal.h>
#include <sys/random.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include <algorithm>

#include "common/check.h"
#include "common/exit_code.h"
#include "common/log.h"
#include "common/status_macros.h"

namespace wintserve {
namespace {

using std::chrono::milliseconds;

// How often a launcher of --role engine looks whether that of --role api has gone.
constexpr milliseconds kLookForLauncher(200);

// Beyond its own drain timeout; and for everybody who has nothing to drain.
constexpr milliseconds kStopGrace(5000);

// A child that ends cleanly though nobody asked has lost its peer: how long that one's own end may
// take to show.
constexpr milliseconds kCauseGrace(2000);

// A cache manager has to have been silent for that long before the API server says that it hangs.
constexpr milliseconds kHangPatience(3000);

sigset_t SupervisedSignals() {
  sigset_t signals;
  ::sigemptyset(&signals);
  for (const int number : {SIGINT, SIGTERM, SIGHUP}) ::sigaddset(&signals, number);
  return signals;
}

// The lowest is the likeliest cause when several children end at once.
int CauseRank(const ChildExit& ended) {
  if (ended.by_signal) return 1;
  if (IsStartUpCode(ended)) return 0;
  return ended.code != kExitOk ? 2 : 3;
}

// What a process has to do until others know of it.
const char* FirstTaskOf(ChildRole role) {
  switch (role) {
    case ChildRole::kApiServer:
      return "listen for engine workers and clients";
    case ChildRole::kEngineWorker:
      return "load its weights and attach to the API server";
    case ChildRole::kCacheManager:
      return "listen for the API server";
  }
  return "";
}

}  // namespace

void BlockSupervisedSignals() {
  const sigset_t signals = SupervisedSignals();
  ::pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  // Who reads our stderr may go away before us.
  ::signal(SIGPIPE, SIG_IGN);
  // Who shows how far we load may have given us his terminal, of which we are in the background.
  ::signal(SIGTTOU, SIG_IGN);
  // A limit on the size of files is a full disk to us.
  ::signal(SIGXFSZ, SIG_IGN);
}

Supervisor::Supervisor(Instance instance, Surroundings surroundings)
    : instance_(std::move(instance)),
      ports_(std::move(surroundings.ports)),
      server_(std::move(surroundings.server)),
      log_(surroundings.log),
      shared_(surroundings.shared),
      started_(Clock::now()),
      loading_(instance_.options.tensor_parallel_size, log_->tells_loading_in_own_lines()
                                                           ? LoadingBar::kLineInterval
                                                           : LoadingBar::kRowInterval) {
  const sigset_t signals = SupervisedSignals();
  signal_fd_.Reset(::signalfd(-1, &signals, SFD_CLOEXEC | SFD_NONBLOCK));
  CHECK(signal_fd_.valid(), "signalfd: errno={}", errno);
}

int Supervisor::Run() {
  if (const absl::Status status = StartAll(); !status.ok()) {
    LOG_ERROR("{}", std::string(status.message()));
    BeginStopping(kExitInternal);
  }
  while (AnyRunning(std::nullopt) || AnyToStart()) {
    WaitForNews();
    ReadSignals();
    KillHangingCacheManager();
    KillThoseThatHangAtTheirStart();
    KillUnwantedWorkers();
    ReapEnded();
    StartDueChildren();
    AdvanceStop();
    ShowLoading();
  }
  return exit_code_;
}

absl::Status Supervisor::StartAll() {
  if (instance_.options.role == "api") return Start(ChildRole::kApiServer, 0);
  RETURN_IF_ERROR(Start(ChildRole::kCacheManager, 0));
  if (StartsApiServer()) RETURN_IF_ERROR(Start(ChildRole::kApiServer, 0));
  for (int rank = 0; rank < instance_.options.tensor_parallel_size; ++rank) {
    RETURN_IF_ERROR(Start(ChildRole::kEngineWorker, rank));
  }
  return absl::OkStatus();
}

absl::Status Supervisor::Start(ChildRole role, int rank) {
  Child child = MakeChild(role, rank, instance_, ports_, log_);
  RETURN_IF_ERROR(SpawnChild(ports_, &child));
  children_.push_back(std::move(child));
  return absl::OkStatus();
}

void Supervisor::WaitForNews() {
  std::vector<pollfd> fds = {{signal_fd_.get(), POLLIN, 0}};
  for (const Child& child : children_) {
    if (child.process.running()) fds.push_back({child.process.pidfd(), POLLIN, 0});
    if (child.output.fd() >= 0) fds.push_back({child.output.fd(), POLLIN, 0});
  }
  std::optional<Clock::time_point> until;
  const auto look_by = [&until](std::optional<Clock::time_point> time) {
    if (time.has_value()) until = std::min(until.value_or(*time), *time);
  };
  if (server_.has_value()) look_by(server_->AddPollFds(&fds));
  if (stopping_ || !ended_.empty()) look_by(stopping_ ? kill_time_ : judge_time_);
  for (const Child& child : children_) {
    look_by(child.restart_time);
    if (child.process.running()) look_by(child.start_watch.next_look());
  }
  if (const auto next = loading_.next_time()) until = std::min(until.value_or(*next), *next);
  if (draining_ && !StartsApiServer() && stopping_role_ == ChildRole::kApiServer) {
    // Of the end of the other launcher nobody tells us.
    look_by(Clock::now() + kLookForLauncher);
  }
  int timeout_ms = -1;
  if (until.has_value()) {
    const auto left = std::chrono::ceil<milliseconds>(*until - Clock::now());
    timeout_ms = static_cast<int>(std::max<int64_t>(0, left.count()));
  }
  if (::poll(fds.data(), fds.size(), timeout_ms) <= 0) return;
  // First, while a number stands for what was polled.
  if (server_.has_value()) server_->Serve(fds);
  for (Child& child : children_) child.output.Read();
}

void Supervisor::ReadSignals() {
  signalfd_siginfo info;
  while (::read(signal_fd_.get(), &info, sizeof(info)) == sizeof(info)) {
    if (stopping_) {
      LOG_WARNING("{} again: stopping at once", ::strsignal(static_cast<int>(info.ssi_signo)));
      KillAll();
    } else {
      LOG_INFO("{}: finishing open requests, at most {} s; once more stops at once",
               ::strsignal(static_cast<int>(info.ssi_signo)),
               instance_.options.drain_timeout_ms / 1000.0);
      BeginDraining();
    }
  }
}

void Supervisor::ReapEnded() {
  std::optional<bool> memory_ran_out;  // asked once: it may have taken several
  for (Child& child : children_) {
    if (!child.process.running()) continue;
    const std::optional<ChildExit> ended = child.process.Wait(0);
    if (!ended.has_value()) continue;
    if (!memory_ran_out.has_value()) memory_ran_out = oom_kills_.TakeNew() > 0;
    const bool killed = ended->by_signal && ended->code == SIGKILL;
    HandleExit(&child, *ended, killed && *memory_ran_out);
  }
  if (!stopping_ && !ended_.empty() && (CauseIsKnown() || Clock::now() >= judge_time_)) {
    JudgeUnexpected();
  }
}

void Supervisor::HandleExit(Child* child, const ChildExit& how, bool out_of_memory) {
  child->output.Finish();  // its last words come before ours
  if (child->role == ChildRole::kEngineWorker) {
    proto::WorkerExit worker_exit;
    worker_exit.set_rank(child->instance.rank);
    worker_exit.set_worker_id(child->instance.worker_id);
    (how.by_signal ? worker_exit.set_signal(how.code) : worker_exit.set_code(how.code));
    worker_exit.set_kv_trusted(KvIsTrusted(how) && !child->at_fault);
    server_->SendWorkerExit(worker_exit);
    loading_.Remove(child->instance.rank);
  }
  if (IsReplaceable(*child, how)) {
    Replace(
        child, how, out_of_memory,
        fmt::format("died of {}{}", how.ToString(), out_of_memory ? " for want of memory" : ""));
  } else if (!stopping_) {
    if (ended_.empty()) judge_time_ = Clock::now() + kCauseGrace;
    ended_.emplace_back(child, how);
  } else if (draining_) {
    JudgeDrained(*child, how);
  } else {
    LOG_DEBUG("{} ended: {}", child->name, how.ToString());
  }
}

void Supervisor::KillHangingCacheManager() {
  if (!server_.has_value() || !server_->TakeRestartRequest()) return;
  for (Child& child : children_) {
    if (child.role != ChildRole::kCacheManager || child.stopped || !child.process.running()) {
      continue;
    }
    // One that young is not the one that has been silent: that one has been replaced already.
    if (Clock::now() - child.started < kHangPatience) continue;
    LOG_WARNING("the API server says that the {} hangs: killing it", child.name);
    child.process.Signal(SIGKILL);
  }
}

void Supervisor::KillThoseThatHangAtTheirStart() {
  const auto now = Clock::now();
  for (Child& child : children_) {
    const std::optional<Clock::time_point> look = child.start_watch.next_look();
    if (!child.process.running() || child.stopped || !look.has_value() || now < *look) continue;
    if (child.start_watch.Look(TakeStartSigns(child.start_signs.get()), now)) {
      LOG_WARNING(
          "{} hangs: no sign of life for {} s while it starts, and it has yet to {}; killing it "
          "(--stall-timeout, at most 60 s)",
          child.name, StartLimit(instance_.options.stall_timeout_ms).count() / 1000.0,
          FirstTaskOf(child.role));
      child.hung = true;
      child.process.Signal(SIGKILL);
    }
    if (!child.start_watch.next_look().has_value()) child.start_signs.Reset();
  }
}

void Supervisor::KillUnwantedWorkers() {
  if (!server_.has_value()) return;
  for (const SupervisorServer::EndRequest& request : server_->TakeEndRequests()) {
    for (Child& child : children_) {
      if (child.role != ChildRole::kEngineWorker || child.instance.rank != request.rank) continue;
      // Another process by now: that one is not meant.
      if (child.instance.worker_id != request.worker_id || !child.process.running()) continue;
      LOG_WARNING("the API server wants {} to go{}: killing it", child.name,
                  request.at_fault ? ", which hangs or computes wrongly" : "");
      child.at_fault = child.at_fault || request.at_fault;
      child.process.Signal(SIGKILL);
    }
  }
}

void Supervisor::ShowLoading() {
  if (!server_.has_value()) return;
  const std::vector<SupervisorServer::LoadReport> reports = server_->TakeLoadReports();
  const auto shape = log_->row_shape();
  if (!shape.has_value() && !log_->tells_loading_in_own_lines()) return;
  const auto now = Clock::now();
  for (const SupervisorServer::LoadReport& report : reports) {
    for (const Child& child : children_) {
      if (child.role != ChildRole::kEngineWorker || child.instance.rank != report.rank) continue;
      // Of a process that has been replaced, or of none of ours.
      if (child.instance.worker_id != report.worker_id || !child.process.running()) continue;
      loading_.Report(child.instance.rank, report.done_bytes, report.total_bytes, now);
    }
  }
  if (stopping_) loading_.Clear();
  if (!loading_.IsDue(now)) return;
  if (shape.has_value()) {
    log_->ShowLoadingRow(loading_.Row(now, shape->columns, shape->utf8));
  } else if (const std::string line = loading_.Line(now); !line.empty()) {
    log_->WriteLoadingLine(line);
  }
}

bool Supervisor::IsReplaceable(const Child& child, const ChildExit& how) const {
  if (child.stopped) return false;
  const bool cache_manager = child.role == ChildRole::kCacheManager;
  if (instance_.mode == "generate" && !cache_manager) return false;
  if (stopping_) {
    // Requests that are being finished need it too.
    if (!draining_ || !MayHaveRequests()) return false;
    // The API server, on its own way out, has told the worker to end.
    if (!cache_manager && !how.by_signal && how.code == kExitOk) return false;
  }
  // What it finds at its first start-up, it would find again.
  return child.num_starts > 1 || !IsStartUpCode(how);
}

void Supervisor::Replace(Child* child, const ChildExit& how, bool out_of_memory,
                         const std::string& what_happened) {
  const auto now = Clock::now();
  const bool self_inflicted = child->at_fault || child->hung || IsSelfInflicted(how);
  const std::optional<milliseconds> pause =
      child->policy.OnExit(self_inflicted, out_of_memory, child->started, now,
                           std::uniform_real_distribution<double>()(random_));
  if (!pause.has_value()) {
    LOG_ERROR("{} {}, the {}th fault of its own within {} minutes: a crash loop; the instance ends",
              child->name, what_happened, RestartPolicy::kMaxSelfInflicted + 1,
              RestartPolicy::kWindow.count());
    draining_ = false;
    return BeginStopping(kExitCrashLoop);
  }
  LOG_WARNING("{} {}; starting it again{}", child->name, what_happened,
              pause->count() == 0 ? "" : fmt::format(" in {:.1f} s", pause->count() / 1000.0));
  child->restart_time = now + *pause;
}

void Supervisor::StartDueChildren() {
  for (Child& child : children_) {
    if (!child.restart_time.has_value()) continue;
    // Nobody needs it any more.
    const bool is_over = stopping_ && !(draining_ && MayHaveRequests());
    if (!is_over && Clock::now() < *child.restart_time) continue;
    child.restart_time.reset();
    if (is_over) continue;
    if (const absl::Status status = SpawnChild(ports_, &child); !status.ok()) {
      // For want of memory or processes, perhaps, which may pass.
      child.started = Clock::now();
      Replace(&child, {.by_signal = false, .code = kExitInternal}, /*out_of_memory=*/false,
              fmt::format("could not be started: {}", std::string(status.message())));
    }
  }
}

bool Supervisor::CauseIsKnown() const {
  const bool only_clean = std::all_of(ended_.begin(), ended_.end(), [](const auto& end) {
    return end.first->role != ChildRole::kApiServer && !end.second.by_signal &&
           end.second.code == kExitOk;
  });
  return !only_clean || !AnyRunning(std::nullopt);
}

void Supervisor::JudgeUnexpected() {
  for (const auto& [child, how] : ended_) {
    // The answer has been printed; the others may have gone with the API server.
    if (instance_.mode == "generate" && child->role == ChildRole::kApiServer && !how.by_signal &&
        how.code == kExitOk) {
      BeginStopping(kExitOk);
      return;
    }
  }
  const auto& [child, how] = *std::min_element(
      ended_.begin(), ended_.end(),
      [](const auto& a, const auto& b) { return CauseRank(a.second) < CauseRank(b.second); });
  const bool start_up = IsStartUpCode(how) && how.code != kExitNeverReady;
  const double seconds = std::chrono::duration<double>(Clock::now() - started_).count();
  LOG_ERROR("{} died of {}, {}{:.1f} s after the start; the instance ends", child->name,
            how.ToString(), start_up ? "while starting, " : "", seconds);
  BeginStopping(start_up ? how.code : kExitInternal);
}

void Supervisor::JudgeDrained(const Child& child, const ChildExit& ended) {
  const bool api_server = child.role == ChildRole::kApiServer;
  if (api_server && !ended.by_signal && ended.code == kExitDrainTimeout) {
    exit_code_ = kExitDrainTimeout;
    return;
  }
  // SIGTERM may come before a child has its handler. Once the API server has gone, the others may
  // end of themselves, for they have lost their peer.
  const bool crashed = ended.by_signal && ended.code != SIGTERM;
  const bool failed = !ended.by_signal && ended.code != kExitOk;
  // An engine worker ends when the API server, on its own way out, tells it to.
  const bool early = !child.stopped && child.role != ChildRole::kEngineWorker && MayHaveRequests();
  // With the API server gone every request has been answered; what the others hold is of no use.
  if (crashed && !api_server && !MayHaveRequests()) {
    LOG_WARNING("{} died of {} after the last request had ended", child.name, ended.ToString());
    return;
  }
  if (!crashed && !early && !(api_server && failed)) {
    LOG_DEBUG("{} ended: {}", child.name, ended.ToString());
    return;
  }
  LOG_ERROR("{} died of {} while the instance was stopping", child.name, ended.ToString());
  draining_ = false;  // nobody is left to finish the requests
  BeginStopping(kExitInternal);
}

void Supervisor::BeginDraining() {
  stopping_ = true;
  draining_ = true;
  stopping_role_ = ChildRole::kApiServer;
  // Our copies would keep queueing clients whom nobody will serve any more.
  ports_.http.Reset();
  ports_.metrics.Reset();
  kill_time_ = Clock::now() + milliseconds(instance_.options.drain_timeout_ms) + kStopGrace;
  StopRole(stopping_role_);
}

void Supervisor::BeginStopping(int exit_code) {
  stopping_ = true;
  exit_code_ = exit_code;
  kill_time_ = Clock::now() + kStopGrace;
  for (Child& child : children_) {
    child.stopped = true;
    child.process.Signal(SIGTERM);
    // Nobody is left to compute what its clients wait for: by a second signal it tells them so at
    // once. Another one, for two of the same number that are pending are one.
    if (child.role == ChildRole::kApiServer) child.process.Signal(SIGINT);
  }
}

void Supervisor::AdvanceStop() {
  if (!stopping_) return;
  if (Clock::now() >= kill_time_) {
    for (Child& child : children_) {
      if (!child.process.running() || !child.stopped) continue;
      LOG_WARNING("{} did not stop in time: killed", child.name);
      KillAndReap(&child);
      if (draining_ && child.role == ChildRole::kApiServer) exit_code_ = kExitDrainTimeout;
    }
  }
  // The next role's turn, and past roles that have no process.
  while (draining_ && IsOver(stopping_role_) && stopping_role_ != ChildRole::kCacheManager) {
    stopping_role_ = stopping_role_ == ChildRole::kApiServer ? ChildRole::kEngineWorker
                                                             : ChildRole::kCacheManager;
    kill_time_ = Clock::now() + kStopGrace;
    StopRole(stopping_role_);
  }
}

void Supervisor::StopRole(ChildRole role) {
  for (Child& child : children_) {
    if (child.role != role) continue;
    child.stopped = true;
    child.process.Signal(SIGTERM);
  }
}

void Supervisor::KillAll() {
  draining_ = false;  // nor is anybody started for the requests that are left
  for (Child& child : children_) {
    child.stopped = true;
    child.restart_time.reset();
    child.process.Signal(SIGKILL);
  }
  for (Child& child : children_) KillAndReap(&child);
}

void Supervisor::KillAndReap(Child* child) {
  child->process.Signal(SIGKILL);
  child->process.Wait(-1);
  child->output.Finish();
}

bool Supervisor::AnyRunning(std::optional<ChildRole> role) const {
  return std::any_of(children_.begin(), children_.end(), [&](const Child& child) {
    return child.process.running() && (!role.has_value() || child.role == *role);
  });
}

bool Supervisor::AnyToStart() const {
  return std::any_of(children_.begin(), children_.end(),
                     [](const Child& child) { return child.restart_time.has_value(); });
}

bool Supervisor::IsOver(ChildRole role) const {
  if (role != ChildRole::kApiServer || StartsApiServer()) return !AnyRunning(role);
  const bool workers_have_ended = !AnyRunning(ChildRole::kEngineWorker) && !AnyToStart();
  return workers_have_ended || !MayHaveRequests();
}

bool Supervisor::MayHaveRequests() const {
  if (stopping_role_ != ChildRole::kApiServer) return false;
  if (StartsApiServer()) return AnyRunning(ChildRole::kApiServer);
  return Clock::now() < kill_time_ && shared_->OtherRuns();
}

}  // namespace wintserve
