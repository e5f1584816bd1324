#include "tools/quantizer/output/disk.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/resource.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <optional>

#include "common/status_macros.h"
#include "common/unique_fd.h"

namespace wintserve::quantizer {
namespace {

namespace fs = std::filesystem;

std::optional<int64_t> FreeBytes(const fs::path& path) {
  struct statvfs info = {};
  if (::statvfs(path.c_str(), &info) != 0) return std::nullopt;
  return static_cast<int64_t>(info.f_bavail) * static_cast<int64_t>(info.f_frsize);
}

// Why there is no space, as far as the system says.
std::string Allowed(int error, const fs::path& path) {
  if (error == ENOSPC) {
    const std::optional<int64_t> free_bytes = FreeBytes(path.parent_path());
    if (free_bytes.has_value()) return fmt::format("; {} are free", SizeText(*free_bytes));
  }
  rlimit limit = {};
  if (error == EFBIG && ::getrlimit(RLIMIT_FSIZE, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY) {
    return fmt::format("; the limit on a file's size (ulimit -f) is {}",
                       SizeText(static_cast<int64_t>(limit.rlim_cur)));
  }
  return "";
}

}  // namespace

absl::Status SystemError(int error, const fs::path& path, std::string_view what) {
  const std::string text = fmt::format("{}: {}: {}", path.string(), what, std::strerror(error));
  const bool is_full = error == ENOSPC || error == EDQUOT || error == EFBIG;
  if (is_full) return absl::ResourceExhaustedError(text + Allowed(error, path));
  return absl::UnknownError(text);
}

std::string SizeText(int64_t bytes) {
  constexpr int64_t kMib = 1 << 20;
  constexpr int64_t kGib = 1 << 30;
  const auto size = static_cast<double>(bytes);
  return bytes < kGib ? fmt::format("{:.1f} MiB", size / kMib)
                      : fmt::format("{:.2f} GiB", size / kGib);
}

absl::Status CheckSpace(const fs::path& directory, int64_t needed_bytes) {
  const std::optional<int64_t> free_bytes = FreeBytes(directory);
  if (!free_bytes.has_value()) {
    return SystemError(errno, directory, "cannot be asked for its free space");
  }
  if (*free_bytes >= needed_bytes) return absl::OkStatus();
  return absl::ResourceExhaustedError(fmt::format("{}: {} are free, the output needs {}",
                                                  directory.string(), SizeText(*free_bytes),
                                                  SizeText(needed_bytes)));
}

absl::Status SyncDirectory(const fs::path& path) {
  const UniqueFd directory(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!directory.valid() || ::fsync(directory.get()) != 0) {
    return SystemError(errno, path, "cannot be synchronised");
  }
  return absl::OkStatus();
}

absl::Status WriteAll(int fd, std::span<const uint8_t> bytes, int64_t offset,
                      const fs::path& path) {
  while (!bytes.empty()) {
    const ssize_t written = ::pwrite(fd, bytes.data(), bytes.size(), offset);
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return SystemError(errno, path, "cannot be written");
    bytes = bytes.subspan(written);
    offset += written;
  }
  return absl::OkStatus();
}

absl::Status ReadAll(int fd, std::span<uint8_t> bytes, int64_t offset, const fs::path& path) {
  while (!bytes.empty()) {
    const ssize_t size = ::pread(fd, bytes.data(), bytes.size(), offset);
    if (size < 0 && errno == EINTR) continue;
    if (size <= 0) return SystemError(size < 0 ? errno : EIO, path, "cannot be read");
    bytes = bytes.subspan(size);
    offset += size;
  }
  return absl::OkStatus();
}

absl::Status WriteAtomically(const fs::path& path, std::string_view text) {
  const fs::path unnamed = UnnamedPath(path);
  {
    const UniqueFd file(::open(unnamed.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666));
    if (!file.valid()) return SystemError(errno, unnamed, "cannot be made");
    RETURN_IF_ERROR(WriteAll(
        file.get(), {reinterpret_cast<const uint8_t*>(text.data()), text.size()}, 0, unnamed));
    if (::fsync(file.get()) != 0) return SystemError(errno, unnamed, "cannot be synchronised");
  }
  if (::rename(unnamed.c_str(), path.c_str()) != 0) {
    return SystemError(errno, path, "cannot be replaced");
  }
  return SyncDirectory(path.parent_path());
}

fs::path UnnamedPath(const fs::path& path) { return path.string() + ".new"; }

}  // namespace wintserve::quantizer
