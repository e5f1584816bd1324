#include "tools/text/line_reader.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "absl/status/status.h"
#include "common/status_macros.h"

namespace wintserve::tools {
namespace {

constexpr size_t kBufferBytes = 64 << 10;

}  // namespace

absl::StatusOr<LineReader> LineReader::Open(const std::filesystem::path& path) {
  UniqueFd file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!file.valid()) {
    return absl::ErrnoToStatus(errno, fmt::format("cannot open {}", path.string()));
  }
  LineReader reader(path, std::move(file));
  // A directory opens like a file, and says at the first read what it is.
  RETURN_IF_ERROR(reader.Fill().status());
  return reader;
}

LineReader::LineReader(std::filesystem::path path, UniqueFd file)
    : path_(std::move(path)), file_(std::move(file)), buffer_(kBufferBytes) {}

absl::StatusOr<bool> LineReader::Fill() {
  while (unread_.empty()) {
    const ssize_t size = ::read(file_.get(), buffer_.data(), buffer_.size());
    if (size == 0) return false;
    if (size > 0) {
      unread_ = std::string_view(buffer_.data(), static_cast<size_t>(size));
    } else if (errno != EINTR) {
      return absl::ErrnoToStatus(errno, fmt::format("cannot read {}", path_.string()));
    }
  }
  return true;
}

std::string_view LineReader::Take(size_t max_bytes) {
  const size_t newline = unread_.find('\n');
  const size_t line = newline == std::string_view::npos ? unread_.size() : newline + 1;
  const std::string_view taken = unread_.substr(0, std::min(line, max_bytes));
  unread_.remove_prefix(taken.size());
  return taken;
}

absl::StatusOr<bool> LineReader::Next(size_t max_bytes, std::string* piece) {
  piece->clear();
  while (piece->size() < max_bytes) {
    ASSIGN_OR_RETURN(const bool has_more, Fill());
    if (!has_more) break;
    piece->append(Take(max_bytes - piece->size()));
    if (piece->back() == '\n') break;
  }
  return !piece->empty();
}

absl::StatusOr<size_t> LineReader::SkipLine() {
  size_t num_bytes = 0;
  while (true) {
    ASSIGN_OR_RETURN(const bool has_more, Fill());
    if (!has_more) return num_bytes;
    const std::string_view skipped = Take(unread_.size());
    num_bytes += skipped.size();
    if (skipped.back() == '\n') return num_bytes - 1;
  }
}

}  // namespace wintserve::tools
