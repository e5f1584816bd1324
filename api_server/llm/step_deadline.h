// How long a step may take before the rank group counts as hung.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <tuple>

namespace wintserve {

// What a plan asks of the workers.
struct StepShape {
  int num_decodes = 0;         // rows of one token
  int num_prefill_tokens = 0;  // of all other rows
  int num_copies = 0;
  bool operator==(const StepShape&) const = default;
};

// The least that is allowed, and what is where nothing is known.
struct StepDeadlineLimits {
  int64_t least_us = 2'000'000;
  int64_t unknown_us = 30'000'000;
};

// Ten times what steps of about that shape (each number within a factor of two) have taken at most
// since the group is in use, and at least 2 s; 30 s where there was none, for a first one may load
// code and pages. Whenever a step was overdue, all of this doubles, up to 16 times, until none has
// been for ten minutes: a machine that is slow for a while must not lose group after group.
// Threading: thread-compatible. Time: microseconds of any clock that does not go back.
class StepDeadline {
 public:
  static constexpr int kSlowdown = 10;
  static constexpr int64_t kMemoryUs = 600'000'000;

  explicit StepDeadline(const StepDeadlineLimits& limits = {}) : limits_(limits) {}

  // Its processes have run nothing yet.
  void OnNewGroup() { longest_us_.clear(); }
  void OnFinished(const StepShape& shape, int64_t running_us);
  void OnOverdue(int64_t now_us);

  int64_t AllowedUs(const StepShape& shape, int64_t now_us) const;

 private:
  using Bucket = std::tuple<int, int, int>;  // bits of each number

  static Bucket BucketOf(const StepShape& shape);

  const StepDeadlineLimits limits_;
  std::map<Bucket, int64_t> longest_us_;
  int patience_ = 1;
  std::optional<int64_t> last_overdue_us_;
};

}  // namespace wintserve
