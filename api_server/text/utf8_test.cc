#include "api_server/text/utf8.h"

#include <gtest/gtest.h>

namespace wintserve {
namespace {

struct Utf8Case {
  const char* name;
  std::string_view bytes;
  std::string_view text;
};

class InvalidUtf8 : public testing::TestWithParam<Utf8Case> {};

TEST_P(InvalidUtf8, EachMaximalIllFormedSubpartBecomesOneReplacementCharacter) {
  EXPECT_EQ(ReplaceInvalidUtf8(GetParam().bytes), GetParam().text);
}

TEST_P(InvalidUtf8, TheResultDoesNotDependOnHowTheBytesWereSplit) {
  std::string pending;
  std::string text;
  for (const char byte : GetParam().bytes) {
    pending.push_back(byte);
    text += TakeWholeCharacters(pending);
    ASSERT_LE(pending.size(), 3u);
  }
  EXPECT_EQ(text + ReplaceInvalidUtf8(pending), GetParam().text);
}

INSTANTIATE_TEST_SUITE_P(
    All, InvalidUtf8,
    testing::Values(
        Utf8Case{"Empty", "", ""}, Utf8Case{"Ascii", "abc", "abc"},
        Utf8Case{"ShortestAndLongestOfEachLength",
                 "\x7F\xC2\x80\xDF\xBF\xE0\xA0\x80\xEF\xBF\xBF\xF0\x90\x80\x80\xF4\x8F\xBF\xBF",
                 "\x7F\xC2\x80\xDF\xBF\xE0\xA0\x80\xEF\xBF\xBF\xF0\x90\x80\x80\xF4\x8F\xBF\xBF"},
        Utf8Case{"LoneContinuation", "a\x80z", "a\uFFFDz"},
        Utf8Case{"Overlong2", "\xC0\xAF", "\uFFFD\uFFFD"},
        Utf8Case{"Overlong3", "\xE0\x9F\xBF", "\uFFFD\uFFFD\uFFFD"},
        Utf8Case{"Overlong4", "\xF0\x8F\xBF\xBF", "\uFFFD\uFFFD\uFFFD\uFFFD"},
        Utf8Case{"Surrogate", "\xED\xA0\x80", "\uFFFD\uFFFD\uFFFD"},
        Utf8Case{"AboveTheLastCodePoint", "\xF4\x90\x80\x80", "\uFFFD\uFFFD\uFFFD\uFFFD"},
        Utf8Case{"NeverALead", "\xF5\xFE\xFF", "\uFFFD\uFFFD\uFFFD"},
        Utf8Case{"CutBeforeAscii", "\xE4\xBD!", "\uFFFD!"},
        Utf8Case{"CutBeforeAnotherCharacter", "\xF0\x9F\x98\xE4\xBD\xA0", "\uFFFD你"},
        Utf8Case{"CutAtTheEnd", "a\xF0\x9F\x98", "a\uFFFD"},
        Utf8Case{"NulIsACharacter", std::string_view("a\0b", 3), std::string_view("a\0b", 3)}),
    [](const auto& info) { return info.param.name; });

TEST(TakeWholeCharacters, KeepsAnUnfinishedCharacterUntilItsLastByte) {
  std::string pending = "\xE4\xBD";
  EXPECT_EQ(TakeWholeCharacters(pending), "");
  EXPECT_EQ(pending, "\xE4\xBD");
  pending += "\xA0!";
  EXPECT_EQ(TakeWholeCharacters(pending), "你!");
  EXPECT_EQ(pending, "");
}

}  // namespace
}  // namespace wintserve
