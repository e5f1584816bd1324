#include "launcher/line_sink.h"

#include <fmt/format.h>
#include <poll.h>

#include <cerrno>
#include <chrono>
#include <deque>
#include <utility>

#include "common/mutex.h"

namespace wintserve {
namespace {

constexpr std::chrono::seconds kLastWords(1);

struct QueuedLine {
  std::string text;            // with its newline, or empty
  int64_t num_missing_before;  // dropped between the line before and this one
};

// The number of bytes that were written, all of them unless it fails.
size_t WriteAll(int fd, std::string_view text) {
  size_t written = 0;
  while (written < text.size()) {
    const ssize_t count = ::write(fd, text.data() + written, text.size() - written);
    if (count >= 0) {
      written += count;
    } else if (errno == EAGAIN) {
      // Somebody who shares the descriptor does not want to wait; we may.
      pollfd wait = {fd, POLLOUT, 0};
      ::poll(&wait, 1, -1);
    } else if (errno != EINTR) {
      break;
    }
  }
  return written;
}

}  // namespace

struct LineSink::State {
  explicit State(UniqueFd fd_in) : fd(std::move(fd_in)) {}

  const UniqueFd fd;
  Mutex mu;
  CondVar changed;
  std::deque<QueuedLine> lines GUARDED_BY(mu);
  size_t num_queued_bytes GUARDED_BY(mu) = 0;
  int64_t num_missing GUARDED_BY(mu) = 0;  // dropped since the last line that was queued
  int64_t num_dropped GUARDED_BY(mu) = 0;
  bool closing GUARDED_BY(mu) = false;
  bool closed GUARDED_BY(mu) = false;  // the thread has written what it could

  void Run() EXCLUDES(mu);
};

void LineSink::State::Run() {
  int64_t num_missing_now = 0;  // before the line in hand
  bool in_line = false;         // what was written last is the beginning of a line
  while (true) {
    QueuedLine line;
    {
      MutexLock lock(&mu);
      changed.Wait(&mu, [this]() NO_THREAD_SAFETY_ANALYSIS { return closing || !lines.empty(); });
      if (lines.empty()) {
        closed = true;
        changed.NotifyAll();
        return;
      }
      line = std::move(lines.front());
      lines.pop_front();
      num_queued_bytes -= line.text.size();
    }
    num_missing_now += line.num_missing_before;
    std::string text = in_line ? "\n" : "";
    if (num_missing_now > 0) {
      text += fmt::format("... {} lines are missing here: they could not be written\n",
                          num_missing_now);
    }
    text += line.text;
    const size_t written = WriteAll(fd.get(), text);
    if (written > 0) in_line = text[written - 1] != '\n';
    if (written == text.size()) {
      num_missing_now = 0;
    } else if (!line.text.empty()) {
      ++num_missing_now;
      MutexLock lock(&mu);
      ++num_dropped;
    }
  }
}

LineSink::LineSink(UniqueFd fd)
    : state_(std::make_shared<State>(std::move(fd))), thread_([state = state_] { state->Run(); }) {}

LineSink::~LineSink() {
  bool closed = false;
  {
    MutexLock lock(&state_->mu);
    if (state_->num_missing > 0) state_->lines.push_back({"", state_->num_missing});
    state_->closing = true;
    state_->changed.NotifyAll();
    closed = state_->changed.WaitFor(&state_->mu, kLastWords,
                                     [this]() NO_THREAD_SAFETY_ANALYSIS { return state_->closed; });
  }
  if (closed) {
    thread_.join();
  } else {
    thread_.detach();
  }
}

void LineSink::Write(std::string_view line) {
  MutexLock lock(&state_->mu);
  if (state_->num_queued_bytes + line.size() + 1 > kMaxQueuedBytes) {
    ++state_->num_missing;
    ++state_->num_dropped;
    return;
  }
  QueuedLine queued = {std::string(line), std::exchange(state_->num_missing, 0)};
  queued.text += '\n';
  state_->num_queued_bytes += queued.text.size();
  state_->lines.push_back(std::move(queued));
  state_->changed.NotifyAll();
}

int64_t LineSink::num_dropped() const {
  MutexLock lock(&state_->mu);
  return state_->num_dropped;
}

}  // namespace wintserve
