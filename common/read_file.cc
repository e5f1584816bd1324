#include "common/read_file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <array>
#include <cerrno>

#include "common/unique_fd.h"

namespace wintserve {

absl::StatusOr<std::string> ReadFile(const std::filesystem::path& path) {
  const UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!fd.valid()) return absl::ErrnoToStatus(errno, fmt::format("cannot open {}", path.string()));
  std::string content;
  std::array<char, 1 << 16> buffer;
  while (true) {
    const ssize_t size = ::read(fd.get(), buffer.data(), buffer.size());
    if (size == 0) return content;
    if (size > 0) {
      content.append(buffer.data(), size);
    } else if (errno != EINTR) {
      return absl::ErrnoToStatus(errno, fmt::format("cannot read {}", path.string()));
    }
  }
}

}  // namespace wintserve
