// A bound on JSON text before it is parsed.
#pragma once

#include <string_view>

namespace wintserve {

inline constexpr int kMaxJsonDepth = 64;

// Whether objects and lists are nested deeper than kMaxJsonDepth. A parser takes such a text, but a
// megabyte of '[' costs it a hundred times that in memory, and what walks the value afterwards (to
// print it, say) the whole stack. Says nothing about a text that is no JSON.
bool IsNestedTooDeep(std::string_view json);

}  // namespace wintserve
