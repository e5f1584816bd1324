// How fast sequences leave a queue.
#pragma once

#include <cstdint>
#include <optional>

namespace wintserve {

// Departures per second in which somebody waits; what lies half a minute back counts a third. The
// time since the last departure counts in full, so a queue that stands still looks slower and
// slower, and never forgets that it has moved before.
// Threading: thread-compatible.
class DrainRate {
 public:
  // `was_waiting`: somebody has waited since the last call. `num_left`: as many leave now.
  void Observe(int64_t now_us, bool was_waiting, int num_left);

  // How long until `num_sequences` have left, as of the last call of Observe; nullopt before enough
  // was seen for a rate.
  std::optional<double> SecondsFor(double num_sequences) const;
  // For a client that is to come again: the same, but always known, at least 1, and at least as
  // long again as nobody has left.
  double RetrySecondsFor(double num_sequences) const;

 private:
  int64_t last_us_ = 0;
  double num_left_ = 0;
  double busy_seconds_ = 0;   // up to the last departure
  double still_seconds_ = 0;  // since then, or since the queue was empty
};

}  // namespace wintserve
