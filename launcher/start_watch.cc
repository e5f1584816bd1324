#include "launcher/start_watch.h"

#include <algorithm>

namespace wintserve {
namespace {

using std::chrono::milliseconds;

constexpr milliseconds kMinLimit(5'000);
constexpr milliseconds kMaxLimit(60'000);

// Who looks may have been kept from it, and the process with it: by a container that was paused.
// Such a time counts as one look that came late.
constexpr milliseconds kMaxStep = 2 * StartWatch::kPeriod;

}  // namespace

milliseconds StartLimit(int64_t stall_timeout_ms) {
  if (stall_timeout_ms == 0) return milliseconds(0);
  return std::clamp(milliseconds(stall_timeout_ms), kMinLimit, kMaxLimit);
}

bool StartWatch::Look(const StartSigns& signs, TimePoint now) {
  if (!is_watching_) return false;
  const TimePoint::duration step = std::min<TimePoint::duration>(now - last_look_, kMaxStep);
  last_look_ = now;
  silence_ = signs.is_alive ? TimePoint::duration(0) : silence_ + step;
  const bool hangs = silence_ >= limit_;
  is_watching_ = !signs.has_started && !hangs;
  return hangs;
}

std::optional<StartWatch::TimePoint> StartWatch::next_look() const {
  return is_watching_ ? std::optional(last_look_ + kPeriod) : std::nullopt;
}

}  // namespace wintserve
