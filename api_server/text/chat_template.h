// The ERNIE-4.5 chat template.
#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace wintserve {

struct ChatMessage {
  std::string role;     // system, user, assistant or tool
  std::string content;
};

// cls_token, sep_token: as in tokenizer_config.json.
struct ChatTokens {
  std::string cls_token = "<|begin_of_sentence|>";
  std::string sep_token = "<|end_of_sentence|>";
};

// INVALID_ARGUMENT names the first message whose role the template has no words for.
absl::StatusOr<std::string> RenderErnieChat(const std::vector<ChatMessage>& messages,
                                            bool add_generation_prompt, const ChatTokens& tokens);

}  // namespace wintserve
