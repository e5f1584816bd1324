#include "launcher/line_sink.h"

#include <fmt/format.h>
#include <poll.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <deque>
#include <utility>
#include <vector>

#include "common/mutex.h"

namespace wintserve {
namespace {

constexpr std::chrono::seconds kLastWords(1);
constexpr size_t kBatchBytes = 64 << 10;
constexpr char kEraseRow[] = "\r\033[K";

struct QueuedLine {
  std::string text;            // with its newline, or empty
  int64_t num_missing_before;  // dropped between the line before and this one
};

struct Batch {
  int64_t num_missing_before = 0;
  std::string text;
  std::vector<size_t> line_ends;  // in the text
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

// What was written last, as the one who writes knows it.
class Writer {
 public:
  explicit Writer(int fd) : fd_(fd) {}

  // Lines, and behind them the row. Returns how many of the lines are lost.
  int64_t Write(const Batch& batch, const std::string& row);
  // The row alone.
  void Draw(const std::string& row);

 private:
  const int fd_;
  int64_t num_missing_ = 0;  // lines between what is there and what comes
  bool in_line_ = false;     // what is there ends with the beginning of a line
  bool row_is_there_ = false;
};

int64_t Writer::Write(const Batch& batch, const std::string& row) {
  num_missing_ += batch.num_missing_before;
  std::string head = row_is_there_ ? kEraseRow : in_line_ ? "\n" : "";
  if (num_missing_ > 0) {
    head += fmt::format("... {} lines are missing here: they could not be written\n", num_missing_);
  }
  const std::string text = head + batch.text;
  const size_t written = WriteAll(fd_, text);
  if (written > 0) in_line_ = text[written - 1] != '\n';
  if (written >= head.size()) num_missing_ = 0;
  const int64_t num_lost = std::ranges::count_if(
      batch.line_ends, [&](size_t end) { return head.size() + end > written; });
  num_missing_ += num_lost;
  if (written > 0) row_is_there_ = false;
  Draw(row);
  return num_lost;
}

void Writer::Draw(const std::string& row) {
  // The beginning of a line that could not be written to its end stays what it is.
  if (in_line_ || (row.empty() && !row_is_there_)) return;
  // Over what is there, and only then what is beyond: erased first, it would flicker.
  WriteAll(fd_, row.empty() ? kEraseRow : fmt::format("\r{}\033[K", row));
  row_is_there_ = !row.empty();
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
  std::string row GUARDED_BY(mu);
  bool row_changed GUARDED_BY(mu) = false;
  bool closing GUARDED_BY(mu) = false;
  bool closed GUARDED_BY(mu) = false;  // the thread has written what it could

  void Run() EXCLUDES(mu);
  Batch Take() REQUIRES(mu);
};

// As many lines as follow each other without a gap, up to a limit; none if there is none.
Batch LineSink::State::Take() {
  Batch batch;
  if (lines.empty()) return batch;
  batch.num_missing_before = lines.front().num_missing_before;
  do {
    batch.text += lines.front().text;
    if (!lines.front().text.empty()) batch.line_ends.push_back(batch.text.size());
    num_queued_bytes -= lines.front().text.size();
    lines.pop_front();
  } while (!lines.empty() && lines.front().num_missing_before == 0 &&
           batch.text.size() < kBatchBytes);
  return batch;
}

void LineSink::State::Run() {
  Writer writer(fd.get());
  while (true) {
    Batch batch;
    std::string row_now;
    bool has_lines = false;
    bool is_last = false;
    {
      MutexLock lock(&mu);
      changed.Wait(&mu, [this]() NO_THREAD_SAFETY_ANALYSIS {
        return closing || row_changed || !lines.empty();
      });
      if (closing) row.clear();
      is_last = closing && lines.empty();
      has_lines = !lines.empty();
      batch = Take();
      row_now = row;
      row_changed = false;
    }
    const int64_t num_lost = has_lines ? writer.Write(batch, row_now) : 0;
    if (!has_lines) writer.Draw(row_now);
    MutexLock lock(&mu);
    num_dropped += num_lost;
    if (is_last) {
      closed = true;
      changed.NotifyAll();
      return;
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

void LineSink::SetRow(std::string row) {
  MutexLock lock(&state_->mu);
  if (row.empty() && state_->row.empty()) return;
  state_->row = std::move(row);
  state_->row_changed = true;
  state_->changed.NotifyAll();
}

bool LineSink::has_row() const {
  MutexLock lock(&state_->mu);
  return !state_->row.empty();
}

int64_t LineSink::num_dropped() const {
  MutexLock lock(&state_->mu);
  return state_->num_dropped;
}

}  // namespace wintserve
