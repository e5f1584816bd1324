#include "launcher/runtime_dir.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "common/captured_log_test_util.h"
#include "common/temp_dir_test_util.h"

namespace wintserve {
namespace {

namespace fs = std::filesystem;

class RuntimeDirTest : public ::testing::Test {
 protected:
  const TempDir temp_dir_;
  const std::string parent_ = temp_dir_.path().string();
};

TEST_F(RuntimeDirTest, IsPrivateAndRemovedWithItsSockets) {
  std::string path;
  {
    const auto dir = RuntimeDir::CreateUnder(parent_);
    ASSERT_TRUE(dir.ok()) << dir.status();
    path = dir->path();
    struct stat info = {};
    ASSERT_EQ(::stat(path.c_str(), &info), 0);
    EXPECT_EQ(info.st_mode & 0777, 0700u);
    std::ofstream(path + "/work_queue.sock") << "x";
  }
  EXPECT_FALSE(fs::exists(path));
}

TEST_F(RuntimeDirTest, APlaceWhereOthersCouldExchangeItIsAWarning) {
  CapturedLog log;
  for (const mode_t mode : {01777, 0755, 0700}) {  // the first is /tmp's
    ASSERT_EQ(::chmod(parent_.c_str(), mode), 0);
    EXPECT_TRUE(RuntimeDir::CreateUnder(parent_).ok());
  }
  EXPECT_EQ(log.text(), "");
  ASSERT_EQ(::chmod(parent_.c_str(), 0777), 0);
  EXPECT_TRUE(RuntimeDir::CreateUnder(parent_).ok());
  EXPECT_THAT(log.text(), ::testing::HasSubstr("runtime directory: " + parent_ +
                                               ": other users could exchange what is in it (mode "
                                               "0777, not sticky)"));
}

TEST_F(RuntimeDirTest, AnotherUsersPlaceIsRefused) {
  if (::geteuid() != 0) GTEST_SKIP() << "only root can give a directory away";
  ASSERT_EQ(::chown(parent_.c_str(), 65534, 0), 0);
  const absl::Status status = RuntimeDir::CreateUnder(parent_).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kPermissionDenied);
  EXPECT_EQ(status.message(),
            "runtime directory: " + parent_ + ": belongs to user 65534, must be ours or root's");
}

TEST_F(RuntimeDirTest, TwoInstancesDoNotMeet) {
  const auto first = RuntimeDir::CreateUnder(parent_);
  const auto second = RuntimeDir::CreateUnder(parent_);
  ASSERT_TRUE(first.ok() && second.ok());
  EXPECT_NE(first->path(), second->path());
  EXPECT_TRUE(fs::exists(first->path() + "/lock")) << "a live directory was swept";
}

TEST_F(RuntimeDirTest, SweepsWhatADeadLauncherLeft) {
  const std::string stale = parent_ + "/wintserve-dead";
  fs::create_directory(stale);
  std::ofstream(stale + "/lock") << "";
  std::ofstream(stale + "/cache.sock") << "";
  const auto dir = RuntimeDir::CreateUnder(parent_);
  ASSERT_TRUE(dir.ok());
  EXPECT_FALSE(fs::exists(stale));
}

TEST_F(RuntimeDirTest, SweepsADirectoryWithoutLockOnlyWhenItIsOld) {
  const std::string young = parent_ + "/wintserve-young";
  const std::string old = parent_ + "/wintserve-old";
  fs::create_directory(young);
  fs::create_directory(old);
  fs::last_write_time(old, fs::file_time_type::clock::now() - std::chrono::minutes(2));
  const auto dir = RuntimeDir::CreateUnder(parent_);
  ASSERT_TRUE(dir.ok());
  EXPECT_TRUE(fs::exists(young));
  EXPECT_FALSE(fs::exists(old));
}

TEST_F(RuntimeDirTest, SweepsNothingElse) {
  const std::string other = parent_ + "/other";
  fs::create_directory(other);
  std::ofstream(other + "/lock") << "";
  const std::string precious = parent_ + "/precious";
  fs::create_directory(precious);
  std::ofstream(precious + "/lock") << "";
  fs::create_symlink(precious, parent_ + "/wintserve-link");
  const auto dir = RuntimeDir::CreateUnder(parent_);
  ASSERT_TRUE(dir.ok());
  EXPECT_TRUE(fs::exists(other + "/lock"));
  EXPECT_TRUE(fs::exists(precious + "/lock")) << "a link was followed";
}

TEST_F(RuntimeDirTest, SaysWhereItCannotBeMade) {
  const auto dir = RuntimeDir::CreateUnder(parent_ + "/missing");
  EXPECT_NE(dir.status().ToString().find("cannot make a directory in " + parent_ + "/missing"),
            std::string::npos);
}

}  // namespace
}  // namespace wintserve
