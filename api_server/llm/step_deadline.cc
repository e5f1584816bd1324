#include "api_server/llm/step_deadline.h"

#include <algorithm>
#include <bit>

namespace wintserve {
namespace {

constexpr int kMaxPatience = 16;

int Bits(int number) {
  return static_cast<int>(std::bit_width(static_cast<unsigned>(std::max(0, number))));
}

}  // namespace

StepDeadline::Bucket StepDeadline::BucketOf(const StepShape& shape) {
  return {Bits(shape.num_decodes), Bits(shape.num_prefill_tokens), Bits(shape.num_copies)};
}

void StepDeadline::OnFinished(const StepShape& shape, int64_t running_us) {
  int64_t& longest_us = longest_us_[BucketOf(shape)];
  longest_us = std::max(longest_us, running_us);
}

void StepDeadline::OnOverdue(int64_t now_us) {
  const bool forgotten = last_overdue_us_.has_value() && now_us - *last_overdue_us_ > kMemoryUs;
  patience_ = forgotten ? 2 : std::min(2 * patience_, kMaxPatience);
  last_overdue_us_ = now_us;
}

int64_t StepDeadline::AllowedUs(const StepShape& shape, int64_t now_us) const {
  const auto found = longest_us_.find(BucketOf(shape));
  const int64_t allowed_us = found == longest_us_.end()
                                 ? limits_.unknown_us
                                 : std::max(limits_.least_us, kSlowdown * found->second);
  const bool forgotten = last_overdue_us_.has_value() && now_us - *last_overdue_us_ > kMemoryUs;
  return forgotten ? allowed_us : patience_ * allowed_us;
}

}  // namespace wintserve
