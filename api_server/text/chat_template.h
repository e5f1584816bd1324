// The ERNIE-4.5 chat template.
#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace wintserve {

struct ChatMessage {
  std::string role;  // system, user or assistant
  std::string content;
};

// As in tokenizer_config.json; the defaults are those of the vendor's template.
struct ChatTokens {
  std::string cls_token = "<|begin_of_sentence|>";
  std::string sep_token = "<|end_of_sentence|>";
};

// The prompt as one text, to be encoded as one text. Contents are put in as they are: not trimmed,
// markers in them count as markers. add_generation_prompt: the answer of the assistant comes next.
// INVALID_ARGUMENT names the first message whose role the template has no words for: the vendor's
// template renders nothing for it, which would lose what the caller said.
absl::StatusOr<std::string> RenderErnieChat(const std::vector<ChatMessage>& messages,
                                            bool add_generation_prompt, const ChatTokens& tokens);

}  // namespace wintserve
