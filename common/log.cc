#include "common/log.h"

#include <fmt/format.h>
#include <spdlog/details/null_mutex.h>
#include <spdlog/details/os.h>
#include <spdlog/pattern_formatter.h>
#include <spdlog/sinks/base_sink.h>
#include <spdlog/sinks/stdout_color_sinks.h>
#include <unistd.h>

#include <cstring>
#include <memory>
#include <utility>

#include "common/mutex.h"
#include "common/terminal.h"

namespace wintserve {
namespace {

// FastDeploy's column: the level in capitals, eight wide.
class LevelFlag : public spdlog::custom_flag_formatter {
 public:
  void format(const spdlog::details::log_msg& msg, const std::tm&,
              spdlog::memory_buf_t& dest) override {
    static constexpr const char* kNames[] = {"TRACE", "DEBUG",    "INFO", "WARNING",
                                             "ERROR", "CRITICAL", "OFF"};
    fmt::format_to(std::back_inserter(dest), "{:<8}", kNames[msg.level]);
  }
  std::unique_ptr<custom_flag_formatter> clone() const override {
    return std::make_unique<LevelFlag>();
  }
};

// Hands every line on.
class LineFunction : public spdlog::sinks::base_sink<spdlog::details::null_mutex> {
 public:
  explicit LineFunction(std::function<void(std::string_view)> write) : write_(std::move(write)) {}

 private:
  // The formatter is not to be used by two threads at once.
  void sink_it_(const spdlog::details::log_msg& msg) override {
    spdlog::memory_buf_t line;
    {
      MutexLock lock(&mu_);
      formatter_->format(msg, line);
    }
    write_(
        std::string_view(line.data(), line.size() - std::strlen(spdlog::details::os::default_eol)));
  }
  void flush_() override {}

  Mutex mu_;
  const std::function<void(std::string_view)> write_;
};

void SetLogger(std::string_view process_name, std::string_view level, spdlog::sink_ptr sink) {
  auto formatter = std::make_unique<spdlog::pattern_formatter>();
  formatter->add_flag<LevelFlag>('*').set_pattern(
      fmt::format("%^%*%$ %Y-%m-%d %H:%M:%S,%e %P {}: %v", process_name));
  auto logger = std::make_shared<spdlog::logger>(std::string(process_name), std::move(sink));
  logger->set_formatter(std::move(formatter));
  logger->set_level(spdlog::level::from_str(std::string(level)));
  logger->flush_on(spdlog::level::info);
  spdlog::set_default_logger(std::move(logger));
}

}  // namespace

void InitLog(std::string_view process_name, std::string_view level) {
  const auto colours =
      ShowsColours(STDERR_FILENO) ? spdlog::color_mode::automatic : spdlog::color_mode::never;
  SetLogger(process_name, level, std::make_shared<spdlog::sinks::stderr_color_sink_mt>(colours));
}

void InitLog(std::string_view process_name, std::string_view level,
             std::function<void(std::string_view line)> write) {
  SetLogger(process_name, level, std::make_shared<LineFunction>(std::move(write)));
}

}  // namespace wintserve
