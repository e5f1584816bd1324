// What is logged, for tests of it.
#pragma once

#include <spdlog/sinks/ostream_sink.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <memory>
#include <sstream>
#include <string>

namespace wintserve {

// While it lives, the process logs into it, one line of the message alone an event. REQUIRES:
// whoever logs has stopped when it goes.
class CapturedLog {
 public:
  CapturedLog() : before_(spdlog::default_logger()) {
    auto sink = std::make_shared<spdlog::sinks::ostream_sink_mt>(text_);
    sink->set_pattern("%v");
    spdlog::set_default_logger(std::make_shared<spdlog::logger>("captured", std::move(sink)));
  }
  ~CapturedLog() { spdlog::set_default_logger(before_); }
  CapturedLog(const CapturedLog&) = delete;
  CapturedLog& operator=(const CapturedLog&) = delete;

  // REQUIRES: nobody logs meanwhile.
  std::string text() const { return text_.str(); }
  int num_lines() const {
    const std::string text = text_.str();
    return static_cast<int>(std::ranges::count(text, '\n'));
  }

 private:
  std::ostringstream text_;
  const std::shared_ptr<spdlog::logger> before_;
};

}  // namespace wintserve
