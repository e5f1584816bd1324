#include "engine_worker/config/model_files.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "common/status_macros.h"

namespace wintserve {
namespace {

constexpr int64_t kMaxTextBytes = int64_t{256} << 20;  // an index of the largest models has 20 MiB

absl::Status DataLoss(const std::filesystem::path& path, std::string_view what) {
  return absl::DataLossError(fmt::format("{}: {}", path.string(), what));
}

// A hub's cache holds links, whose targets may be gone.
absl::Status NoSuchFile(const std::filesystem::path& path) {
  std::error_code error;
  const std::filesystem::path target = std::filesystem::read_symlink(path, error);
  return absl::NotFoundError(
      error ? fmt::format("{}: no such file", path.string())
            : fmt::format("{}: a link to {}, which is not there", path.string(), target.string()));
}

}  // namespace

absl::StatusOr<ModelFile> OpenModelFile(const std::filesystem::path& path) {
  const auto cannot_open = [&path] {
    return errno == ENOENT
               ? NoSuchFile(path)
               : DataLoss(path, fmt::format("cannot be opened: {}", std::strerror(errno)));
  };
  // Looked at first, as opening a pipe would wait for its writer.
  const UniqueFd place(::open(path.c_str(), O_PATH | O_CLOEXEC));
  struct stat info = {};
  if (!place.valid() || ::fstat(place.get(), &info) != 0) return cannot_open();
  if (!S_ISREG(info.st_mode)) return DataLoss(path, "not a regular file");
  const std::string same_file = fmt::format("/proc/self/fd/{}", place.get());
  ModelFile file = {UniqueFd(::open(same_file.c_str(), O_RDONLY | O_CLOEXEC)), info.st_size};
  if (!file.fd.valid()) return cannot_open();
  return file;
}

absl::StatusOr<std::string> ReadModelText(const std::filesystem::path& path) {
  ASSIGN_OR_RETURN(const ModelFile file, OpenModelFile(path));
  if (file.size_bytes > kMaxTextBytes) {
    return DataLoss(path, fmt::format("found {} bytes, expected text of at most {}",
                                      file.size_bytes, kMaxTextBytes));
  }
  std::string text(file.size_bytes, '\0');
  size_t num_read = 0;
  while (num_read < text.size()) {
    const ssize_t count = ::read(file.fd.get(), text.data() + num_read, text.size() - num_read);
    if (count == 0) break;  // shortened meanwhile
    if (count > 0) {
      num_read += count;
    } else if (errno != EINTR) {
      return DataLoss(path, fmt::format("cannot be read: {}", std::strerror(errno)));
    }
  }
  text.resize(num_read);
  return text;
}

absl::StatusOr<std::vector<std::filesystem::directory_entry>> ListModelDir(
    const std::filesystem::path& dir) {
  namespace fs = std::filesystem;
  std::error_code error;
  std::vector<fs::directory_entry> entries;
  fs::directory_iterator it(dir, error);
  for (; !error && it != fs::directory_iterator(); it.increment(error)) entries.push_back(*it);
  if (error == std::errc::no_such_file_or_directory) {
    return absl::NotFoundError(fmt::format("{}: no such directory", dir.string()));
  }
  if (error == std::errc::not_a_directory) return DataLoss(dir, "not a directory");
  if (error) return DataLoss(dir, fmt::format("cannot be listed: {}", error.message()));
  std::sort(entries.begin(), entries.end());
  return entries;
}

}  // namespace wintserve
