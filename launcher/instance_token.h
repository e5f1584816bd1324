// The secret that every call and packet between the processes of an instance carries.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "common/config/serve_options.h"

namespace wintserve {

inline constexpr size_t kTokenBytes = 32;

// 256 random bits of the kernel; or, with --queue-token-file, those that the file holds as 64
// hexadecimal digits, with or without a newline after them. INVALID_ARGUMENT names flag, file and
// reason, and nothing of what the file holds. `warning` gets a line when every user of the machine
// may read the file.
absl::StatusOr<std::string> MakeInstanceToken(const ServeOptions& options, std::string* warning);

}  // namespace wintserve
