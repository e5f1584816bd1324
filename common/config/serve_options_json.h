// ServeOptions as JSON: the instance file, the "effective config" line of the log.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>

#include "absl/status/statusor.h"
#include "common/config/serve_options.h"

namespace wintserve {

// Every field under its own name; an unset optional is null.
nlohmann::json ServeOptionsToJson(const ServeOptions& options);

// INVALID_ARGUMENT names the field that is missing or of the wrong type. Unknown fields are
// refused.
absl::StatusOr<ServeOptions> ServeOptionsFromJson(const nlohmann::json& json);

// One line for the log: every field, API keys replaced by their number.
std::string EffectiveConfig(const ServeOptions& options);

}  // namespace wintserve
