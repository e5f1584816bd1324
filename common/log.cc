#include "common/log.h"

#include <fmt/format.h>
#include <spdlog/pattern_formatter.h>
#include <spdlog/sinks/stdout_color_sinks.h>

#include <memory>

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

}  // namespace

void InitLog(std::string_view process_name, std::string_view level) {
  auto formatter = std::make_unique<spdlog::pattern_formatter>();
  formatter->add_flag<LevelFlag>('*').set_pattern(
      fmt::format("%^%*%$ %Y-%m-%d %H:%M:%S,%e %P {}: %v", process_name));
  auto logger = std::make_shared<spdlog::logger>(
      std::string(process_name), std::make_shared<spdlog::sinks::stderr_color_sink_mt>());
  logger->set_formatter(std::move(formatter));
  logger->set_level(spdlog::level::from_str(std::string(level)));
  logger->flush_on(spdlog::level::info);
  spdlog::set_default_logger(std::move(logger));
}

}  // namespace wintserve
