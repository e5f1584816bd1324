// Starts the processes of an instance, watches them, stops them.
//
//   running --signal--> draining: API server, then workers, then cache manager --> 0 (75: cut off)
//      |----child died--> stopping: all at once, briefly --------------------> its code
//      |    (a cache manager is restarted instead, up to 5 times in 10 minutes: at once, then after
//      |    pauses of 0.5, 1, 2 and 4 s)
//      `----second signal: SIGKILL for whoever is left
#pragma once

#include <chrono>
#include <deque>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "common/child_process.h"
#include "common/config/instance.h"
#include "common/unique_fd.h"
#include "launcher/preflight.h"
#include "launcher/supervisor_server.h"

namespace wintserve {

// Blocks the signals that a Supervisor answers, so that one that comes before Run is not lost, and
// ignores SIGPIPE. Call first in main, before any thread starts.
void BlockSupervisedSignals();

// Threading: the main thread only (children die with the thread that spawned them).
class Supervisor {
 public:
  // `instance` as the API server gets it, but for the descriptors; `ports` stay reserved until the
  // Supervisor goes.
  Supervisor(Instance instance, ReservedPorts ports, SupervisorServer server);

  // Starts everything, returns the exit code once nothing runs any more.
  int Run();

 private:
  using Clock = std::chrono::steady_clock;
  enum class Role { kApiServer, kEngineWorker, kCacheManager };
  struct Child {
    std::string name;
    Role role;
    std::string program;
    Instance instance;  // what it was started with
    ChildProcess process;
    Clock::time_point started;
    bool stopped = false;                           // we asked it to end, or ended it
    std::optional<Clock::time_point> restart_time;  // it has died and is started again then
  };

  absl::Status StartAll();
  absl::Status Start(const std::string& name, const std::string& program, Role role,
                     Instance instance);
  // Starts the child's program, for the first time or again.
  absl::Status Spawn(Child* child);
  void WaitForNews();
  void ReadSignals();
  void ReapEnded();
  void KillHangingCacheManager();
  // Whether the end of this child is no end of the instance.
  bool IsReplaceable(const Child& child, const ChildExit& how) const;
  void ReplaceCacheManager(Child* child, const ChildExit& how);
  void StartDueChildren();
  bool CauseIsKnown() const;
  void JudgeUnexpected();
  void JudgeDrained(const Child& child, const ChildExit& ended);
  void BeginDraining();
  void BeginStopping(int exit_code);
  void AdvanceStop();
  void KillAll();
  bool AnyRunning(std::optional<Role> role) const;

  const Instance instance_;
  ReservedPorts ports_;
  SupervisorServer server_;
  UniqueFd signal_fd_;
  std::vector<Child> children_;
  Clock::time_point started_;

  // Ended unasked and not judged yet, while we are not stopping; judge_time_ is for how long the
  // cause may take to show.
  std::vector<std::pair<const Child*, ChildExit>> ended_;
  Clock::time_point judge_time_;

  std::deque<Clock::time_point> cache_manager_deaths_;  // of the last 10 minutes

  bool stopping_ = false;
  bool draining_ = false;                  // stopping role by role
  Role stopping_role_ = Role::kApiServer;  // draining: whose turn it is
  Clock::time_point kill_time_;            // stopping: when patience ends
  int exit_code_ = 0;
};

}  // namespace wintserve
