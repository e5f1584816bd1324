#include "tools/text/plain_text.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "common/temp_dir_test_util.h"

namespace wintserve::tools {
namespace {

class PlainTextTest : public ::testing::Test {
 protected:
  absl::StatusOr<std::string> Read(const std::string& content, size_t max_bytes = 1000) const {
    WriteFile(path_, content);
    return ReadText(path_, max_bytes);
  }
  // With FILE in place of its path.
  std::string ErrorOf(const std::string& content, size_t max_bytes = 1000) const {
    const auto text = Read(content, max_bytes);
    EXPECT_EQ(text.status().code(), absl::StatusCode::kInvalidArgument) << text.status();
    std::string message(text.status().message());
    EXPECT_EQ(message.find(path_), 0u) << message;
    return message.replace(0, path_.size(), "FILE");
  }

  const TempDir dir_;
  const std::string path_ = (dir_.path() / "a.txt").string();
};

TEST_F(PlainTextTest, IsReadAsItIs) {
  for (const std::string text : {"", "a", "床前明月光\r\n\n\xEF\xBF\xBD 🌙", "no newline\n x"}) {
    EXPECT_EQ(Read(text).value(), text);
  }
  EXPECT_EQ(ReadText(dir_.path() / "none", 9).status().code(), absl::StatusCode::kNotFound);
}

TEST_F(PlainTextTest, WhatIsNotUtf8IsNamedByItsPlace) {
  EXPECT_EQ(ErrorOf("ab\ncaf\xE9 x\n"),
            "FILE:2: must be text in UTF-8, which byte 0xe9 at offset 6 is not");
  EXPECT_EQ(ErrorOf("\xFF\xFEh"),
            "FILE:1: must be text in UTF-8, which byte 0xff at offset 0 is not");
  EXPECT_EQ(ErrorOf("a\n床\xE5\xBA"),
            "FILE:2: must be text in UTF-8, which byte 0xe5 at offset 5 is not");
}

TEST_F(PlainTextTest, APieceMayEndWithinACharacter) {
  const std::string text = "床\n🌙\n";
  for (size_t i = 0; i <= text.size(); ++i) {
    Utf8Checker checker("x");
    EXPECT_TRUE(checker.Add(text.substr(0, i)).ok());
    EXPECT_TRUE(checker.Add(text.substr(i)).ok());
    EXPECT_TRUE(checker.Finish().ok());
    EXPECT_EQ(checker.Add("\x80").message(),
              "x:3: must be text in UTF-8, which byte 0x80 at offset 9 is not");
  }
}

TEST_F(PlainTextTest, NoMoreIsReadThanIsAllowed) {
  EXPECT_EQ(Read("12\n4", 4).value(), "12\n4");
  EXPECT_EQ(ErrorOf("12\n45", 4), "FILE: is longer than the 4 bytes that are allowed of one text");
  EXPECT_EQ(ReadText("/dev/zero", 4).status().message(),
            "/dev/zero: is longer than the 4 bytes that are allowed of one text");
}

}  // namespace
}  // namespace wintserve::tools
