// The bytes of one StepPlan.
#include <string>

#include "api_server/work_queue/plan_codec.h"
#include "common/check.h"
#include "tests/fuzz/fuzz_target.h"

namespace wintserve {

void FuzzInput(std::string_view input) {
  const auto plan = DecodePlan(input);
  if (!plan.ok()) {
    CHECK(absl::IsInvalidArgument(plan.status()), "{}", plan.status().ToString());
    return;
  }
  for (const PlanRow& row : plan->rows) {
    CHECK(row.length > 0 && (row.tokens.empty() || row.tokens.size() == row.length));
    for (const int32_t token : row.tokens) CHECK(token >= 0);
    CHECK(row.next_token >= 0 && row.prompt_logprobs == (row.num_prompt_logprobs() > 0));
    CHECK(!row.prompt_logprobs || !row.tokens.empty());
  }
  const std::string bytes = EncodePlan(*plan);
  const auto again = DecodePlan(bytes);
  CHECK(again.ok(), "{}", again.status().ToString());
  CHECK(EncodePlan(*again) == bytes);
}

}  // namespace wintserve
