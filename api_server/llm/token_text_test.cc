#include "api_server/llm/token_text.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/fakes/fake_tokenizer.h"

namespace wintserve {
namespace {

using testing::ElementsAre;

TEST(TokenText, IsTheTokensTextOrNamesItsBytes) {
  EXPECT_EQ(SpellingOf("ab"), "ab");
  EXPECT_EQ(SpellingOf("春"), "春");
  EXPECT_EQ(SpellingOf("\xe6\x98"), "bytes:\\xe6\\x98");
  EXPECT_EQ(SpellingOf(""), "");
}

std::vector<int> OffsetsIn(const std::string& bytes) {
  std::vector<int32_t> ids;
  for (const char byte : bytes) ids.push_back(FakeTokenizer::IdOfByte(byte));
  return TextOffsetsOf(FakeTokenizer(), ids);
}

TEST(TokenText, OffsetsCountCharactersThatAreCompleteBeforeAToken) {
  EXPECT_THAT(OffsetsIn(""), ElementsAre(0));
  EXPECT_THAT(OffsetsIn("ab"), ElementsAre(0, 1, 2));
  EXPECT_THAT(OffsetsIn("a春b"), ElementsAre(0, 1, 1, 1, 2, 3));
  // What cannot become a character any more is one, and so is an unfinished one at the end.
  EXPECT_THAT(OffsetsIn("\xe6\x62\xe6\x98"), ElementsAre(0, 0, 2, 2, 3));
}

}  // namespace
}  // namespace wintserve
