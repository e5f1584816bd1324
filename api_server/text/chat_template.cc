#include "api_server/text/chat_template.h"

#include <fmt/format.h>

#include <cstddef>

namespace wintserve {

absl::StatusOr<std::string> RenderErnieChat(const std::vector<ChatMessage>& messages,
                                            bool add_generation_prompt, const ChatTokens& tokens) {
  std::string prompt = tokens.cls_token;
  for (size_t i = 0; i < messages.size(); ++i) {
    const ChatMessage& message = messages[i];
    if (message.role == "system") {
      prompt += message.content + "\n";
    } else if (message.role == "user") {
      prompt += "User: " + message.content + "\n";
    } else if (message.role == "assistant") {
      prompt += "Assistant: " + message.content + tokens.sep_token;
    } else {
      return absl::InvalidArgumentError(fmt::format(
          "messages[{}].role: this model's chat template has no words for '{}', allowed: "
          "system, user, assistant",
          i, message.role));
    }
  }
  if (add_generation_prompt) prompt += "Assistant: ";
  return prompt;
}

}  // namespace wintserve
