#include "api_server/text/stop_matcher.h"

#include <algorithm>
#include <utility>

namespace wintserve {

StopMatcher::Pattern::Pattern(std::string stop_string)
    : stop(std::move(stop_string)), border(stop.size() + 1, 0) {
  size_t length = 0;
  for (size_t i = 1; i < stop.size(); ++i) {
    while (length > 0 && stop[i] != stop[length]) length = border[length];
    if (stop[i] == stop[length]) ++length;
    border[i + 1] = length;
  }
}

bool StopMatcher::Pattern::Advance(char byte) {
  while (matched > 0 && stop[matched] != byte) matched = border[matched];
  if (stop[matched] == byte) ++matched;
  return matched == stop.size();
}

StopMatcher::StopMatcher(std::vector<std::string> stops, bool include_stop)
    : include_stop_(include_stop) {
  for (std::string& stop : stops) {
    if (!stop.empty()) patterns_.emplace_back(std::move(stop));
  }
}

std::string StopMatcher::Push(std::string_view text) {
  if (stopped_) return "";
  const size_t first_new = held_.size();
  std::string shown = std::exchange(held_, "");
  shown += text;

  size_t longest_prefix = 0;
  for (size_t i = first_new; i < shown.size(); ++i) {
    size_t match_length = 0;
    longest_prefix = 0;
    for (Pattern& pattern : patterns_) {
      if (pattern.Advance(shown[i])) match_length = std::max(match_length, pattern.stop.size());
      longest_prefix = std::max(longest_prefix, pattern.matched);
    }
    if (match_length > 0) {
      stopped_ = true;
      shown.resize(i + 1 - (include_stop_ ? 0 : match_length));
      return shown;
    }
  }
  if (text.empty()) longest_prefix = first_new;
  held_ = shown.substr(shown.size() - longest_prefix);
  shown.resize(shown.size() - longest_prefix);
  return shown;
}

std::string StopMatcher::Flush() { return std::exchange(held_, ""); }

}  // namespace wintserve
