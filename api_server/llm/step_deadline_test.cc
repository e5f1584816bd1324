#include "api_server/llm/step_deadline.h"

#include <gtest/gtest.h>

namespace wintserve {
namespace {

constexpr int64_t kMs = 1'000;
constexpr int64_t kSecond = 1'000'000;

TEST(StepDeadline, AShapeThatWasNeverRunHasThirtySeconds) {
  StepDeadline deadline;
  EXPECT_EQ(deadline.AllowedUs({.num_decodes = 3}, 0), 30 * kSecond);
  deadline.OnFinished({.num_decodes = 3}, 10 * kMs);
  EXPECT_EQ(deadline.AllowedUs({.num_decodes = 3}, 0), 2 * kSecond);
  EXPECT_EQ(deadline.AllowedUs({.num_decodes = 2}, 0), 2 * kSecond);   // about the same
  EXPECT_EQ(deadline.AllowedUs({.num_decodes = 4}, 0), 30 * kSecond);  // more than that
  EXPECT_EQ(deadline.AllowedUs({.num_decodes = 3, .num_prefill_tokens = 64}, 0), 30 * kSecond);
  EXPECT_EQ(deadline.AllowedUs({.num_decodes = 3, .num_copies = 1}, 0), 30 * kSecond);
  deadline.OnNewGroup();
  EXPECT_EQ(deadline.AllowedUs({.num_decodes = 3}, 0), 30 * kSecond);
}

TEST(StepDeadline, TenTimesTheLongestOfItsKind) {
  StepDeadline deadline;
  deadline.OnFinished({.num_prefill_tokens = 200}, 400 * kMs);
  deadline.OnFinished({.num_prefill_tokens = 150}, 300 * kMs);
  EXPECT_EQ(deadline.AllowedUs({.num_prefill_tokens = 250}, 0), 4 * kSecond);
}

TEST(StepDeadline, DoublesWithEveryOverdueStepForTenMinutes) {
  StepDeadline deadline;
  const StepShape shape{.num_decodes = 1};
  deadline.OnFinished(shape, kMs);
  int64_t now_us = 0;
  for (const int factor : {2, 4, 8, 16, 16}) {
    now_us += kSecond;
    deadline.OnOverdue(now_us);
    EXPECT_EQ(deadline.AllowedUs(shape, now_us), factor * 2 * kSecond);
  }
  EXPECT_EQ(deadline.AllowedUs({.num_decodes = 9}, now_us), 16 * 30 * kSecond);
  now_us += 601 * kSecond;
  EXPECT_EQ(deadline.AllowedUs(shape, now_us), 2 * kSecond);
  deadline.OnOverdue(now_us);
  EXPECT_EQ(deadline.AllowedUs(shape, now_us), 4 * kSecond);
}

}  // namespace
}  // namespace wintserve
