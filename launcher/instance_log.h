// Where the lines of an instance's processes go: all to the console, those of each to a file of its
// own.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "launcher/line_sink.h"

namespace wintserve {

// Where it is shown how far loading is. A terminal has a row for it. Elsewhere the lines of the
// workers say it, if they are of a level that is logged.
struct LoadingPlace {
  UniqueFd fd = {};  // instead of the console; to it no other line goes
  // Elsewhere lines of our own say it, and the console leaves out those of the workers. So it is
  // wherever `fd` is open.
  bool in_own_lines = false;
};

// Nobody who writes here waits for a disk or a console: see LineSink. Threading: any thread.
class InstanceLog {
 public:
  // The console is our stderr, as it is now. log_dir: empty, or the directory of the files, made
  // with mode 0700 if there is none. A file for each of `names` is appended to: NAME.log, but
  // workerlog.1 of "engine_worker.1". INVALID_ARGUMENT says what is wrong with the directory.
  static absl::StatusOr<InstanceLog> Open(const std::string& log_dir,
                                          const std::vector<std::string>& names,
                                          LoadingPlace loading_place = {});

  // A line of the process `name`, as it wrote it. The console shows it as "[name] line".
  void Write(const std::string& name, std::string_view line);
  // A line of our own: as it is.
  void WriteOwn(std::string_view line);

  // What a row below the lines there may be.
  struct RowShape {
    int columns = 0;
    bool utf8 = false;
  };
  // Of the place of loading, as it is now; none if it has no such row: it is no terminal, or a dumb
  // one.
  std::optional<RowShape> row_shape() const;
  // Shows `row` there, which has that shape and no escape sequences; empty: nothing. While it shows
  // how far loading is, the console leaves out the lines of workers that say the same; the files
  // have them. REQUIRES: row_shape() was not none.
  void ShowLoadingRow(std::string row) { loading_sink().SetRow(std::move(row)); }
  // Whether WriteLoadingLine says how far loading is.
  bool tells_loading_in_own_lines() const;
  // Writes a line about it. REQUIRES: tells_loading_in_own_lines().
  void WriteLoadingLine(std::string_view line) { loading_sink().Write(line); }

 private:
  InstanceLog() = default;

  void WriteConsole(std::string_view prefix, std::string_view line);
  LineSink& loading_sink() const { return loading_ == nullptr ? *console_ : *loading_; }

  int terminal_fd_ = -1;  // of the place of loading, if it can show a row; its sink owns it
  bool is_utf8_ = false;
  bool in_own_lines_ = false;
  std::unique_ptr<LineSink> console_;
  std::unique_ptr<LineSink> loading_;                       // null: the console
  bool in_colour_ = false;                                  // the console shows colours
  std::map<std::string, std::unique_ptr<LineSink>> files_;  // by process name
};

// The name that an instance's launcher has among them.
inline constexpr char kLauncherLogName[] = "launcher";

}  // namespace wintserve
