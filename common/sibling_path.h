#pragma once

#include <filesystem>
#include <string_view>

#include "absl/status/statusor.h"

namespace wintserve {

// Where the program `name` lies beside the one that runs, as a build and a bundle put them; whether
// it is there is not looked at. INTERNAL: /proc/self/exe cannot be read.
absl::StatusOr<std::filesystem::path> SiblingPath(std::string_view name);

}  // namespace wintserve
