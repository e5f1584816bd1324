// A child process that cannot outlive its owner.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "common/unique_fd.h"

namespace wintserve {

struct ChildExit {
  bool by_signal = false;
  int code = 0;  // exit code, or the signal's number

  std::string ToString() const;  // "exit code 66", "signal 9 (Killed)"
};

struct ChildOptions {
  struct Descriptor {
    int fd = -1;        // ours
    int child_fd = -1;  // its number in the child, 3 or above
  };
  std::vector<std::string> argv;         // argv[0] is the path of the program
  std::vector<Descriptor> descriptors;   // the child has these, stdout and stderr, and no others
  std::vector<std::string> environment;  // "NAME=value", beside what is inherited
  // Which variables of our own environment the child gets, by name; null: all.
  bool (*inherits)(std::string_view name) = nullptr;
  int output_fd = -1;         // the child's stdout and stderr; -1: ours
  bool keeps_stdout = false;  // its stdout is ours all the same
};

// Move-only; a default-made or moved-from object stands for no process. Destruction stops the child
// (SIGTERM, then SIGKILL) and reaps it.
//
// The child gets a process group of its own (so a terminal's Ctrl-C does not reach it), /dev/null
// as stdin, default signal handlers and an empty signal mask. The kernel kills it with SIGKILL when
// the *thread* that spawned it ends: spawn from the main thread. Threading: one thread.
class ChildProcess {
 public:
  // Returns once the program runs. NOT_FOUND, PERMISSION_DENIED and others: it could not be
  // executed; the text names the path.
  static absl::StatusOr<ChildProcess> Spawn(const ChildOptions& options);

  ChildProcess() = default;
  ChildProcess(ChildProcess&& other) noexcept;
  ChildProcess& operator=(ChildProcess&& other) noexcept;
  ~ChildProcess();

  pid_t pid() const { return pid_; }
  // Readable once the child has ended; -1 after it was reaped.
  int pidfd() const { return pidfd_.get(); }
  bool running() const { return pidfd_.valid(); }

  // Waits at most timeout_ms (-1: for ever) and reaps. Empty: still running. Repeats its answer.
  std::optional<ChildExit> Wait(int64_t timeout_ms);

  // No effect once it was reaped.
  void Signal(int signal_number);

  // SIGTERM, at most grace_ms of waiting, SIGKILL; reaps.
  void Stop(int64_t grace_ms);

 private:
  pid_t pid_ = -1;
  UniqueFd pidfd_;
  std::optional<ChildExit> exit_;
};

}  // namespace wintserve
