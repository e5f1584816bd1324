#include "api_server/text/added_tokens.h"

#include <algorithm>

#include "common/check.h"

namespace wintserve {

void AddedTokenSplitter::Add(const std::string& content, int32_t id) {
  CHECK(!content.empty(), "id={}", id);
  id_of_content_[content] = id;
  std::vector<size_t>& lengths = lengths_[static_cast<uint8_t>(content[0])];
  const auto position =
      std::lower_bound(lengths.begin(), lengths.end(), content.size(), std::greater<>());
  if (position == lengths.end() || *position != content.size()) {
    lengths.insert(position, content.size());
  }
}

AddedTokenSplitter::Match AddedTokenSplitter::LongestAtStart(std::string_view text) const {
  for (const size_t length : lengths_[static_cast<uint8_t>(text[0])]) {
    if (length > text.size()) continue;
    const auto found = id_of_content_.find(text.substr(0, length));
    if (found != id_of_content_.end()) return {length, found->second};
  }
  return {};
}

void AddedTokenSplitter::Split(std::string_view text,
                               const std::function<void(std::string_view)>& on_segment,
                               const std::function<void(int32_t)>& on_token) const {
  size_t segment_start = 0;
  size_t position = 0;
  while (position < text.size()) {
    const Match match = LongestAtStart(text.substr(position));
    if (match.length == 0) {
      ++position;
      continue;
    }
    if (position > segment_start) on_segment(text.substr(segment_start, position - segment_start));
    on_token(match.id);
    position += match.length;
    segment_start = position;
  }
  if (segment_start < text.size()) on_segment(text.substr(segment_start));
}

}  // namespace wintserve
