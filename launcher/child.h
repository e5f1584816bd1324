// One process of the instance, and whichever is started in its place.
#pragma once

#include <chrono>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "common/child_process.h"
#include "common/config/instance.h"
#include "common/unique_fd.h"
#include "launcher/child_output.h"
#include "launcher/preflight.h"
#include "launcher/restart_policy.h"
#include "launcher/start_watch.h"

namespace wintserve {

enum class ChildRole { kApiServer, kEngineWorker, kCacheManager };

// Threading: the main thread only (children die with the thread that spawned them).
struct Child {
  using Clock = std::chrono::steady_clock;

  std::string name;  // "engine worker 1"
  ChildOutput output;
  ChildRole role;
  Instance instance;  // what it is started with; a worker_id lives as long as a process
  ChildProcess process;
  RestartPolicy policy;
  Clock::time_point started;
  UniqueFd start_signs;  // what `start_watch` looks at
  StartWatch start_watch;
  bool keeps_stdout = false;  // what it writes there goes where ours goes, not to the log
  int num_starts = 0;
  bool stopped = false;                           // we asked it to end, or ended it
  bool hung = false;                              // while it started, so that we ended it
  bool at_fault = false;                          // see EndWorker in proto/supervisor.proto
  std::optional<Clock::time_point> restart_time;  // it has died and is started again then
};

// The child of that role (of that rank, an engine worker) for an instance with these ports. `log`
// must live longer.
Child MakeChild(ChildRole role, int rank, const Instance& instance, const ReservedPorts& ports,
                InstanceLog* log);

// By which the child is called in logs: "engine_worker.1".
std::string LogNameOf(ChildRole role, int rank);

// Starts the child's program, for the first time or again, with the sockets of `ports` that it
// serves. The old process must have been reaped.
absl::Status SpawnChild(const ReservedPorts& ports, Child* child);

}  // namespace wintserve
