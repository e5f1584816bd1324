#include "launcher/shared_dir.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <thread>

#include "common/config/instance.h"
#include "common/status_macros.h"
#include "common/unix_socket.h"
#include "launcher/instance_token.h"

namespace wintserve {
namespace {

constexpr char kApi[] = "api";
constexpr char kEngine[] = "engine";

std::string Describe(const std::string& path, std::string_view reason) {
  return fmt::format("--runtime-dir: {}: {}", path, reason);
}

absl::Status Error(const std::string& path) {
  return absl::InvalidArgumentError(Describe(path, std::strerror(errno)));
}

std::string LockPath(const std::string& path, const std::string& role) {
  return fmt::format("{}/lock.{}", path, role);
}

// What only the processes of that role make in the directory.
std::vector<std::string> FilesOf(const std::string& role, const std::string& path) {
  Instance instance;
  instance.runtime_dir = path;
  if (role == kApi) return {instance.work_queue_socket()};
  return {instance.cache_socket(), instance.memory_socket(), instance.supervisor_socket(),
          path + "/host_bytes"};
}

absl::Status CheckLength(const std::string& path) {
  size_t longest = 0;
  for (const char* role : {kApi, kEngine}) {
    for (const std::string& file : FilesOf(role, "")) longest = std::max(longest, file.size());
  }
  const size_t limit = sizeof(sockaddr_un::sun_path) - 1 - longest;
  if (path.size() <= limit) return absl::OkStatus();
  return absl::InvalidArgumentError(
      Describe(path, fmt::format("is longer than {} bytes: sockets lie in it", limit)));
}

}  // namespace

absl::StatusOr<SharedDir> SharedDir::Open(const std::string& path, const std::string& role) {
  RETURN_IF_ERROR(CheckLength(path));
  const bool made = ::mkdir(path.c_str(), 0700) == 0;
  if (!made && errno != EEXIST) return Error(path);
  // A directory of a volume that belongs to a group passes its set-group-ID bit on.
  if (made && ::chmod(path.c_str(), 0700) != 0) return Error(path);
  if (const absl::Status status = CheckPrivateDirectory(path); !status.ok()) {
    return absl::Status(status.code(),
                        fmt::format("--runtime-dir: {}", std::string(status.message())));
  }
  SharedDir dir(path);
  dir.lock_.Reset(
      ::open(LockPath(path, role).c_str(), O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0600));
  if (!dir.lock_.valid()) return Error(LockPath(path, role));
  // OtherRuns of the other launcher holds the lock for a moment.
  constexpr int kNumTries = 10;
  for (int i = 0; ::flock(dir.lock_.get(), LOCK_EX | LOCK_NB) != 0; ++i) {
    if (i + 1 == kNumTries) {
      return absl::UnavailableError(
          Describe(path, fmt::format("another launcher with --role {} uses it", role)));
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
  dir.other_lock_path_ = LockPath(path, role == kApi ? kEngine : kApi);
  dir.own_files_ = FilesOf(role, path);
  dir.RemoveOwnFiles();
  return dir;
}

SharedDir::~SharedDir() { RemoveOwnFiles(); }

void SharedDir::RemoveOwnFiles() {
  for (const std::string& file : own_files_) ::unlink(file.c_str());
}

absl::StatusOr<std::string> SharedDir::Token(std::string* warning) const {
  const std::string token = path_ + "/token";
  // Whole before it has its name; link fails if the other launcher was first.
  std::string draft = path_ + "/token.XXXXXX";
  const UniqueFd fd(::mkostemp(draft.data(), O_CLOEXEC));
  if (!fd.valid()) return Error(draft);
  std::string digits;
  ASSIGN_OR_RETURN(const std::string drawn, MakeInstanceToken(ServeOptions(), nullptr));
  for (const unsigned char byte : drawn) digits += fmt::format("{:02x}", byte);
  const bool written = ::write(fd.get(), digits.data(), digits.size()) == std::ssize(digits);
  const bool named = written && (::link(draft.c_str(), token.c_str()) == 0 || errno == EEXIST);
  const absl::Status status = named ? absl::OkStatus() : Error(token);
  ::unlink(draft.c_str());
  RETURN_IF_ERROR(status);
  return ReadTokenFile("--runtime-dir", token, warning);
}

bool SharedDir::OtherRuns() const {
  const UniqueFd lock(::open(other_lock_path_.c_str(), O_RDONLY | O_NOFOLLOW | O_CLOEXEC));
  return lock.valid() && ::flock(lock.get(), LOCK_SH | LOCK_NB) != 0;
}

}  // namespace wintserve
