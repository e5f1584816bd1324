// Whether a process that starts still gives signs of life. Pure: time is an argument.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>

#include "common/start_pulse.h"

namespace wintserve {

// For how long a process may be silent while it starts: --stall-timeout, within 5 s and 60 s. A
// process gives signs all the time, whatever its work waits for, but none before its main: until
// then its program and libraries are read, from a slow disk perhaps. 0: for ever.
std::chrono::milliseconds StartLimit(int64_t stall_timeout_ms);

// Of one process, from its start until it says that it has started.
// Threading: one thread.
class StartWatch {
 public:
  using TimePoint = std::chrono::steady_clock::time_point;
  static constexpr std::chrono::milliseconds kPeriod{500};

  // Watches nobody.
  StartWatch() = default;
  // limit: see StartLimit.
  StartWatch(std::chrono::milliseconds limit, TimePoint started)
      : limit_(limit), last_look_(started), is_watching_(limit.count() > 0) {}

  // To be called at next_look() with what has come since the last call. True: it hangs; said once.
  bool Look(const StartSigns& signs, TimePoint now);
  // None: there is nothing to watch any more.
  std::optional<TimePoint> next_look() const;

 private:
  std::chrono::milliseconds limit_{0};
  TimePoint last_look_;
  std::chrono::steady_clock::duration silence_{0};
  bool is_watching_ = false;
};

}  // namespace wintserve
