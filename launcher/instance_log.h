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

// Nobody who writes here waits for a disk or a console: see LineSink. Threading: any thread.
class InstanceLog {
 public:
  // The console is our stderr, as it is now. log_dir: empty, or the directory of the files, made
  // with mode 0700 if there is none. A file for each of `names` is appended to: NAME.log, but
  // workerlog.1 of "engine_worker.1". INVALID_ARGUMENT says what is wrong with the directory.
  static absl::StatusOr<InstanceLog> Open(const std::string& log_dir,
                                          const std::vector<std::string>& names);

  // A line of the process `name`, as it wrote it. The console shows it as "[name] line".
  void Write(const std::string& name, std::string_view line);
  // A line of our own: as it is.
  void WriteOwn(std::string_view line);

  // What a row below the console's lines may be.
  struct RowShape {
    int columns = 0;
    bool utf8 = false;
  };
  // As the console is now; none if it has no such row: it is no terminal, or a dumb one.
  std::optional<RowShape> row_shape() const;
  // Shows `row` there, which has that shape and no escape sequences; empty: nothing. While it shows
  // how far loading is, the console leaves out the lines of workers that say the same; the files
  // have them. REQUIRES: row_shape() was not none.
  void ShowLoadingRow(std::string row) { console_->SetRow(std::move(row)); }

 private:
  InstanceLog() = default;

  void WriteConsole(std::string_view prefix, std::string_view line);

  int terminal_fd_ = -1;  // the console's, if it can show a row; console_ owns it
  bool is_utf8_ = false;
  std::unique_ptr<LineSink> console_;
  bool in_colour_ = false;                                  // the console shows colours
  std::map<std::string, std::unique_ptr<LineSink>> files_;  // by process name
};

// The name that an instance's launcher has among them.
inline constexpr char kLauncherLogName[] = "launcher";

}  // namespace wintserve
