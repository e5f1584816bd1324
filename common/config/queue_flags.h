// What the flags of the queue ports demand of each other. Private to common/config.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "common/config/serve_options.h"

namespace wintserve {

// A flag, without the leading dashes, and what is wrong with it, without its name.
struct QueueFlagError {
  std::string flag;
  std::string reason;
};

// Certificate and key go together. Beyond loopback the queue ports demand TLS, or to be told that
// they shall go without.
std::optional<QueueFlagError> CheckQueueFlags(const ServeOptions& options);

// Lines for the operator about what passed the check and is unwise.
std::vector<std::string> QueueFlagWarnings(const ServeOptions& options);

}  // namespace wintserve
