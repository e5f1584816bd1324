#include "common/log_limit.h"

#include <fmt/format.h>

#include <utility>

namespace wintserve {

LogLimit::LogLimit(std::function<Clock::time_point()> now) : now_(std::move(now)) {}

std::optional<std::string> LogLimit::Admit() {
  MutexLock lock(&mu_);
  const auto now = now_();
  if (!minute_start_.has_value() || now - *minute_start_ >= std::chrono::minutes(1)) {
    minute_start_ = now;
    num_lines_ = 0;
  }
  if (num_lines_ == kMaxLinesPerMinute) {
    ++num_left_out_;
    return std::nullopt;
  }
  ++num_lines_;
  const int64_t num_left_out = std::exchange(num_left_out_, 0);
  if (num_left_out == 0) return "";
  return fmt::format(" (and {} more that were not logged)", num_left_out);
}

}  // namespace wintserve
