#include "launcher/runtime_dir.h"

#include <dirent.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <stdlib.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <memory>
#include <vector>

#include "common/log.h"
#include "common/status_macros.h"
#include "common/unix_socket.h"

namespace wintserve {
namespace {

constexpr char kPrefix[] = "wintserve-";
constexpr char kLock[] = "lock";
constexpr char kNewLock[] = "lock.new";
constexpr time_t kUnlockedAgeSeconds = 60;

std::vector<std::string> Entries(int dir_fd) {
  std::vector<std::string> names;
  // fdopendir owns what it gets.
  const std::unique_ptr<DIR, int (*)(DIR*)> dir(
      ::fdopendir(::openat(dir_fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC)), ::closedir);
  if (dir == nullptr) return names;
  while (const dirent* entry = ::readdir(dir.get())) {
    const std::string name = entry->d_name;
    if (name != "." && name != "..") names.push_back(name);
  }
  return names;
}

// The lock goes last: while it is there, what is left can still be swept.
void Remove(int parent_fd, const std::string& name) {
  const UniqueFd dir(
      ::openat(parent_fd, name.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
  if (!dir.valid()) return;
  for (const std::string& entry : Entries(dir.get())) {
    if (entry != kLock) ::unlinkat(dir.get(), entry.c_str(), 0);
  }
  ::unlinkat(dir.get(), kLock, 0);
  ::unlinkat(parent_fd, name.c_str(), AT_REMOVEDIR);
}

// Whether no launcher holds the directory `name`. The descriptor in *lock keeps it ours meanwhile.
bool IsStale(int parent_fd, const std::string& name, UniqueFd* lock) {
  const UniqueFd dir(
      ::openat(parent_fd, name.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
  struct stat info = {};
  if (!dir.valid() || ::fstat(dir.get(), &info) != 0 || info.st_uid != ::geteuid()) return false;
  lock->Reset(::openat(dir.get(), kLock, O_RDWR | O_NOFOLLOW | O_CLOEXEC));
  if (lock->valid()) return ::flock(lock->get(), LOCK_EX | LOCK_NB) == 0;
  // Its launcher is just starting, or was killed in the middle of that.
  return errno == ENOENT && ::time(nullptr) - info.st_mtime > kUnlockedAgeSeconds;
}

void Sweep(const std::string& parent) {
  const UniqueFd parent_fd(::open(parent.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!parent_fd.valid()) return;
  for (const std::string& name : Entries(parent_fd.get())) {
    if (!name.starts_with(kPrefix)) continue;
    if (UniqueFd lock; IsStale(parent_fd.get(), name, &lock)) {
      LOG_INFO("removing {}/{}, left by a launcher that was killed", parent, name);
      Remove(parent_fd.get(), name);
    }
  }
}

std::string Parent() {
  const char* xdg = ::getenv("XDG_RUNTIME_DIR");
  struct stat info = {};
  const bool usable = xdg != nullptr && xdg[0] == '/' && ::stat(xdg, &info) == 0 &&
                      S_ISDIR(info.st_mode) && info.st_uid == ::geteuid() &&
                      ::access(xdg, W_OK | X_OK) == 0;
  return usable ? xdg : "/tmp";
}

// Whoever may rename our directory could put another one, of theirs, in its place.
absl::Status CheckParent(const std::string& parent) {
  struct stat info = {};
  if (::stat(parent.c_str(), &info) != 0) {
    return absl::ErrnoToStatus(errno, fmt::format("cannot make a directory in {}", parent));
  }
  if (info.st_uid != 0 && info.st_uid != ::geteuid()) {
    return absl::PermissionDeniedError(fmt::format(
        "runtime directory: {}: belongs to user {}, must be ours or root's", parent, info.st_uid));
  }
  if ((info.st_mode & (S_IWGRP | S_IWOTH)) != 0 && (info.st_mode & S_ISVTX) == 0) {
    return absl::PermissionDeniedError(
        fmt::format("runtime directory: {}: others may write there and it is not sticky (mode "
                    "{:04o}); give XDG_RUNTIME_DIR one of mode 0700",
                    parent, info.st_mode & 07777));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<RuntimeDir> RuntimeDir::Create() { return CreateUnder(Parent()); }

absl::StatusOr<RuntimeDir> RuntimeDir::CreateUnder(const std::string& parent) {
  RETURN_IF_ERROR(CheckParent(parent));
  Sweep(parent);
  std::string path = fmt::format("{}/{}XXXXXX", parent, kPrefix);
  if (::mkdtemp(path.data()) == nullptr) {
    return absl::ErrnoToStatus(errno, fmt::format("cannot make a directory in {}", parent));
  }
  RuntimeDir dir(path);
  // Locked before it has its name, so that a sweep never meets it unlocked.
  const std::string new_lock = fmt::format("{}/{}", path, kNewLock);
  const std::string lock = fmt::format("{}/{}", path, kLock);
  dir.lock_.Reset(::open(new_lock.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
  if (!dir.lock_.valid() || ::flock(dir.lock_.get(), LOCK_EX | LOCK_NB) != 0 ||
      ::rename(new_lock.c_str(), lock.c_str()) != 0) {
    return absl::ErrnoToStatus(errno, fmt::format("cannot lock {}", path));
  }
  RETURN_IF_ERROR(CheckPrivateDirectory(path));
  return dir;
}

RuntimeDir::~RuntimeDir() {
  if (!path_.empty()) Remove(AT_FDCWD, path_);
}

}  // namespace wintserve
