// When a process that has died is started again, and when that is of no use any more. Pure: time
// and chance are arguments.
#pragma once

#include <chrono>
#include <cstddef>
#include <deque>
#include <optional>

#include "common/child_process.h"

namespace wintserve {

// An exit code by which a child says what it found at start-up and would find again.
bool IsStartUpCode(const ChildExit& how);

// The process is itself at fault: a crash signal, or an exit with an error. Not at fault is whoever
// was ended from outside: by SIGKILL (the kernel's for want of memory, too), or by a signal to
// stop, which it may have answered in order.
bool IsSelfInflicted(const ChildExit& how);

// Whether an engine worker that ended so has written to KV blocks only what is right, up to the
// last step that every rank has acknowledged. What did not get past its start-up wrote nothing.
bool KvIsTrusted(const ChildExit& how);

// One for each child, over all processes that are started in its place. The first restart is at
// once; before those that follow are pauses of 0.5 s, twice as long each time up to 30 s, and up to
// a quarter longer by chance. A process that has run well for a while sets them back. Threading:
// one thread.
class RestartPolicy {
 public:
  using TimePoint = std::chrono::steady_clock::time_point;

  // More of them within the window are a crash loop.
  static constexpr size_t kMaxSelfInflicted = 5;
  static constexpr std::chrono::minutes kWindow{10};

  // The process that was started at `started` has ended at `now`, by its own fault or not. How long
  // to wait with the next one; empty: a crash loop. chance: in [0, 1).
  std::optional<std::chrono::milliseconds> OnExit(bool self_inflicted, TimePoint started,
                                                  TimePoint now, double chance);

 private:
  int num_in_row_ = 0;                    // ends without a good run between them
  std::deque<TimePoint> self_inflicted_;  // of the last 10 minutes, oldest first
};

}  // namespace wintserve
