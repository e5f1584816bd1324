#include "tools/text/encode_text.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tests/fakes/fake_tokenizer.h"

namespace wintserve::tools {
namespace {

using ::testing::HasSubstr;

// The text of the parts, that of an answer with its number in brackets.
std::string Parts(const std::vector<ChatMessage>& messages) {
  const FakeTokenizer tokenizer;
  const auto parts = EncodeChat(messages, tokenizer);
  std::string text;
  for (const ChatPart& part : parts.value()) {
    const std::string bytes = tokenizer.Decode(part.ids);
    text += part.answer == ChatPart::kNotAnAnswer
                ? bytes
                : "[" + std::to_string(part.answer) + ":" + bytes + "]";
  }
  return text;
}

TEST(EncodeChat, EncodesEveryAnswerAlone) {
  EXPECT_EQ(
      Parts(
          {{"system", "s"}, {"user", "q"}, {"assistant", "a"}, {"user", "r"}, {"assistant", "b"}}),
      "<|begin_of_sentence|>s\nUser: q\nAssistant: [2:a]<|end_of_sentence|>User: r\n"
      "Assistant: [4:b</s>]");
}

TEST(EncodeChat, AsksForAnAnswerWhereTheLastMessageIsNone) {
  EXPECT_EQ(Parts({{"user", "q"}}), "<|begin_of_sentence|>User: q\nAssistant: ");
  EXPECT_EQ(Parts({{"user", "q"}, {"assistant", ""}, {"user", "r"}}),
            "<|begin_of_sentence|>User: q\nAssistant: [1:]<|end_of_sentence|>User: r\n"
            "Assistant: ");
}

TEST(EncodeChat, NamesTheFirstRoleWithoutWords) {
  const auto parts =
      EncodeChat({{"user", "q"}, {"assistant", "a"}, {"tool", "t"}}, FakeTokenizer());
  EXPECT_THAT(std::string(parts.status().message()), HasSubstr("messages[2].role: "));
}

// With a marker that begins a text.
class TokenizerWithBegin : public FakeTokenizer {
 public:
  int32_t IdOf(std::string_view token) const override {
    return token == "<|begin_of_sentence|>" ? 3 : FakeTokenizer::IdOf(token);
  }
};

TEST(EncodeDocument, PutsTheTextBetweenItsMarkers) {
  const int32_t a = FakeTokenizer::IdOfByte('a');
  EXPECT_EQ(EncodeDocument("a", TokenizerWithBegin()), (std::vector<int32_t>{3, a, 2}));
  EXPECT_EQ(EncodeDocument("a", FakeTokenizer()), (std::vector<int32_t>{a, 2}));
}

}  // namespace
}  // namespace wintserve::tools
