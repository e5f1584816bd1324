#include "common/sibling_path.h"

#include <system_error>

#include "absl/status/status.h"

namespace wintserve {

absl::StatusOr<std::filesystem::path> SiblingPath(std::string_view name) {
  std::error_code error;
  const std::filesystem::path self = std::filesystem::read_symlink("/proc/self/exe", error);
  if (error) return absl::InternalError("cannot read /proc/self/exe: " + error.message());
  return self.parent_path() / name;
}

}  // namespace wintserve
