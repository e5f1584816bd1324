// One line for people about each message of a run.
#pragma once

#include <string>

#include "api_server/scheduler/scheduler.h"
#include "tests/simulation/cache_process.h"

namespace wintserve::simulation {

std::string Describe(const CacheCommand& command);
std::string Describe(const CacheReply& reply);
std::string Describe(const HeldBlocks& held);
std::string Describe(const StepPlan& plan);

}  // namespace wintserve::simulation
