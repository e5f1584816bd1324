#include "api_server/llm/token_text.h"

#include <fmt/format.h>

#include <algorithm>

#include "api_server/text/detokenizer.h"
#include "api_server/text/utf8.h"

namespace wintserve {

std::string SpellingOf(const std::string& bytes) {
  if (ReplaceInvalidUtf8(bytes) == bytes) return bytes;
  std::string text = "bytes:";
  for (const char byte : bytes) text += fmt::format("\\x{:02x}", static_cast<uint8_t>(byte));
  return text;
}

// All bytes but those that continue a character.
int NumCharacters(std::string_view text) {
  return static_cast<int>(std::count_if(text.begin(), text.end(), [](char byte) {
    return (static_cast<uint8_t>(byte) & 0xc0) != 0x80;
  }));
}

std::vector<int> TextOffsetsOf(const Tokenizer& tokenizer, std::span<const int32_t> ids) {
  std::vector<int> offsets;
  offsets.reserve(ids.size() + 1);
  Detokenizer detokenizer(tokenizer);
  int num_characters = 0;
  for (const int32_t id : ids) {
    offsets.push_back(num_characters);
    num_characters += NumCharacters(detokenizer.Push(id));
  }
  offsets.push_back(num_characters + NumCharacters(detokenizer.Flush()));
  return offsets;
}

}  // namespace wintserve
