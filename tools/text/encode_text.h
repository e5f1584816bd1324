// Texts and chats as the ids that a model gets of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "api_server/text/chat_template.h"
#include "api_server/text/tokenizer.h"

namespace wintserve::tools {

// The id of the marker that begins a text (cls_token of tokenizer_config.json), -1 if the
// vocabulary has none.
int32_t BeginId(const Tokenizer& tokenizer);

// The text between the marker that begins one, where there is one, and the token that ends
// generation.
std::vector<int32_t> EncodeDocument(std::string_view text, const Tokenizer& tokenizer);

// A stretch of a chat that is encoded alone.
struct ChatPart {
  static constexpr size_t kNotAnAnswer = -1;

  std::vector<int32_t> ids;
  size_t answer = kNotAnAnswer;  // index of the assistant's message that this is
};

// A chat as the chat template renders it, in the order of its parts. Each answer of the assistant
// is a part, and so is what stands before it, so that the ids are those of a prompt with the ids of
// an answer that the model could have given. The last message, if it is an answer, has the token
// that ends generation behind it in its part; the template's separator after the answers before it
// belongs to the next part. After any other last message the last part asks for an answer.
// INVALID_ARGUMENT "messages[I].role: …": the template has no words for it.
// REQUIRES: messages is not empty.
absl::StatusOr<std::vector<ChatPart>> EncodeChat(const std::vector<ChatMessage>& messages,
                                                 const Tokenizer& tokenizer);

}  // namespace wintserve::tools
