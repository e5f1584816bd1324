// Turns a growing list of ids into text, whole characters only.
#pragma once

#include <cstdint>
#include <string>

#include "api_server/text/tokenizer.h"

namespace wintserve {

// One per choice. Concatenating every Push and the Flush gives text that is valid UTF-8.
class Detokenizer {
 public:
  explicit Detokenizer(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {}

  // The text that `id` completes: empty while a character is incomplete. Bytes that can no longer
  // become a character come out as U+FFFD.
  std::string Push(int32_t id);
  // What is left of an unfinished character: one U+FFFD, or nothing.
  std::string Flush();

 private:
  const Tokenizer& tokenizer_;
  std::string pending_bytes_;
};

}  // namespace wintserve
