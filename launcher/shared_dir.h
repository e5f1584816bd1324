// The runtime directory of an instance whose processes have two launchers: one with --role api, one
// with --role engine.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "common/unique_fd.h"

namespace wintserve {

// Holds one role's half of the directory: its lock, and the sockets that only its processes make.
// These go at the end, and before a start, when a killed launcher has left them. Directory, lock
// files and token stay for whoever comes next. Move-only.
class SharedDir {
 public:
  // `path` is made with mode 0700 if there is nothing. role: "api" or "engine". UNAVAILABLE:
  // another launcher of that role has it. INVALID_ARGUMENT, PERMISSION_DENIED: it cannot be, or is
  // not ours alone. The texts name flag and path.
  static absl::StatusOr<SharedDir> Open(const std::string& path, const std::string& role);

  SharedDir(SharedDir&& other) noexcept
      : path_(std::exchange(other.path_, "")),
        lock_(std::move(other.lock_)),
        other_lock_path_(std::move(other.other_lock_path_)),
        own_files_(std::exchange(other.own_files_, {})) {}
  SharedDir& operator=(SharedDir&&) = delete;
  ~SharedDir();

  const std::string& path() const { return path_; }

  // The token of both launchers, in the file "token": whichever comes first draws it.
  absl::StatusOr<std::string> Token(std::string* warning) const;

  // Whether the launcher of the other role runs.
  bool OtherRuns() const;

 private:
  explicit SharedDir(std::string path) : path_(std::move(path)) {}

  void RemoveOwnFiles();

  std::string path_;
  UniqueFd lock_;
  std::string other_lock_path_;
  std::vector<std::string> own_files_;
};

}  // namespace wintserve
