// How far a long task has got, for the one who waits for it: a bar where stderr is a terminal, a
// line every few seconds elsewhere.
#pragma once

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <thread>

#include "common/mutex.h"

namespace wintserve {

// What there is to tell at one moment. Amounts are bytes, or numbers of `noun`.
struct ProgressState {
  std::string_view label;  // "loading"
  std::string_view noun;   // "experts"; empty: bytes, which are shown as MiB or GiB
  std::string_view note;   // what is at work just now: "layer 12"; may be empty
  int64_t done = 0;
  int64_t total = 0;  // 0: not known
  // What an earlier run had done, so that it tells nothing about how fast this one is.
  int64_t done_before = 0;
  double seconds = 0;  // since this run began
};

// "loading: 12.3 of 87.4 GiB (14%), 2.13 GiB/s, 35 s left; layer 12"
std::string ProgressLine(const ProgressState& state);

// One row of a terminal, at most so many columns wide: "loading ━━━━━╸──── 52% 45.1/87.4 GiB …".
// Parts that do not fit are left out, the note first. utf8: false draws with '#' and '-'.
std::string ProgressBar(const ProgressState& state, int columns, bool utf8);

// Environment variable: the number of a descriptor on which `wintserve serve` shows how far loading
// is, as Progress would, for the program that has started it and passes it the descriptor.
inline constexpr char kLoadingFdVariable[] = "WINTSERVE_LOADING_FD";

struct ProgressOptions {
  std::string label;
  int64_t total = 0;  // 0: not known
  std::string noun = {};
  int64_t done_before = 0;
  // Takes the lines, on a thread of ours; if set, there is no bar. By default lines go to `fd`.
  std::function<void(std::string_view line)> write_line = {};
  std::chrono::milliseconds line_interval{5000};
  int fd = STDERR_FILENO;
};

//   Progress progress({.label = "verifying", .total = size_bytes});
//   … progress.Add(tensor_bytes);        // from any thread
//
// Shows nothing before the first interval is over (a bar: a fifth of a second), so that short tasks
// are silent, and nothing at its end: the bar disappears, and the caller says what came out.
// While there is a bar, whoever else writes to the terminal has to do it with Print; a program that
// logs gives that to InitLog:  InitLog(name, level, [&](auto line) { progress.Print(line); }).
// Threading: any thread. Errors: a descriptor that cannot be written is not told of.
class Progress {
 public:
  explicit Progress(ProgressOptions options);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  void Add(int64_t amount) { done_.fetch_add(amount, std::memory_order_relaxed); }
  void SetNote(std::string note) EXCLUDES(mu_);
  // A whole line to the descriptor, above the bar if there is one.
  void Print(std::string_view line) EXCLUDES(mu_);

  bool has_bar() const { return has_bar_; }

 private:
  void Run() EXCLUDES(mu_);
  ProgressState StateNow() const REQUIRES(mu_);
  void Draw() REQUIRES(mu_);
  void Erase() REQUIRES(mu_);

  const ProgressOptions options_;
  const bool has_bar_;
  const bool utf8_;
  const std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
  std::atomic<int64_t> done_;
  Mutex mu_;
  CondVar changed_;
  std::string note_ GUARDED_BY(mu_);
  bool is_drawn_ GUARDED_BY(mu_) = false;
  bool stopping_ GUARDED_BY(mu_) = false;
  std::thread thread_;
};

}  // namespace wintserve
