#include "launcher/child_output.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <filesystem>
#include <fstream>
#include <optional>

#include "common/read_file.h"
#include "common/temp_dir_test_util.h"

namespace wintserve {
namespace {

namespace fs = std::filesystem;
using ::testing::HasSubstr;
using ::testing::StartsWith;

// Our stderr goes to a file meanwhile.
class ChildOutputTest : public ::testing::Test {
 protected:
  ChildOutputTest() {
    const UniqueFd file(::open((dir_ / "console").c_str(), O_WRONLY | O_CREAT | O_APPEND, 0600));
    stderr_.Reset(::dup(STDERR_FILENO));
    ::dup2(file.get(), STDERR_FILENO);
  }
  ~ChildOutputTest() override { RestoreStderr(); }

  void RestoreStderr() {
    if (stderr_.valid()) ::dup2(stderr_.get(), STDERR_FILENO);
    stderr_.Reset();
  }

  void Open(const std::vector<std::string>& names = {"worker", kLauncherLogName}) {
    auto log = InstanceLog::Open((dir_ / "log").string(), names);
    ASSERT_TRUE(log.ok()) << log.status();
    log_.emplace(*std::move(log));
  }
  // What has come to console and file once everything is written.
  std::string Console() { return Written("console"); }
  std::string File(const std::string& name) { return Written("log/" + name + ".log"); }

  static void Say(const UniqueFd& fd, const std::string& text) {
    ASSERT_EQ(::write(fd.get(), text.data(), text.size()), std::ssize(text));
  }

  const TempDir temp_dir_;
  const fs::path dir_ = temp_dir_.path();
  UniqueFd stderr_;
  std::optional<InstanceLog> log_;

 private:
  std::string Written(const std::string& name) {
    log_.reset();
    RestoreStderr();
    const auto text = ReadFile(dir_ / name);
    return text.ok() ? *text : text.status().ToString();
  }
};

TEST_F(ChildOutputTest, LinesGoToTheFileAndWithAPrefixToTheConsole) {
  Open();
  ChildOutput output("worker", &*log_);
  const auto child = output.Open();
  ASSERT_TRUE(child.ok());
  Say(*child, "one\ntwo\n\nthr");
  output.Read();
  log_->WriteOwn("ours");
  Say(*child, "ee\n");
  output.Read();
  EXPECT_EQ(Console(), "[worker] one\n[worker] two\n[worker] \nours\n[worker] three\n");
  EXPECT_EQ(File("worker"), "one\ntwo\n\nthree\n");
  EXPECT_EQ(File(kLauncherLogName), "ours\n");
}

TEST_F(ChildOutputTest, LastWordsAreNotLostThoughTheyAreAPipeFullAndHaveNoEnd) {
  Open();
  ChildOutput output("worker", &*log_);
  auto child = output.Open();
  ASSERT_TRUE(child.ok());
  std::string expected;
  for (int i = 0; i < 6000; ++i) expected += fmt::format("line {}\n", i);
  expected.resize(std::min<size_t>(expected.size(), 65'000));
  expected += "terminate called";
  Say(*child, expected);
  child->Reset();
  output.Finish();
  EXPECT_EQ(output.fd(), -1);
  EXPECT_EQ(File("worker"), expected + "\n");
}

TEST_F(ChildOutputTest, WhoHasInheritedThePipeKeepsNobodyWaiting) {
  Open();
  ChildOutput output("worker", &*log_);
  const auto child = output.Open();
  ASSERT_TRUE(child.ok());
  Say(*child, "last");
  output.Finish();  // the other end is still open
  EXPECT_EQ(output.fd(), -1);
  EXPECT_EQ(File("worker"), "last\n");
}

TEST_F(ChildOutputTest, AClosedStreamIsNotPolledAgain) {
  Open();
  ChildOutput output("worker", &*log_);
  auto child = output.Open();
  ASSERT_TRUE(child.ok());
  EXPECT_GE(output.fd(), 0);
  child->Reset();
  output.Read();
  EXPECT_EQ(output.fd(), -1);
  output.Read();
  output.Finish();
}

TEST_F(ChildOutputTest, ALineWithoutEndBecomesSeveral) {
  Open();
  ChildOutput output("worker", &*log_);
  auto child = output.Open();
  ASSERT_TRUE(child.ok());
  Say(*child, std::string(40'000, 'x') + "\nshort\n");
  output.Read();
  const std::string cut(16 << 10, 'x');
  EXPECT_EQ(File("worker"),
            cut + "\n" + cut + "\n" + std::string(40'000 - 2 * cut.size(), 'x') + "\nshort\n");
}

TEST_F(ChildOutputTest, FilesArePrivateAndAppendedTo) {
  Open();
  log_->Write("worker", "first");
  log_.reset();
  EXPECT_EQ(fs::status(dir_ / "log").permissions(), fs::perms::owner_all);
  EXPECT_EQ(fs::status(dir_ / "log/worker.log").permissions(),
            fs::perms::owner_read | fs::perms::owner_write);
  Open();
  log_->Write("worker", "second");
  EXPECT_EQ(File("worker"), "first\nsecond\n");
}

TEST_F(ChildOutputTest, SaysWhatIsWrongWithTheDirectory) {
  std::ofstream(dir_ / "file") << "x";
  fs::create_directories(dir_ / "links");
  fs::create_symlink(dir_ / "file", dir_ / "links/worker.log");
  fs::create_directories(dir_ / "dirs/worker.log");
  struct Case {
    std::string path;
    std::string expected;
  };
  const Case cases[] = {
      {dir_ / "file", "--log-dir: " + (dir_ / "file").string() + ": is not a directory"},
      {dir_ / "no/such", "--log-dir: " + (dir_ / "no/such").string() + ": No such file"},
      {dir_ / "links", "--log-dir: " + (dir_ / "links/worker.log").string() + ": Too many levels"},
      {dir_ / "dirs", "--log-dir: " + (dir_ / "dirs/worker.log").string() + ": Is a directory"},
  };
  for (const Case& c : cases) {
    const auto log = InstanceLog::Open(c.path, {"worker"});
    EXPECT_THAT(std::string(log.status().message()), StartsWith(c.expected));
  }
}

}  // namespace
}  // namespace wintserve
