#include "common/progress.h"

#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <utility>
#include <vector>

#include "common/terminal.h"

namespace wintserve {
namespace {

constexpr std::chrono::milliseconds kBarInterval(200);
constexpr int kLeastBarCells = 10;
constexpr int kMostBarCells = 40;
constexpr int64_t kMib = int64_t{1} << 20;
constexpr int64_t kGib = int64_t{1} << 30;

// Amounts of one task in one unit.
struct Scale {
  double unit;
  const char* name;
  int decimals;
};

Scale ScaleOf(const ProgressState& state) {
  if (!state.noun.empty()) return {1, "", 0};
  return std::max(state.total, state.done) >= kGib ? Scale{kGib, "GiB", 1} : Scale{kMib, "MiB", 1};
}

std::string Number(double amount, const Scale& scale) {
  return fmt::format("{:.{}f}", amount / scale.unit, scale.decimals);
}

// Three significant digits, but whole numbers from 100 on.
std::string ThreeDigits(double value) {
  return fmt::format("{:.{}f}", value, value >= 100 ? 0 : value >= 10 ? 1 : 2);
}

std::string Duration(double seconds) {
  const auto whole = static_cast<int64_t>(std::ceil(seconds));
  if (whole < 60) return fmt::format("{} s", whole);
  if (whole < 3600) return fmt::format("{} min {} s", whole / 60, whole % 60);
  return fmt::format("{} h {} min", whole / 3600, whole % 3600 / 60);
}

int Percent(const ProgressState& state) {
  const double share = static_cast<double>(state.done) / static_cast<double>(state.total);
  return static_cast<int>(100 * std::clamp(share, 0.0, 1.0));
}

// What remains of a task, by what this run has done so far. Empty parts: nothing can be told yet.
struct Speed {
  std::string rate;
  std::string left;
};

Speed SpeedOf(const ProgressState& state) {
  const double done = static_cast<double>(state.done - state.done_before);
  if (done <= 0 || state.seconds <= 0) return {};
  const double rate = done / state.seconds;
  const bool is_fast = rate >= static_cast<double>(kGib);
  const Scale scale = !state.noun.empty() ? ScaleOf(state)
                      : is_fast           ? Scale{kGib, "GiB", 1}
                                          : Scale{kMib, "MiB", 1};
  Speed speed;
  speed.rate = fmt::format("{}{}/s", ThreeDigits(rate / scale.unit),
                           state.noun.empty() ? fmt::format(" {}", scale.name) : "");
  const auto left = static_cast<double>(state.total - state.done);
  if (left > 0) speed.left = fmt::format("{} left", Duration(left / rate));
  return speed;
}

std::string UnitName(const ProgressState& state) {
  return state.noun.empty() ? ScaleOf(state).name : std::string(state.noun);
}

std::string Cells(double share, int num_cells, bool utf8) {
  const double exact = std::clamp(share, 0.0, 1.0) * num_cells;
  const int full = static_cast<int>(exact);
  std::string cells;
  for (int i = 0; i < num_cells; ++i) {
    const bool is_half = i == full && exact - full >= 0.5;
    if (utf8) {
      cells += i < full ? "━" : is_half ? "╸" : "─";
    } else {
      cells += i < full ? '#' : '-';
    }
  }
  return cells;
}

void WriteAll(int fd, std::string_view text) {
  while (!text.empty()) {
    const ssize_t count = ::write(fd, text.data(), text.size());
    if (count < 0 && errno != EINTR) return;
    if (count > 0) text.remove_prefix(static_cast<size_t>(count));
  }
}

}  // namespace

std::string ProgressLine(const ProgressState& state) {
  const Scale scale = ScaleOf(state);
  std::string line =
      fmt::format("{}: {}", state.label, Number(static_cast<double>(state.done), scale));
  if (state.total > 0)
    line += fmt::format(" of {}", Number(static_cast<double>(state.total), scale));
  line += fmt::format(" {}", UnitName(state));
  if (state.total > 0) line += fmt::format(" ({}%)", Percent(state));
  const Speed speed = SpeedOf(state);
  for (const std::string& part : {speed.rate, speed.left}) {
    if (!part.empty()) line += ", " + part;
  }
  if (!state.note.empty()) line += fmt::format("; {}", state.note);
  return line;
}

std::string ProgressBar(const ProgressState& state, int columns, bool utf8) {
  const Scale scale = ScaleOf(state);
  const bool has_total = state.total > 0;
  const Speed speed = SpeedOf(state);
  std::vector<std::string> parts;  // behind the bar, the most important first
  if (has_total) parts.push_back(fmt::format("{:3}%", Percent(state)));
  parts.push_back(fmt::format(
      "{}{} {}", Number(static_cast<double>(state.done), scale),
      has_total ? "/" + Number(static_cast<double>(state.total), scale) : "", UnitName(state)));
  for (const std::string& part : {speed.left, speed.rate, std::string(state.note)}) {
    if (!part.empty()) parts.push_back(part);
  }
  // All text is ASCII but for a label or a note that a caller may have chosen otherwise: then the
  // row may come out shorter than it could be.
  const int label_columns = static_cast<int>(state.label.size()) + 1;
  int room = columns - label_columns - (has_total ? kLeastBarCells : 0);
  std::string behind;
  for (const std::string& part : parts) {
    const int needed = static_cast<int>(part.size()) + 2;
    if (needed > room) break;
    room -= needed;
    behind += "  " + part;
  }
  std::string bar = fmt::format("{} ", state.label);
  if (has_total && room >= 0) {
    const double share = static_cast<double>(state.done) / static_cast<double>(state.total);
    bar += Cells(share, std::min(kMostBarCells, kLeastBarCells + room), utf8);
  }
  bar += behind;
  return room >= 0 ? bar : bar.substr(0, static_cast<size_t>(std::max(0, columns)));
}

Progress::Progress(ProgressOptions options)
    : options_(std::move(options)),
      has_bar_(!options_.write_line && CanMoveCursor(options_.fd)),
      utf8_(IsUtf8Terminal()),
      done_(options_.done_before),
      thread_([this] { Run(); }) {}

Progress::~Progress() {
  {
    const MutexLock lock(&mu_);
    stopping_ = true;
  }
  changed_.NotifyAll();
  thread_.join();
}

void Progress::SetNote(std::string note) {
  const MutexLock lock(&mu_);
  note_ = std::move(note);
}

void Progress::Print(std::string_view line) {
  const MutexLock lock(&mu_);
  const bool was_drawn = is_drawn_;
  if (was_drawn) Erase();
  WriteAll(options_.fd, fmt::format("{}\n", line));
  if (was_drawn) Draw();
}

ProgressState Progress::StateNow() const {
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - begin_;
  return {.label = options_.label,
          .noun = options_.noun,
          .note = note_,
          .done = done_.load(std::memory_order_relaxed),
          .total = options_.total,
          .done_before = options_.done_before,
          .seconds = elapsed.count()};
}

void Progress::Draw() {
  // One column less than there are: a full row would make some terminals begin another.
  const int columns = TerminalColumns(options_.fd) - 1;
  WriteAll(options_.fd, fmt::format("\r{}\033[K", ProgressBar(StateNow(), columns, utf8_)));
  is_drawn_ = true;
}

void Progress::Erase() {
  WriteAll(options_.fd, "\r\033[K");
  is_drawn_ = false;
}

void Progress::Run() {
  const std::chrono::milliseconds interval = has_bar_ ? kBarInterval : options_.line_interval;
  while (true) {
    std::string line;
    {
      const MutexLock lock(&mu_);
      if (changed_.WaitFor(&mu_, interval,
                           [this]() NO_THREAD_SAFETY_ANALYSIS { return stopping_; })) {
        if (is_drawn_) Erase();
        return;
      }
      if (has_bar_) {
        Draw();
        continue;
      }
      line = ProgressLine(StateNow());
    }
    // Not under the lock: who takes the lines may call us.
    if (options_.write_line) {
      options_.write_line(line);
    } else {
      Print(line);
    }
  }
}

}  // namespace wintserve
