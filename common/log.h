// One log line per event on stderr: "INFO     2026-01-02 03:04:05,678 1234 api_server: message".
// Everything logs through LOG_INFO and its siblings; prompts and outputs only at debug.
#pragma once

#include <spdlog/spdlog.h>

#include <functional>
#include <string>
#include <string_view>

namespace wintserve {

// Call once, from main. process_name stands in every line: "api_server", "engine_worker.0".
// level: "debug", "info", "warning" or "error".
void InitLog(std::string_view process_name, std::string_view level);

// The same, but every line goes to `write`, without its newline, on the thread that logs. Several
// may at once.
void InitLog(std::string_view process_name, std::string_view level,
             std::function<void(std::string_view line)> write);

}  // namespace wintserve

#define LOG_DEBUG(...) ::spdlog::debug(__VA_ARGS__)
#define LOG_INFO(...) ::spdlog::info(__VA_ARGS__)
#define LOG_WARNING(...) ::spdlog::warn(__VA_ARGS__)
#define LOG_ERROR(...) ::spdlog::error(__VA_ARGS__)
