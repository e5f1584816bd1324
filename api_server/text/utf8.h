// Cutting a byte stream into whole UTF-8 characters.
#pragma once

#include <string>
#include <string_view>

namespace wintserve {

// Removes from `pending` everything that is decided and returns it as valid UTF-8: whole characters
// as they are, each maximal ill-formed subpart as one U+FFFD (the Unicode and WHATWG rule). What
// stays in `pending` is the unfinished beginning of one character: at most three bytes. The result
// depends on the bytes alone, never on how they were split over calls.
std::string TakeWholeCharacters(std::string& pending);

// The same for a text that is complete: an unfinished character at its end is one more U+FFFD.
std::string ReplaceInvalidUtf8(std::string_view text);

}  // namespace wintserve
