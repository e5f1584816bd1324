#include "tools/text/line_reader.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "common/temp_dir_test_util.h"

namespace wintserve::tools {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

class LineReaderTest : public ::testing::Test {
 protected:
  LineReader Open(const std::string& content) {
    WriteFile(dir_.path() / "lines", content);
    return LineReader::Open(dir_.path() / "lines").value();
  }
  TempDir dir_;
};

std::vector<std::string> Pieces(LineReader reader, size_t max_bytes) {
  std::vector<std::string> pieces;
  std::string piece;
  while (reader.Next(max_bytes, &piece).value()) pieces.push_back(piece);
  EXPECT_EQ(piece, "");
  return pieces;
}

TEST_F(LineReaderTest, GivesLinesWithTheirNewlines) {
  EXPECT_THAT(Pieces(Open("a\n\nbc"), 10), ElementsAre("a\n", "\n", "bc"));
  EXPECT_THAT(Pieces(Open(""), 10), ElementsAre());
}

TEST_F(LineReaderTest, CutsALongLine) {
  EXPECT_THAT(Pieces(Open("abcdef\ng\n"), 4), ElementsAre("abcd", "ef\n", "g\n"));
  EXPECT_THAT(Pieces(Open("abc\ndefg"), 4), ElementsAre("abc\n", "defg"));
}

TEST_F(LineReaderTest, JoinsALineThatIsReadInSeveralBuffers) {
  const std::string line(200'000, 'x');
  EXPECT_THAT(Pieces(Open(line + "\n" + line), 1 << 20), ElementsAre(line + "\n", line));
}

TEST_F(LineReaderTest, SkipsTheRestOfALine) {
  LineReader reader = Open(std::string(200'000, 'x') + "\nb");
  std::string piece;
  ASSERT_TRUE(reader.Next(10, &piece).value());
  EXPECT_EQ(reader.SkipLine().value(), 199'990u);
  ASSERT_TRUE(reader.Next(10, &piece).value());
  EXPECT_EQ(piece, "b");
  EXPECT_EQ(reader.SkipLine().value(), 0u);
}

TEST_F(LineReaderTest, NamesAFileThatIsNotThereOrADirectory) {
  const auto missing = LineReader::Open(dir_.path() / "none").status();
  EXPECT_EQ(missing.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(missing.message()), HasSubstr((dir_.path() / "none").string()));
  const auto directory = LineReader::Open(dir_.path()).status();
  EXPECT_THAT(std::string(directory.message()), HasSubstr(dir_.path().string()));
  EXPECT_THAT(std::string(directory.message()), HasSubstr("Is a directory"));
}

}  // namespace
}  // namespace wintserve::tools
