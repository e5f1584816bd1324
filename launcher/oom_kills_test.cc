#include "launcher/oom_kills.h"

#include <gtest/gtest.h>

#include <string>

#include "common/temp_dir_test_util.h"

namespace wintserve {
namespace {

namespace fs = std::filesystem;

class OomKillsTest : public ::testing::Test {
 protected:
  void Write(const fs::path& path, const std::string& text) const { WriteFile(root_ / path, text); }

  const TempDir temp_dir_;
  const fs::path root_ = temp_dir_.path();
};

TEST_F(OomKillsTest, OfOurOwnGroup) {
  Write("proc/self/cgroup", "0::/pod/main\n");
  Write("proc/vmstat", "oom_kill 100\n");
  Write("sys/fs/cgroup/memory.events", "oom_kill 50\n");
  Write("sys/fs/cgroup/pod/main/memory.events", "low 7\nhigh 8\nmax 9\noom 3\noom_kill 2\n");
  OomKills kills(root_);
  EXPECT_EQ(kills.TakeNew(), 0) << "those before us";
  Write("proc/vmstat", "oom_kill 101\n");
  EXPECT_EQ(kills.TakeNew(), 0) << "of somebody else";
  Write("sys/fs/cgroup/pod/main/memory.events", "low 7\nhigh 8\nmax 9\noom 3\noom_kill 4\n");
  EXPECT_EQ(kills.TakeNew(), 2);
  EXPECT_EQ(kills.TakeNew(), 0) << "told once";
}

TEST_F(OomKillsTest, OfAContainerThatSeesThePathOfTheHost) {
  Write("proc/self/cgroup", "0::/kubepods/burstable/pod1\n");
  Write("sys/fs/cgroup/memory.events", "oom_kill 5\n");
  OomKills kills(root_);
  Write("sys/fs/cgroup/memory.events", "oom_kill 6\n");
  EXPECT_EQ(kills.TakeNew(), 1);
}

TEST_F(OomKillsTest, OfTheFirstVersionOfControlGroups) {
  Write("proc/self/cgroup", "9:cpu,cpuacct:/other\n4:memory:/job\n0::/\n");
  Write("sys/fs/cgroup/memory/job/memory.oom_control", "oom_kill_disable 0\noom_kill 1\n");
  OomKills kills(root_);
  Write("sys/fs/cgroup/memory/job/memory.oom_control", "oom_kill_disable 0\noom_kill 2\n");
  EXPECT_EQ(kills.TakeNew(), 1);
}

TEST_F(OomKillsTest, OfTheMachineWhereAGroupIsNotAccountedFor) {
  Write("proc/self/cgroup", "0::/\n");
  Write("proc/vmstat", "nr_free_pages 10\noom_kill 3\n");
  OomKills kills(root_);
  Write("proc/vmstat", "nr_free_pages 9\noom_kill 4\n");
  EXPECT_EQ(kills.TakeNew(), 1);
}

TEST_F(OomKillsTest, NoneWhereTheKernelDoesNotTell) {
  OomKills kills(root_);
  EXPECT_EQ(kills.TakeNew(), 0);
  Write("proc/self/cgroup", "0::/\n");
  Write("sys/fs/cgroup/memory.events", "oom_kill 5\n");
  EXPECT_EQ(kills.TakeNew(), 0) << "asked once where";
}

}  // namespace
}  // namespace wintserve
