// StepPlan <-> bytes, and the hashes that show whether all ranks ran the same plans on the same
// ids.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "api_server/scheduler/plan.h"
#include "api_server/work_queue/messages.h"  // SampledDigest

namespace wintserve {

// The bytes of a proto StepPlan.
std::string EncodePlan(const StepPlan& plan);

// INVALID_ARGUMENT names the field that is out of range or does not fit the others. What needs the
// worker's state to judge (a slot or block beyond its limits) is for the worker to refuse.
absl::StatusOr<StepPlan> DecodePlan(std::string_view plan_bytes);

// XXH3-64 of the plan's bytes: the next plan carries it, every StepDone echoes it.
uint64_t PlanHash(std::string_view plan_bytes);

}  // namespace wintserve
