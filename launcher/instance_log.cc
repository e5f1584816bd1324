#include "launcher/instance_log.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>

#include <cerrno>
#include <cstring>

#include "common/status_macros.h"
#include "common/terminal.h"
#include "launcher/client/load_reporter.h"

namespace wintserve {
namespace {

absl::Status Error(const std::string& path, std::string_view reason) {
  return absl::InvalidArgumentError(fmt::format("--log-dir: {}: {}", path, reason));
}

absl::Status MakeDirectory(const std::string& path) {
  if (::mkdir(path.c_str(), 0700) == 0) return absl::OkStatus();
  if (errno != EEXIST) return Error(path, std::strerror(errno));
  struct stat info = {};
  if (::stat(path.c_str(), &info) != 0) return Error(path, std::strerror(errno));
  return S_ISDIR(info.st_mode) ? absl::OkStatus() : Error(path, "is not a directory");
}

absl::StatusOr<UniqueFd> OpenFile(const std::string& path) {
  // A link may lead to a file that was not meant; a pipe without a reader would make us wait.
  UniqueFd fd(::open(path.c_str(),
                     O_WRONLY | O_CREAT | O_APPEND | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC, 0600));
  if (!fd.valid()) return Error(path, std::strerror(errno));
  struct stat info = {};
  if (::fstat(fd.get(), &info) != 0 || !S_ISREG(info.st_mode)) {
    return Error(path, "is not a regular file");
  }
  return fd;
}

// FastDeploy's where it has one.
std::string FileNameOf(std::string_view process_name) {
  constexpr std::string_view kEngineWorker = "engine_worker.";
  if (!process_name.starts_with(kEngineWorker)) return fmt::format("{}.log", process_name);
  return fmt::format("workerlog.{}", process_name.substr(kEngineWorker.size()));
}

// As spdlog colours a terminal.
std::string_view ColourOf(std::string_view line) {
  if (line.starts_with("WARNING")) return "\033[33m\033[1m";
  if (line.starts_with("ERROR") || line.starts_with("CRITICAL")) return "\033[31m\033[1m";
  return "";
}

}  // namespace

absl::StatusOr<InstanceLog> InstanceLog::Open(const std::string& log_dir,
                                              const std::vector<std::string>& names,
                                              LoadingPlace loading_place) {
  UniqueFd console(::fcntl(STDERR_FILENO, F_DUPFD_CLOEXEC, 3));
  if (!console.valid()) return absl::ErrnoToStatus(errno, "stderr");
  InstanceLog log;
  log.in_colour_ = ShowsColours(console.get());
  const bool is_elsewhere = loading_place.fd.valid();
  const int loading_fd = is_elsewhere ? loading_place.fd.get() : console.get();
  if (CanMoveCursor(loading_fd)) log.terminal_fd_ = loading_fd;
  log.is_utf8_ = IsUtf8Terminal();
  log.in_own_lines_ = is_elsewhere || loading_place.in_own_lines;
  log.console_ = std::make_unique<LineSink>(std::move(console));
  if (is_elsewhere) log.loading_ = std::make_unique<LineSink>(std::move(loading_place.fd));
  if (log_dir.empty()) return log;
  RETURN_IF_ERROR(MakeDirectory(log_dir));
  for (const std::string& name : names) {
    ASSIGN_OR_RETURN(UniqueFd file, OpenFile(fmt::format("{}/{}", log_dir, FileNameOf(name))));
    log.files_[name] = std::make_unique<LineSink>(std::move(file));
  }
  return log;
}

void InstanceLog::Write(const std::string& name, std::string_view line) {
  if (const auto file = files_.find(name); file != files_.end()) file->second->Write(line);
  const bool is_said_there = console_->has_row() || tells_loading_in_own_lines();
  if (loading_ == nullptr && is_said_there && IsLoadingLine(line)) return;
  WriteConsole(fmt::format("[{}] ", name), line);
}

bool InstanceLog::tells_loading_in_own_lines() const { return in_own_lines_ && terminal_fd_ < 0; }

std::optional<InstanceLog::RowShape> InstanceLog::row_shape() const {
  if (terminal_fd_ < 0) return std::nullopt;
  // One column less than there are: a full row would make some terminals begin another.
  return RowShape{.columns = TerminalColumns(terminal_fd_) - 1, .utf8 = is_utf8_};
}

void InstanceLog::WriteOwn(std::string_view line) {
  if (const auto file = files_.find(kLauncherLogName); file != files_.end()) {
    file->second->Write(line);
  }
  WriteConsole("", line);
}

void InstanceLog::WriteConsole(std::string_view prefix, std::string_view line) {
  const std::string_view colour = in_colour_ ? ColourOf(line) : "";
  if (colour.empty()) return console_->Write(fmt::format("{}{}", prefix, line));
  const size_t level_end = line.find(' ');
  console_->Write(fmt::format("{}{}{}\033[m{}", prefix, colour, line.substr(0, level_end),
                              level_end == line.npos ? "" : line.substr(level_end)));
}

}  // namespace wintserve
