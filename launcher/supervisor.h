// Starts the processes of an instance, watches them, starts anew who dies, stops them.
//
//   running --signal--> draining: API server, then workers, then cache manager --> 0 (75: cut off)
//      |  ^---- a child died: at once, or after a pause, another one is started
//      |----- it cannot start, or crashes in a loop -> stopping: all at once, briefly --> code, 71
//      `----second signal: SIGKILL for whoever is left
//
// With --role engine the turn of the API server is the other launcher's: it is over when that one
// has gone, when every worker has ended, or when patience ends.
//
// An engine worker's end is told to whoever watches before another is started in its place. While
// requests are finished, the other processes are still replaced. With `wintserve generate` only the
// cache manager is.
#pragma once

#include <chrono>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "common/child_process.h"
#include "common/config/instance.h"
#include "common/unique_fd.h"
#include "launcher/child.h"
#include "launcher/loading_bar.h"
#include "launcher/oom_kills.h"
#include "launcher/preflight.h"
#include "launcher/shared_dir.h"
#include "launcher/supervisor_server.h"

namespace wintserve {

// Blocks the signals that a Supervisor answers, so that one that comes before Run is not lost, and
// ignores SIGPIPE, SIGTTOU and SIGXFSZ. Call first in main, before any thread starts.
void BlockSupervisedSignals();

// Threading: the main thread only (children die with the thread that spawned them).
class Supervisor {
 public:
  struct Surroundings {
    ReservedPorts ports;                     // stay reserved until the Supervisor goes
    std::optional<SupervisorServer> server;  // with --role api the other launcher has it
    InstanceLog* log = nullptr;              // must live longer
    SharedDir* shared = nullptr;             // must live longer; with --role api and engine only
  };

  // Starts what instance.options.role says. `instance` as the API server gets it, but for the
  // descriptors.
  Supervisor(Instance instance, Surroundings surroundings);

  // Starts everything, returns the exit code once nothing runs any more.
  int Run();

 private:
  using Clock = Child::Clock;

  absl::Status StartAll();
  absl::Status Start(ChildRole role, int rank);
  void WaitForNews();
  void ReadSignals();
  void ReapEnded();
  // out_of_memory: the kernel has killed for want of memory since the last child ended.
  void HandleExit(Child* child, const ChildExit& how, bool out_of_memory);
  void KillHangingCacheManager();
  void KillThoseThatHangAtTheirStart();
  void KillUnwantedWorkers();
  // Draws the bar, or takes it away, or writes a line.
  void ShowLoading();
  // Whether the end of this child is no end of the instance.
  bool IsReplaceable(const Child& child, const ChildExit& how) const;
  // Schedules the next start. what_happened: "died of signal 9 (Killed)".
  void Replace(Child* child, const ChildExit& how, bool out_of_memory,
               const std::string& what_happened);
  void StartDueChildren();
  bool CauseIsKnown() const;
  void JudgeUnexpected();
  void JudgeDrained(const Child& child, const ChildExit& ended);
  void BeginDraining();
  void BeginStopping(int exit_code);
  void AdvanceStop();
  void StopRole(ChildRole role);
  void KillAll();
  void KillAndReap(Child* child);
  bool AnyRunning(std::optional<ChildRole> role) const;
  bool AnyToStart() const;
  bool StartsApiServer() const { return instance_.options.role != "engine"; }
  // Draining: whether the turn of `role` is over.
  bool IsOver(ChildRole role) const;
  // Draining: whether there may be requests that need the other processes.
  bool MayHaveRequests() const;

  const Instance instance_;
  ReservedPorts ports_;
  std::optional<SupervisorServer> server_;
  InstanceLog* const log_;
  SharedDir* const shared_;
  UniqueFd signal_fd_;
  std::vector<Child> children_;
  Clock::time_point started_;

  // Ended unasked and not judged yet, while we are not stopping; judge_time_ is for how long the
  // cause may take to show.
  std::vector<std::pair<const Child*, ChildExit>> ended_;
  Clock::time_point judge_time_;

  LoadingBar loading_;  // fed where it is shown
  OomKills oom_kills_;
  std::mt19937_64 random_{std::random_device{}()};  // so that not all come back at once

  bool stopping_ = false;
  bool draining_ = false;                            // stopping role by role
  ChildRole stopping_role_ = ChildRole::kApiServer;  // draining: whose turn it is
  Clock::time_point kill_time_;                      // stopping: when patience ends
  int exit_code_ = 0;
};

}  // namespace wintserve
