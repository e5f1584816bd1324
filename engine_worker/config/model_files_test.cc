#include "engine_worker/config/model_files.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <fstream>

#include "common/temp_dir_test_util.h"

namespace wintserve {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::HasSubstr;

struct Failure {
  absl::StatusCode code;
  std::string message;
};

template <typename T>
Failure FailureOf(const absl::StatusOr<T>& result) {
  return {result.status().code(), std::string(result.status().message())};
}

TEST(ModelFiles, TextIsReadWhole) {
  const TempDir dir;
  const std::string text(1 << 20, 'x');
  std::ofstream(dir.path() / "f") << text;
  fs::create_symlink("f", dir.path() / "link");
  EXPECT_EQ(*ReadModelText(dir.path() / "f"), text);
  EXPECT_EQ(*ReadModelText(dir.path() / "link"), text);
}

// Without a writer, opening a pipe to read it would wait for ever.
TEST(ModelFiles, APipeIsRefusedAtOnce) {
  const TempDir dir;
  ASSERT_EQ(::mkfifo((dir.path() / "f").c_str(), 0600), 0);
  const Failure failure = FailureOf(ReadModelText(dir.path() / "f"));
  EXPECT_EQ(failure.code, absl::StatusCode::kDataLoss);
  EXPECT_EQ(failure.message, (dir.path() / "f").string() + ": not a regular file");
}

TEST(ModelFiles, ALinkToNothingIsToldFromNothing) {
  const TempDir dir;
  fs::create_symlink("../blobs/abc", dir.path() / "link");
  const Failure link = FailureOf(OpenModelFile(dir.path() / "link"));
  EXPECT_EQ(link.code, absl::StatusCode::kNotFound);
  EXPECT_THAT(link.message, HasSubstr("/link: a link to ../blobs/abc, which is not there"));
  const Failure none = FailureOf(OpenModelFile(dir.path() / "none"));
  EXPECT_EQ(none.code, absl::StatusCode::kNotFound);
  EXPECT_THAT(none.message, HasSubstr("/none: no such file"));
}

TEST(ModelFiles, ALinkToItselfIsRefused) {
  const TempDir dir;
  fs::create_symlink("f", dir.path() / "f");
  const Failure failure = FailureOf(OpenModelFile(dir.path() / "f"));
  EXPECT_EQ(failure.code, absl::StatusCode::kDataLoss);
  EXPECT_THAT(failure.message, HasSubstr("/f: cannot be opened: "));
}

TEST(ModelFiles, TextBeyondItsBoundIsNotRead) {
  const TempDir dir;
  std::ofstream(dir.path() / "f") << "{";
  fs::resize_file(dir.path() / "f", uintmax_t{1} << 40);
  const Failure failure = FailureOf(ReadModelText(dir.path() / "f"));
  EXPECT_EQ(failure.code, absl::StatusCode::kDataLoss);
  EXPECT_THAT(failure.message,
              AllOf(HasSubstr("found 1099511627776 bytes"), HasSubstr("at most 268435456")));
}

TEST(ModelFiles, ADirectoryIsListedByName) {
  const TempDir dir;
  for (const char* name : {"b", "c", "a"}) std::ofstream(dir.path() / name) << "";
  const auto entries = ListModelDir(dir.path());
  ASSERT_TRUE(entries.ok()) << entries.status();
  ASSERT_EQ(entries->size(), 3u);
  EXPECT_EQ(entries->front().path(), dir.path() / "a");
}

TEST(ModelFiles, WhatIsNoDirectoryIsToldFromNothing) {
  const TempDir dir;
  std::ofstream(dir.path() / "f") << "";
  const Failure file = FailureOf(ListModelDir(dir.path() / "f"));
  EXPECT_EQ(file.code, absl::StatusCode::kDataLoss);
  EXPECT_THAT(file.message, HasSubstr("/f: not a directory"));
  const Failure none = FailureOf(ListModelDir(dir.path() / "none"));
  EXPECT_EQ(none.code, absl::StatusCode::kNotFound);
  EXPECT_THAT(none.message, HasSubstr("/none: no such directory"));
}

}  // namespace
}  // namespace wintserve
