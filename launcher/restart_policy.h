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
// once; before those that follow are pauses of 0.5 s, twice as long each time, and up to a quarter
// longer by chance. A process that has run well for a while sets them back. How long they get
// depends on the cause:
//   a fault of its own   up to 30 s, and only so many: the next would fault, too
//   want of memory       up to 30 s: to load its weights again is what takes the memory
//   somebody from outside  up to 1 s, so that a process that is to be there is there soon, and who
//                        kills all the time still makes no loop without a pause
// Ends from outside make no pause after an end of another cause longer, nor the reverse.
// Threading: one thread.
class RestartPolicy {
 public:
  using TimePoint = std::chrono::steady_clock::time_point;

  // More of them within the window are a crash loop.
  static constexpr size_t kMaxSelfInflicted = 5;
  static constexpr std::chrono::minutes kWindow{10};

  // The process that was started at `started` has ended at `now`, by its own fault or not. How long
  // to wait with the next one; empty: a crash loop. out_of_memory: the kernel killed it for want of
  // memory. chance: in [0, 1).
  std::optional<std::chrono::milliseconds> OnExit(bool self_inflicted, bool out_of_memory,
                                                  TimePoint started, TimePoint now, double chance);

 private:
  // Ends without a good run between them.
  int num_from_within_ = 0;  // faults, and for want of memory
  int num_from_outside_ = 0;
  std::deque<TimePoint> self_inflicted_;  // of the last 10 minutes, oldest first
};

}  // namespace wintserve
