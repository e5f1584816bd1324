// Cuts a text at its added tokens.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "api_server/text/token_ids.h"

namespace wintserve {

// Thread-safe once every Add is done.
class AddedTokenSplitter {
 public:
  // content: not empty. Adding it again with the same id changes nothing.
  void Add(const std::string& content, int32_t id);

  // Walks through `text`: on_segment for each stretch between added tokens that is not empty,
  // on_token for each added token, leftmost first, the longest where several start together.
  // Matches raw text, case-sensitive. One hash lookup a byte for each length of token that starts
  // so.
  void Split(std::string_view text, const std::function<void(std::string_view)>& on_segment,
             const std::function<void(int32_t)>& on_token) const;

 private:
  struct Match {
    size_t length = 0;  // 0: none
    int32_t id = 0;
  };
  Match LongestAtStart(std::string_view text) const;

  TokenIds id_of_content_;
  // By first byte: the lengths of the tokens that start with it, longest first.
  std::array<std::vector<size_t>, 256> lengths_;
};

}  // namespace wintserve
