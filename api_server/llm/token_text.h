// Tokens as log-probabilities show them.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "api_server/text/tokenizer.h"

namespace wintserve {

// A token's bytes where they are whole characters; else "bytes:\\xe6\\x98".
std::string SpellingOf(const std::string& bytes);

// Of valid UTF-8.
int NumCharacters(std::string_view text);

// See LLM::TextOffsets.
std::vector<int> TextOffsetsOf(const Tokenizer& tokenizer, std::span<const int32_t> ids);

}  // namespace wintserve
