// Lines to a descriptor that may be slow, full or gone.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <thread>

#include "common/unique_fd.h"

namespace wintserve {

// Writes from a thread of its own, so that nobody waits for a disk or for who reads a console. What
// does not fit in the queue, or cannot be written, is dropped; the next line that can be written
// comes after one that says how many are missing. Threading: any thread.
//
// A terminal may have a row below the lines, which is taken away before lines are written and drawn
// again behind them. It is no line: nothing else of the sink knows of it.
class LineSink {
 public:
  static constexpr size_t kMaxQueuedBytes = 4 << 20;

  explicit LineSink(UniqueFd fd);
  // Gives what is queued a second; then the thread is left behind, with what it has.
  ~LineSink();
  LineSink(const LineSink&) = delete;
  LineSink& operator=(const LineSink&) = delete;

  // `line` without its newline. Never waits.
  void Write(std::string_view line);

  // What the row below the lines shows from now on, in place of what it showed; empty: nothing. Of
  // several that come while somebody waits for the terminal, only the last is drawn. Never waits.
  // REQUIRES: the descriptor is a terminal that can move its cursor, `row` fits its width and has
  // neither newlines nor escape sequences.
  void SetRow(std::string row);
  // Whether the row shows anything.
  bool has_row() const;

  int64_t num_dropped() const;

 private:
  struct State;

  // Shared with the thread, which may outlive us.
  const std::shared_ptr<State> state_;
  std::thread thread_;
};

}  // namespace wintserve
