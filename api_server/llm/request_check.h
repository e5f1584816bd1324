// What a request may ask for, and what the scheduler is told of it.
#pragma once

#include <cstdint>
#include <optional>

#include "absl/status/status.h"
#include "api_server/llm/llm.h"
#include "api_server/scheduler/scheduler.h"

namespace wintserve {

struct RequestLimits {
  int max_model_len = 0;
  int vocab_size = 0;          // ids at and above are unknown to the model
  int max_top_logprobs = -1;   // -1: no log-probabilities
  int64_t max_timeout_ms = 0;  // the longest that a request may take, and the default; 0: none
};

// INVALID_ARGUMENT names the first field that cannot be, its value and what is allowed.
absl::Status CheckRequest(const GenerationRequest& request, const RequestLimits& limits);

// REQUIRES: CheckRequest is OK. now_us: on the engine's clock.
ScheduledRequest ToScheduled(GenerationRequest request, uint64_t id, const RequestLimits& limits,
                             int64_t now_us);

}  // namespace wintserve
