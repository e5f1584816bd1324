#include "launcher/child_output.h"

#include <fcntl.h>

#include <cerrno>

#include "absl/status/status.h"

namespace wintserve {
namespace {

constexpr size_t kReadBytes = 64 << 10;  // a pipe's size
constexpr size_t kMaxLineBytes = 16 << 10;
// A process that has been reaped leaves a pipe full; who has inherited the pipe may go on.
constexpr int kMaxLastReads = 16;

}  // namespace

absl::StatusOr<UniqueFd> ChildOutput::Open() {
  int fds[2];
  if (::pipe2(fds, O_CLOEXEC) != 0) return absl::ErrnoToStatus(errno, "pipe");
  reader_.Reset(fds[0]);
  UniqueFd writer(fds[1]);
  // Ours alone: the child's end waits.
  if (::fcntl(reader_.get(), F_SETFL, O_NONBLOCK) != 0) {
    return absl::ErrnoToStatus(errno, "fcntl");
  }
  return writer;
}

void ChildOutput::Read() { ReadOnce(); }

void ChildOutput::Finish() {
  for (int i = 0; i < kMaxLastReads && ReadOnce(); ++i) {
  }
  if (!pending_.empty()) log_->Write(name_, pending_);
  pending_.clear();
  reader_.Reset();
}

bool ChildOutput::ReadOnce() {
  if (!reader_.valid()) return false;
  const size_t num_pending = pending_.size();
  pending_.resize(num_pending + kReadBytes);
  ssize_t count;
  do {
    count = ::read(reader_.get(), pending_.data() + num_pending, kReadBytes);
  } while (count < 0 && errno == EINTR);
  const bool ended = count == 0 || (count < 0 && errno != EAGAIN);
  pending_.resize(num_pending + (count > 0 ? count : 0));
  if (ended) reader_.Reset();
  HandOnLines();
  return count > 0;
}

void ChildOutput::HandOnLines() {
  size_t begin = 0;
  while (true) {
    const size_t end = pending_.find('\n', begin);
    const bool is_long = (end == pending_.npos ? pending_.size() : end) - begin > kMaxLineBytes;
    if (end == pending_.npos && !is_long) break;
    // A line without end must not fill the memory: it becomes several.
    const size_t length = is_long ? kMaxLineBytes : end - begin;
    log_->Write(name_, std::string_view(pending_).substr(begin, length));
    begin += is_long ? length : length + 1;
  }
  pending_.erase(0, begin);
}

}  // namespace wintserve
