#include "tools/text/encode_text.h"

#include <string>

#include "common/check.h"
#include "common/status_macros.h"

namespace wintserve::tools {

int32_t BeginId(const Tokenizer& tokenizer) {
  return tokenizer.IdOf(tokenizer.chat_tokens().cls_token);
}

std::vector<int32_t> EncodeDocument(std::string_view text, const Tokenizer& tokenizer) {
  std::vector<int32_t> ids;
  const int32_t begin_id = BeginId(tokenizer);
  if (begin_id >= 0) ids.push_back(begin_id);
  const std::vector<int32_t> text_ids = tokenizer.Encode(text);
  ids.insert(ids.end(), text_ids.begin(), text_ids.end());
  ids.push_back(tokenizer.eos_id());
  return ids;
}

absl::StatusOr<std::vector<ChatPart>> EncodeChat(const std::vector<ChatMessage>& messages,
                                                 const Tokenizer& tokenizer) {
  CHECK(!messages.empty());
  ASSIGN_OR_RETURN(const std::string chat, RenderErnieChat(messages, /*add_generation_prompt=*/true,
                                                           tokenizer.chat_tokens()));
  std::vector<ChatPart> parts;
  size_t num_encoded = 0;  // bytes of the chat
  for (size_t i = 0; i < messages.size(); ++i) {
    if (messages[i].role != "assistant") continue;
    ASSIGN_OR_RETURN(const std::string prompt,
                     RenderErnieChat({messages.begin(), messages.begin() + i},
                                     /*add_generation_prompt=*/true, tokenizer.chat_tokens()));
    parts.push_back({.ids = tokenizer.Encode(std::string_view(prompt).substr(num_encoded))});
    parts.push_back({.ids = tokenizer.Encode(messages[i].content), .answer = i});
    num_encoded = prompt.size() + messages[i].content.size();
  }
  if (messages.back().role == "assistant") {
    parts.back().ids.push_back(tokenizer.eos_id());
  } else {
    parts.push_back({.ids = tokenizer.Encode(std::string_view(chat).substr(num_encoded))});
  }
  return parts;
}

}  // namespace wintserve::tools
