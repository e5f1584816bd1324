#include "api_server/text/chat_template.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "api_server/text/golden_test_util.h"

namespace wintserve {
namespace {

bool HasWords(const ChatMessage& message) {
  return message.role == "system" || message.role == "user" || message.role == "assistant";
}

TEST(ErnieChatTemplate, RendersAndEncodesEveryGoldenChat) {
  ASSERT_EQ(PoetGoldens().chats.size(), 16u);
  for (const GoldenChat& chat : PoetGoldens().chats) {
    SCOPED_TRACE(chat.name);
    // The vendor's template drops other roles without a word; we refuse them instead (see below).
    std::vector<ChatMessage> messages = chat.messages;
    std::erase_if(messages, [](const ChatMessage& message) { return !HasWords(message); });
    const auto prompt = RenderErnieChat(messages, chat.add_generation_prompt, ChatTokens());
    ASSERT_TRUE(prompt.ok()) << prompt.status();
    EXPECT_EQ(*prompt, chat.prompt);
    EXPECT_EQ(PoetTokenizer().Encode(*prompt), chat.ids);
  }
}

TEST(ErnieChatTemplate, UsesTheTokensOfTheModel) {
  const auto prompt = RenderErnieChat({{"assistant", "hi"}}, false, {"<cls>", "<sep>"});
  ASSERT_TRUE(prompt.ok());
  EXPECT_EQ(*prompt, "<cls>Assistant: hi<sep>");
}

TEST(ErnieChatTemplate, NamesTheMessageWhoseRoleItHasNoWordsFor) {
  for (const char* role : {"tool", "developer", "function", "User", ""}) {
    const auto prompt = RenderErnieChat({{"user", "hi"}, {role, "42"}}, true, ChatTokens());
    ASSERT_TRUE(absl::IsInvalidArgument(prompt.status())) << role;
    EXPECT_EQ(prompt.status().message(),
              std::string("messages[1].role: this model's chat template has no words for '") +
                  role + "', allowed: system, user, assistant");
  }
}

}  // namespace
}  // namespace wintserve
