// Where the lines of an instance's processes go: all to the console, those of each to a file of its
// own.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <string_view>
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

 private:
  InstanceLog(std::unique_ptr<LineSink> console, bool in_colour)
      : console_(std::move(console)), in_colour_(in_colour) {}

  void WriteConsole(std::string_view prefix, std::string_view line);

  std::unique_ptr<LineSink> console_;
  bool in_colour_;                                          // the console shows colours
  std::map<std::string, std::unique_ptr<LineSink>> files_;  // by process name
};

// The name that an instance's launcher has among them.
inline constexpr char kLauncherLogName[] = "launcher";

}  // namespace wintserve
