// Fields that OpenAI or FastDeploy define, that would change the answer, and that this version does
// not implement. Ignoring them would answer another question than the one asked.
#pragma once

#include <nlohmann/json.hpp>

#include "absl/status/status.h"
#include "api_server/openai/request.h"

namespace wintserve {

// INVALID_ARGUMENT names the first such field whose value is not the neutral one.
absl::Status RefuseUnsupportedFields(const nlohmann::json& body, Endpoint endpoint);

}  // namespace wintserve
