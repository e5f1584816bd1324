#include "launcher/supervisor.h"

#include <fmt/format.h>
#include <poll.h>
#include <signal.h>
#include <sys/random.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>

#include "common/check.h"
#include "common/exit_code.h"
#include "common/heap.h"
#include "common/log.h"
#include "common/status_macros.h"

namespace wintserve {
namespace {

using std::chrono::milliseconds;

// Beyond its own drain timeout; and for everybody who has nothing to drain.
constexpr milliseconds kStopGrace(5000);

// A child that ends cleanly though nobody asked has lost its peer: how long that one's own end may
// take to show.
constexpr milliseconds kCauseGrace(2000);

// A cache manager has to have been silent for that long before the API server says that it hangs.
constexpr milliseconds kHangPatience(3000);

// More deaths of the cache manager within the window end the instance.
constexpr size_t kMaxCacheManagerDeaths = 5;
constexpr std::chrono::minutes kDeathWindow(10);
// Before the restart that follows the second death within the window, and twice as long with every
// further one: what killed it may be about to pass. The first restart is at once.
constexpr milliseconds kFirstRestartPause(500);

// Numbers of the descriptors in a child.
constexpr int kInstanceFd = 3;
constexpr int kHttpFd = 4;
constexpr int kMetricsFd = 5;

sigset_t SupervisedSignals() {
  sigset_t signals;
  ::sigemptyset(&signals);
  for (const int number : {SIGINT, SIGTERM, SIGHUP}) ::sigaddset(&signals, number);
  return signals;
}

// Never 0, which says that there is none.
uint64_t RandomWorkerId() {
  uint64_t id = 0;
  while (id == 0) {
    CHECK(::getrandom(&id, sizeof(id), 0) == sizeof(id), "getrandom: errno={}", errno);
  }
  return id;
}

// Codes by which a child says what it found at start-up; they become ours.
bool IsStartUpCode(int code) {
  return code == kExitUsage || code == kExitCheckpoint || code == kExitUnavailable ||
         code == kExitConfigFile;
}

// The lowest is the likeliest cause when several children end at once.
int CauseRank(const ChildExit& ended) {
  if (ended.by_signal) return 1;
  if (IsStartUpCode(ended.code)) return 0;
  return ended.code != kExitOk ? 2 : 3;
}

}  // namespace

void BlockSupervisedSignals() {
  const sigset_t signals = SupervisedSignals();
  ::pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  // Who reads our stderr may go away before us.
  ::signal(SIGPIPE, SIG_IGN);
}

Supervisor::Supervisor(Instance instance, ReservedPorts ports, SupervisorServer server)
    : instance_(std::move(instance)),
      ports_(std::move(ports)),
      server_(std::move(server)),
      started_(Clock::now()) {
  const sigset_t signals = SupervisedSignals();
  signal_fd_.Reset(::signalfd(-1, &signals, SFD_CLOEXEC | SFD_NONBLOCK));
  CHECK(signal_fd_.valid(), "signalfd: errno={}", errno);
}

int Supervisor::Run() {
  if (const absl::Status status = StartAll(); !status.ok()) {
    LOG_ERROR("{}", std::string(status.message()));
    BeginStopping(kExitInternal);
  }
  while (AnyRunning(std::nullopt)) {
    WaitForNews();
    ReadSignals();
    KillHangingCacheManager();
    ReapEnded();
    StartDueChildren();
    AdvanceStop();
  }
  return exit_code_;
}

absl::Status Supervisor::StartAll() {
  Instance api_server = instance_;
  api_server.http_fd = ports_.http.valid() ? kHttpFd : -1;
  api_server.metrics_fd = ports_.metrics.valid() ? kMetricsFd : -1;
  RETURN_IF_ERROR(
      Start("cache manager", "wintserve-cache-manager", Role::kCacheManager, instance_));
  RETURN_IF_ERROR(
      Start("api server", "wintserve-api-server", Role::kApiServer, std::move(api_server)));
  for (int rank = 0; rank < instance_.options.tensor_parallel_size; ++rank) {
    Instance worker = instance_;
    worker.rank = rank;
    RETURN_IF_ERROR(Start(fmt::format("engine worker {}", rank), "wintserve-engine-worker",
                          Role::kEngineWorker, std::move(worker)));
  }
  return absl::OkStatus();
}

absl::Status Supervisor::Start(const std::string& name, const std::string& program, Role role,
                               Instance instance) {
  Child child;
  child.name = name;
  child.role = role;
  child.program = program;
  child.instance = std::move(instance);
  RETURN_IF_ERROR(Spawn(&child));
  children_.push_back(std::move(child));
  return absl::OkStatus();
}

absl::Status Supervisor::Spawn(Child* child) {
  Instance& instance = child->instance;
  if (child->role == Role::kEngineWorker) instance.worker_id = RandomWorkerId();
  ASSIGN_OR_RETURN(const UniqueFd instance_fd, WriteInstance(instance));
  std::error_code error;
  const std::filesystem::path self = std::filesystem::read_symlink("/proc/self/exe", error);
  if (error) return absl::InternalError("cannot read /proc/self/exe: " + error.message());
  ChildOptions options;
  options.argv = {(self.parent_path() / child->program).string(),
                  fmt::format("--instance-fd={}", kInstanceFd)};
  options.environment = {HeapTunables(
      child->role == Role::kCacheManager ? HeapArenas::kOne : HeapArenas::kGlibcsChoice,
      std::getenv("GLIBC_TUNABLES"))};
  options.descriptors.push_back({instance_fd.get(), kInstanceFd});
  if (instance.http_fd >= 0) options.descriptors.push_back({ports_.http.get(), kHttpFd});
  if (instance.metrics_fd >= 0) options.descriptors.push_back({ports_.metrics.get(), kMetricsFd});
  ASSIGN_OR_RETURN(child->process, ChildProcess::Spawn(options));
  child->started = Clock::now();
  LOG_DEBUG("{} is process {}", child->name, child->process.pid());
  return absl::OkStatus();
}

void Supervisor::WaitForNews() {
  std::vector<pollfd> fds = {{signal_fd_.get(), POLLIN, 0}};
  for (const Child& child : children_) {
    if (child.process.running()) fds.push_back({child.process.pidfd(), POLLIN, 0});
  }
  server_.AddPollFds(&fds);
  std::optional<Clock::time_point> until;
  if (stopping_ || !ended_.empty()) until = stopping_ ? kill_time_ : judge_time_;
  for (const Child& child : children_) {
    if (!child.restart_time.has_value()) continue;
    until = std::min(until.value_or(*child.restart_time), *child.restart_time);
  }
  int timeout_ms = -1;
  if (until.has_value()) {
    const auto left = std::chrono::ceil<milliseconds>(*until - Clock::now());
    timeout_ms = static_cast<int>(std::max<int64_t>(0, left.count()));
  }
  if (::poll(fds.data(), fds.size(), timeout_ms) > 0) server_.Serve(fds);
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
  for (Child& child : children_) {
    if (!child.process.running()) continue;
    const std::optional<ChildExit> ended = child.process.Wait(0);
    if (!ended.has_value()) continue;
    if (IsReplaceable(child, *ended)) {
      ReplaceCacheManager(&child, *ended);
    } else if (!stopping_) {
      if (ended_.empty()) judge_time_ = Clock::now() + kCauseGrace;
      ended_.emplace_back(&child, *ended);
    } else if (draining_) {
      JudgeDrained(child, *ended);
    } else {
      LOG_DEBUG("{} ended: {}", child.name, ended->ToString());
    }
  }
  if (!stopping_ && !ended_.empty() && (CauseIsKnown() || Clock::now() >= judge_time_)) {
    JudgeUnexpected();
  }
}

void Supervisor::KillHangingCacheManager() {
  if (!server_.TakeRestartRequest()) return;
  for (Child& child : children_) {
    if (child.role != Role::kCacheManager || child.stopped || !child.process.running()) continue;
    // One that young is not the one that has been silent: that one has been replaced already.
    if (Clock::now() - child.started < kHangPatience) continue;
    LOG_WARNING("the API server says that the {} hangs: killing it", child.name);
    child.process.Signal(SIGKILL);
  }
}

bool Supervisor::IsReplaceable(const Child& child, const ChildExit& how) const {
  if (child.role != Role::kCacheManager || child.stopped) return false;
  // Requests that are being finished need it too.
  if (stopping_ && !(draining_ && AnyRunning(Role::kApiServer))) return false;
  // What it finds at its first start-up, it would find again.
  const bool start_up = !how.by_signal && IsStartUpCode(how.code);
  return !start_up || !cache_manager_deaths_.empty();
}

void Supervisor::ReplaceCacheManager(Child* child, const ChildExit& how) {
  const auto now = Clock::now();
  cache_manager_deaths_.push_back(now);
  while (now - cache_manager_deaths_.front() > kDeathWindow) cache_manager_deaths_.pop_front();
  if (cache_manager_deaths_.size() > kMaxCacheManagerDeaths) {
    LOG_ERROR("{} died of {}, for the {}th time within {} minutes; the instance ends", child->name,
              how.ToString(), cache_manager_deaths_.size(), kDeathWindow.count());
    draining_ = false;
    return BeginStopping(kExitInternal);
  }
  const size_t num_deaths = cache_manager_deaths_.size();
  const milliseconds pause =
      num_deaths == 1 ? milliseconds(0) : kFirstRestartPause * (1 << (num_deaths - 2));
  LOG_WARNING("{} died of {}; starting it again{}", child->name, how.ToString(),
              num_deaths == 1 ? "" : fmt::format(" in {} s", pause.count() / 1000.0));
  child->restart_time = now + pause;
}

void Supervisor::StartDueChildren() {
  for (Child& child : children_) {
    if (!child.restart_time.has_value()) continue;
    // Nobody needs it any more.
    const bool is_over = stopping_ && !(draining_ && AnyRunning(Role::kApiServer));
    if (!is_over && Clock::now() < *child.restart_time) continue;
    child.restart_time.reset();
    if (is_over) continue;
    if (const absl::Status status = Spawn(&child); !status.ok()) {
      LOG_ERROR("{}", std::string(status.message()));
      draining_ = false;
      return BeginStopping(kExitInternal);
    }
  }
}

bool Supervisor::CauseIsKnown() const {
  const bool only_clean = std::all_of(ended_.begin(), ended_.end(), [](const auto& end) {
    return end.first->role != Role::kApiServer && !end.second.by_signal &&
           end.second.code == kExitOk;
  });
  return !only_clean || !AnyRunning(std::nullopt);
}

void Supervisor::JudgeUnexpected() {
  for (const auto& [child, how] : ended_) {
    // The answer has been printed; the others may have gone with the API server.
    if (instance_.mode == "generate" && child->role == Role::kApiServer && !how.by_signal &&
        how.code == kExitOk) {
      BeginStopping(kExitOk);
      return;
    }
  }
  const auto& [child, how] = *std::min_element(
      ended_.begin(), ended_.end(),
      [](const auto& a, const auto& b) { return CauseRank(a.second) < CauseRank(b.second); });
  const bool start_up = !how.by_signal && IsStartUpCode(how.code);
  const double seconds = std::chrono::duration<double>(Clock::now() - started_).count();
  LOG_ERROR("{} died of {}, {}{:.1f} s after the start; the instance ends", child->name,
            how.ToString(), start_up ? "while starting, " : "", seconds);
  BeginStopping(start_up ? how.code : kExitInternal);
}

void Supervisor::JudgeDrained(const Child& child, const ChildExit& ended) {
  const bool api_server = child.role == Role::kApiServer;
  if (api_server && !ended.by_signal && ended.code == kExitDrainTimeout) {
    exit_code_ = kExitDrainTimeout;
    return;
  }
  // SIGTERM may come before a child has its handler. Once the API server has gone, the others may
  // end of themselves, for they have lost their peer.
  const bool crashed = ended.by_signal && ended.code != SIGTERM;
  const bool failed = !ended.by_signal && ended.code != kExitOk;
  // An engine worker ends when the API server, on its own way out, tells it to.
  const bool early =
      !child.stopped && child.role != Role::kEngineWorker && AnyRunning(Role::kApiServer);
  // With the API server gone every request has been answered, and what it cached is of no use.
  if (crashed && child.role == Role::kCacheManager && !AnyRunning(Role::kApiServer)) {
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
  stopping_role_ = Role::kApiServer;
  // Our copies would keep queueing clients whom nobody will serve any more.
  ports_.http.Reset();
  ports_.metrics.Reset();
  kill_time_ = Clock::now() + milliseconds(instance_.options.drain_timeout_ms) + kStopGrace;
  for (Child& child : children_) {
    if (child.role == stopping_role_) {
      child.stopped = true;
      child.process.Signal(SIGTERM);
    }
  }
}

void Supervisor::BeginStopping(int exit_code) {
  stopping_ = true;
  exit_code_ = exit_code;
  kill_time_ = Clock::now() + kStopGrace;
  for (Child& child : children_) {
    child.stopped = true;
    child.process.Signal(SIGTERM);
  }
}

void Supervisor::AdvanceStop() {
  if (!stopping_) return;
  if (Clock::now() >= kill_time_) {
    for (Child& child : children_) {
      if (!child.process.running() || !child.stopped) continue;
      LOG_WARNING("{} did not stop in time: killed", child.name);
      child.process.Signal(SIGKILL);
      child.process.Wait(-1);
      if (draining_ && child.role == Role::kApiServer) exit_code_ = kExitDrainTimeout;
    }
  }
  // The next role's turn, and past roles that have no process.
  while (draining_ && !AnyRunning(stopping_role_) && stopping_role_ != Role::kCacheManager) {
    stopping_role_ = stopping_role_ == Role::kApiServer ? Role::kEngineWorker : Role::kCacheManager;
    kill_time_ = Clock::now() + kStopGrace;
    for (Child& child : children_) {
      if (child.role != stopping_role_) continue;
      child.stopped = true;
      child.process.Signal(SIGTERM);
    }
  }
}

void Supervisor::KillAll() {
  for (Child& child : children_) {
    child.stopped = true;
    child.process.Signal(SIGKILL);
  }
  for (Child& child : children_) child.process.Wait(-1);
}

bool Supervisor::AnyRunning(std::optional<Role> role) const {
  return std::any_of(children_.begin(), children_.end(), [&](const Child& child) {
    return child.process.running() && (!role.has_value() || child.role == *role);
  });
}

}  // namespace wintserve
