#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <unordered_map>

namespace wintserve {

struct TokenHash {
  using is_transparent = void;
  size_t operator()(std::string_view token) const { return std::hash<std::string_view>()(token); }
};

// From a token's text to its id; looked up by string_view without a copy.
using TokenIds = std::unordered_map<std::string, int32_t, TokenHash, std::equal_to<>>;

}  // namespace wintserve
