#include "launcher/shared_dir.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <filesystem>
#include <fstream>
#include <optional>

#include "common/temp_dir_test_util.h"

namespace wintserve {
namespace {

namespace fs = std::filesystem;
using ::testing::HasSubstr;

class SharedDirTest : public ::testing::Test {
 protected:
  SharedDir MustOpen(const std::string& role) {
    auto dir = SharedDir::Open(path_, role);
    EXPECT_TRUE(dir.ok()) << dir.status();
    return *std::move(dir);
  }

  const TempDir temp_dir_;
  const std::string parent_ = temp_dir_.path().string();
  const std::string path_ = parent_ + "/run";
  std::string warning_;
};

TEST_F(SharedDirTest, BothRolesHaveTheSamePrivateDirectoryAndToken) {
  const SharedDir engine = MustOpen("engine");
  const SharedDir api = MustOpen("api");
  EXPECT_EQ(engine.path(), api.path());
  struct stat info = {};
  ASSERT_EQ(::stat(path_.c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0700u);
  const auto token = engine.Token(&warning_);
  ASSERT_TRUE(token.ok()) << token.status();
  EXPECT_EQ(token->size(), 32u);
  EXPECT_EQ(*api.Token(&warning_), *token);
  ASSERT_EQ(::stat((path_ + "/token").c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0600u);
}

TEST_F(SharedDirTest, IsPrivateInAVolumeThatBelongsToAGroup) {
  ASSERT_EQ(::chmod(parent_.c_str(), 02777), 0);
  MustOpen("engine");
  struct stat info = {};
  ASSERT_EQ(::stat(path_.c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 07777, 0700u);
}

TEST_F(SharedDirTest, ARoleHasOneLauncherAndKnowsWhetherTheOtherRuns) {
  const SharedDir engine = MustOpen("engine");
  EXPECT_FALSE(engine.OtherRuns());
  {
    const SharedDir api = MustOpen("api");
    EXPECT_TRUE(engine.OtherRuns());
    EXPECT_TRUE(api.OtherRuns());
    const auto second = SharedDir::Open(path_, "api");
    EXPECT_EQ(second.status().code(), absl::StatusCode::kUnavailable);
    EXPECT_THAT(
        second.status().ToString(),
        HasSubstr("--runtime-dir: " + path_ + ": another launcher with --role api uses it"));
  }
  EXPECT_FALSE(engine.OtherRuns());
  MustOpen("api");
}

TEST_F(SharedDirTest, EachRemovesItsOwnSocketsOnly) {
  const std::string sockets[] = {path_ + "/work_queue.sock", path_ + "/cache.sock",
                                 path_ + "/memory.sock", path_ + "/supervisor.sock"};
  std::optional<SharedDir> engine = MustOpen("engine");
  for (const std::string& socket : sockets) std::ofstream(socket) << "x";
  MustOpen("api");  // and goes
  EXPECT_FALSE(fs::exists(sockets[0]));
  for (int i = 1; i < 4; ++i) EXPECT_TRUE(fs::exists(sockets[i])) << sockets[i];
  engine.reset();
  for (const std::string& socket : sockets) EXPECT_FALSE(fs::exists(socket)) << socket;
}

TEST_F(SharedDirTest, TheTokenOutlivesBoth) {
  const std::string token = *MustOpen("engine").Token(&warning_);
  EXPECT_EQ(*MustOpen("api").Token(&warning_), token);
}

TEST_F(SharedDirTest, SaysWhatIsWrong) {
  fs::create_directory(path_);
  fs::permissions(path_, fs::perms::all);
  EXPECT_THAT(SharedDir::Open(path_, "api").status().ToString(),
              HasSubstr("--runtime-dir: runtime directory: " + path_ + ": has mode 0777"));
  EXPECT_THAT(SharedDir::Open(parent_ + "/no/such", "api").status().ToString(),
              HasSubstr("--runtime-dir: " + parent_ + "/no/such: No such file or directory"));
  EXPECT_THAT(SharedDir::Open("/" + std::string(100, 'x'), "api").status().ToString(),
              HasSubstr("is longer than"));
  fs::permissions(path_, fs::perms::owner_all);
  std::ofstream(path_ + "/token") << "short";
  const SharedDir api = MustOpen("api");
  EXPECT_THAT(api.Token(&warning_).status().ToString(),
              HasSubstr("--runtime-dir: " + path_ + "/token: must hold 64 hexadecimal digits"));
}

}  // namespace
}  // namespace wintserve
