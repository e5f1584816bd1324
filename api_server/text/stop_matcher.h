// Finds stop strings in streamed text and holds back what could be the beginning of one.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

namespace wintserve {

// One per choice; thread-compatible. The match that is complete first wins, the longest if several
// end at the same byte. So a match never waits for text that may not come, and what is shown does
// not depend on how the text was split over pushes. Costs O(stop strings) a byte of text, whatever
// the stop strings are. Given whole UTF-8 characters, it returns whole characters.
class StopMatcher {
 public:
  // Empty stop strings are ignored. include_stop: the matched string stays in the text.
  StopMatcher(std::vector<std::string> stops, bool include_stop);

  // Text that is safe to show: no later text can make it part of a match. Text after a match is
  // dropped, and so is every Push after it.
  std::string Push(std::string_view text);
  // What was held back, once no more text comes. Empty after a match.
  std::string Flush();
  bool stopped() const { return stopped_; }

 private:
  // Knuth-Morris-Pratt over one stop string.
  struct Pattern {
    explicit Pattern(std::string stop);
    // Takes the next byte of the text; true if the pattern now ends here.
    bool Advance(char byte);

    std::string stop;
    std::vector<size_t> border;  // border[n]: longest proper border of the first n bytes
    size_t matched = 0;          // the text so far ends with this many first bytes of stop
  };

  std::vector<Pattern> patterns_;
  bool include_stop_;
  bool stopped_ = false;
  std::string held_;  // the end of the text so far that is a prefix of some stop string
};

}  // namespace wintserve
