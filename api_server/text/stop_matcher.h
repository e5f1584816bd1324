// Finds stop strings in streamed text and holds back what could be the beginning of one.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace wintserve {

class StopMatcher {
 public:
  // include_stop: the matched string stays in the text.
  StopMatcher(std::vector<std::string> stops, bool include_stop);

  // Text that is safe to show. The earliest match wins, the longest on a tie; text after it is dropped.
  std::string Push(std::string_view text);
  // What was held back, once no more text comes. Empty after a match.
  std::string Flush();
  bool stopped() const { return stopped_; }

 private:
  std::vector<std::string> stops_;
  bool include_stop_;
  bool stopped_ = false;
  std::string held_;
};

}  // namespace wintserve
