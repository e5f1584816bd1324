#include "api_server/text/utf8.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace wintserve {
namespace {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";

// What a lead byte promises. The range of the second byte is narrower after some leads: it rules
// out overlong forms, surrogates and code points above U+10FFFF.
struct Lead {
  size_t length = 0;  // 0: no character starts with this byte
  uint8_t second_min = 0x80;
  uint8_t second_max = 0xBF;
};

Lead ParseLead(uint8_t byte) {
  if (byte < 0x80) return {1};
  if (byte < 0xC2) return {0};
  if (byte < 0xE0) return {2};
  if (byte == 0xE0) return {3, 0xA0, 0xBF};
  if (byte == 0xED) return {3, 0x80, 0x9F};
  if (byte < 0xF0) return {3};
  if (byte == 0xF0) return {4, 0x90, 0xBF};
  if (byte < 0xF4) return {4};
  if (byte == 0xF4) return {4, 0x80, 0x8F};
  return {0};
}

// How many bytes of `text`, from its first, fit the form of the character that `lead` promises.
size_t WellFormedPrefix(std::string_view text, const Lead& lead) {
  size_t length = 1;
  while (length < std::min(lead.length, text.size())) {
    const auto byte = static_cast<uint8_t>(text[length]);
    const uint8_t min = length == 1 ? lead.second_min : 0x80;
    const uint8_t max = length == 1 ? lead.second_max : 0xBF;
    if (byte < min || byte > max) break;
    ++length;
  }
  return length;
}

}  // namespace

std::string TakeWholeCharacters(std::string& pending) {
  std::string text;
  text.reserve(pending.size());
  std::string_view rest = pending;
  while (!rest.empty()) {
    const Lead lead = ParseLead(static_cast<uint8_t>(rest[0]));
    const size_t length = WellFormedPrefix(rest, lead);
    if (length == lead.length) {
      text.append(rest.substr(0, length));
    } else if (lead.length != 0 && length == rest.size()) {
      break;
    } else {
      text.append(kReplacement);
    }
    rest.remove_prefix(length);
  }
  pending.erase(0, pending.size() - rest.size());
  return text;
}

std::string ReplaceInvalidUtf8(std::string_view text) {
  std::string pending(text);
  std::string result = TakeWholeCharacters(pending);
  if (!pending.empty()) result.append(kReplacement);
  return result;
}

}  // namespace wintserve
