#include "api_server/scheduler/drain_rate.h"

#include <algorithm>
#include <cmath>

namespace wintserve {
namespace {

constexpr double kMemorySeconds = 30;
constexpr double kEnoughSeconds = 1;  // of waiting, before a rate is given

}  // namespace

void DrainRate::Observe(int64_t now_us, bool was_waiting, int num_left) {
  const double seconds = static_cast<double>(now_us - last_us_) / 1e6;
  last_us_ = now_us;
  if (!was_waiting) {
    still_seconds_ = 0;
    return;
  }
  still_seconds_ += seconds;
  if (num_left == 0) return;
  // Only a departure ages the others: were it time alone, nothing would be left of the rate after
  // some minutes of standing still. Nor is that time the rate of what comes after it.
  const double kept = std::exp(-still_seconds_ / kMemorySeconds);
  num_left_ = num_left_ * kept + num_left;
  busy_seconds_ = busy_seconds_ * kept + std::min(still_seconds_, kMemorySeconds);
  still_seconds_ = 0;
}

std::optional<double> DrainRate::SecondsFor(double num_sequences) const {
  const double seconds = busy_seconds_ + still_seconds_;
  if (num_left_ == 0 || seconds < kEnoughSeconds) return std::nullopt;
  return num_sequences * seconds / num_left_;
}

double DrainRate::RetrySecondsFor(double num_sequences) const {
  return std::max({1.0, still_seconds_, SecondsFor(num_sequences).value_or(0)});
}

}  // namespace wintserve
