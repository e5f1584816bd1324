#include "common/read_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "common/temp_dir_test_util.h"

namespace wintserve {
namespace {

using ::testing::HasSubstr;

// What ReadFile gives of a file with this in it.
std::string ReadBack(const std::string& content) {
  const TempDir dir;
  WriteFile(dir.path() / "file", content);
  return ReadFile(dir.path() / "file").value();
}

TEST(ReadFile, ReturnsEveryByteOfAFileLongerThanOneRead) {
  std::string content(200'000, '\0');
  for (size_t i = 0; i < content.size(); ++i) content[i] = static_cast<char>(i * 31 % 257);
  EXPECT_EQ(ReadBack(content), content);
}

TEST(ReadFile, AnEmptyFileIsNoError) { EXPECT_EQ(ReadBack(""), ""); }

TEST(ReadFile, NamesTheFileThatDoesNotExist) {
  const auto content = ReadFile("no/such/file");
  EXPECT_EQ(content.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(content.status().message()), HasSubstr("cannot open no/such/file"));
}

TEST(ReadFile, NamesTheDirectoryThatItCannotRead) {
  const auto content = ReadFile("/proc/self");
  EXPECT_FALSE(absl::IsNotFound(content.status()));
  EXPECT_THAT(std::string(content.status().message()),
              HasSubstr("cannot read /proc/self: Is a directory"));
}

}  // namespace
}  // namespace wintserve
