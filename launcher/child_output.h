// What one child writes to its console, as lines.
#pragma once

#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "common/unique_fd.h"
#include "launcher/instance_log.h"

namespace wintserve {

// The reading end of a pipe. Never waits. Threading: one thread, the launcher's poll loop.
class ChildOutput {
 public:
  ChildOutput() = default;
  // `log` must live longer.
  ChildOutput(std::string name, InstanceLog* log) : name_(std::move(name)), log_(log) {}

  // The end that a process about to start gets. Finish comes before the next.
  absl::StatusOr<UniqueFd> Open();

  // To be polled for input; -1: there is nothing to wait for.
  int fd() const { return reader_.get(); }

  // Hands on what is there, a limited amount at a time.
  void Read();

  // The process has been reaped: hands on what it has left, also a last line that has no end.
  void Finish();

 private:
  // False: nothing more for now, or ever.
  bool ReadOnce();
  void HandOnLines();

  std::string name_;
  InstanceLog* log_ = nullptr;
  UniqueFd reader_;
  std::string pending_;  // the beginning of a line
};

}  // namespace wintserve
