// For log lines that a peer can cause as often as it likes.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include "common/mutex.h"

namespace wintserve {

// Lets at most kMaxLinesPerMinute lines through in any minute that begins with one; the next line
// after that says how many were left out.
//
//   if (const auto more = limit.Admit()) LOG_WARNING("refused {}{}", peer, *more);
//
// Threading: any thread.
class LogLimit {
 public:
  using Clock = std::chrono::steady_clock;
  static constexpr int kMaxLinesPerMinute = 5;

  // `now` is for tests.
  explicit LogLimit(std::function<Clock::time_point()> now = &Clock::now);

  // None: leave this line out. Otherwise what to write behind it: "", or
  // " (and 7 more that were not logged)".
  std::optional<std::string> Admit() EXCLUDES(mu_);

 private:
  const std::function<Clock::time_point()> now_;
  Mutex mu_;
  std::optional<Clock::time_point> minute_start_ GUARDED_BY(mu_);
  int num_lines_ GUARDED_BY(mu_) = 0;  // of this minute, let through
  int64_t num_left_out_ GUARDED_BY(mu_) = 0;
};

}  // namespace wintserve
