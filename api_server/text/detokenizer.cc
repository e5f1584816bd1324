#include "api_server/text/detokenizer.h"

#include "api_server/text/utf8.h"

namespace wintserve {

std::string Detokenizer::Push(int32_t id) {
  pending_bytes_ += tokenizer_.Bytes(id);
  return TakeWholeCharacters(pending_bytes_);
}

std::string Detokenizer::Flush() {
  std::string text = ReplaceInvalidUtf8(pending_bytes_);
  pending_bytes_.clear();
  return text;
}

}  // namespace wintserve
