// The directory that holds an instance's Unix sockets.
#pragma once

#include <string>
#include <utility>

#include "absl/status/statusor.h"
#include "common/unique_fd.h"

namespace wintserve {

// Owns a directory "wintserve-XXXXXX", mode 0700, with a locked file in it. Removed, with the
// sockets in it, on destruction; what a killed launcher left is known by its free lock. Move-only.
class RuntimeDir {
 public:
  // Under $XDG_RUNTIME_DIR when that is usable, else under /tmp. Removes directories that dead
  // launchers of our user left there. PERMISSION_DENIED: another user may put a directory in the
  // place of ours there.
  static absl::StatusOr<RuntimeDir> Create();
  // The same under `parent`.
  static absl::StatusOr<RuntimeDir> CreateUnder(const std::string& parent);

  RuntimeDir(RuntimeDir&& other) noexcept
      : path_(std::exchange(other.path_, "")), lock_(std::move(other.lock_)) {}
  RuntimeDir& operator=(RuntimeDir&&) = delete;
  ~RuntimeDir();

  const std::string& path() const { return path_; }

 private:
  explicit RuntimeDir(std::string path) : path_(std::move(path)) {}

  std::string path_;
  UniqueFd lock_;
};

}  // namespace wintserve
