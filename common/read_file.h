#pragma once

#include <filesystem>
#include <string>

#include "absl/status/statusor.h"

namespace wintserve {

// All bytes of a file. Errors name it: NOT_FOUND, PERMISSION_DENIED and whatever else errno says.
absl::StatusOr<std::string> ReadFile(const std::filesystem::path& path);

}  // namespace wintserve
