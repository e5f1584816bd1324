// What shows how far the engine workers' loading is: all ranks together, in one row of a terminal
// or in lines.
#pragma once

#include <chrono>
#include <cstdint>
#include <map>
#include <optional>
#include <string>

#include "common/progress.h"

namespace wintserve {

// Knows what workers have told, and when the row is to be drawn anew, or another line written;
// draws nothing itself. Time is an argument. Threading: thread-compatible.
class LoadingBar {
 public:
  using Time = std::chrono::steady_clock::time_point;
  static constexpr std::chrono::milliseconds kRowInterval{200};
  static constexpr std::chrono::milliseconds kLineInterval{5000};
  // Workers tell every fifth of a second: one that is silent for so long is not waited for.
  static constexpr std::chrono::milliseconds kPatience{3000};

  // Of an instance with so many ranks. The first row or line is due after one interval.
  explicit LoadingBar(int num_ranks, std::chrono::milliseconds interval = kRowInterval)
      : num_ranks_(num_ranks), interval_(interval) {}

  // What the process of `rank` has told. REQUIRES: 0 <= done_bytes <= total_bytes, total_bytes > 0.
  void Report(int rank, int64_t done_bytes, int64_t total_bytes, Time now);
  // The process of `rank` has ended: the row is due.
  void Remove(int rank);
  void Clear() { ranks_.clear(); }

  // Whether the row is not what the last call of Row or Line said, or old.
  bool IsDue(Time now) const;
  // When it is due, if nothing is told until then; none: it is not.
  std::optional<Time> next_time() const;

  // "loading 2 ranks ━━━━╸─────  45%  …", at most so many columns; empty while nothing loads.
  // Whoever has loaded counts until the last one has.
  std::string Row(Time now, int columns, bool utf8);
  // The same as "loading 2 ranks: 45.1 of 87.4 GiB (52%), …".
  std::string Line(Time now);

 private:
  struct Rank {
    int64_t done_bytes = 0;
    int64_t total_bytes = 0;
    int64_t done_before = 0;  // when we first heard of it
    Time last_report;
  };

  bool AnyLoads(Time now) const;
  std::string Label() const;
  // False: nothing loads, and the state says nothing. `label` must outlive the state.
  bool Advance(Time now, std::string* label, ProgressState* state);

  const int num_ranks_;
  const std::chrono::milliseconds interval_;
  std::map<int, Rank> ranks_;  // of which at least one loads, or did at the last call
  Time begin_;                 // of the first among them
  Time next_row_;
  bool is_shown_ = false;
};

}  // namespace wintserve
