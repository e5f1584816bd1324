// Texts of others as parts of one error line.
#pragma once

#include <fmt/format.h>

#include <string>
#include <string_view>

#include "absl/status/status.h"

namespace wintserve::tools {

// At most so many bytes of `text`, cut between characters of UTF-8 with "…" behind, and blanks in
// place of control characters.
inline std::string OneLine(std::string_view text, size_t most_bytes) {
  size_t size = text.size();
  if (size > most_bytes) {
    size = most_bytes;
    while (size > 0 && (static_cast<unsigned char>(text[size]) & 0xC0) == 0x80) --size;
  }
  std::string line(text.substr(0, size));
  for (char& character : line) {
    const auto byte = static_cast<unsigned char>(character);
    if (byte < 0x20 || byte == 0x7F) character = ' ';
  }
  return size < text.size() ? line + "…" : line;
}

// The error of what stands at `place`, a file and line.
inline absl::Status AtPlace(std::string_view place, const absl::Status& status) {
  return {status.code(), fmt::format("{}: {}", place, std::string(status.message()))};
}

}  // namespace wintserve::tools
