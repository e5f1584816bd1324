// What the processes of an instance write, and where it goes.
#include <fcntl.h>
#include <sys/stat.h>

#include "launcher/launcher_test_util.h"

namespace wintserve {
namespace {

using namespace testing_launcher;  // NOLINT: a test's own
using ::testing::HasSubstr;
using ::testing::Not;

class LogTest : public LauncherTest {
 protected:
  std::string LogDir() const { return (dir_ / "log").string(); }
  std::string Log(const std::string& name) const { return ReadFile(dir_ / "log" / name); }

  // Whether everything that a "talk" says is in its file.
  bool HasTalked(const std::string& name) {
    return Eventually([&] { return Log(name).ends_with(fmt::format("{:099}\n", 19'999)); });
  }

  void StopInTime() {
    launcher_.Signal(SIGTERM);
    const auto before = std::chrono::steady_clock::now();
    EXPECT_EQ(ExitCode(), kExitOk);
    EXPECT_LT(std::chrono::steady_clock::now() - before, std::chrono::seconds(20));
    EXPECT_THAT(LivingChildren(), ::testing::IsEmpty());
  }
};

TEST_F(LogTest, EveryProcessHasAFileAndItsNameBeforeItsLinesOnTheConsole) {
  StartServing({"-tp=2", "--log-dir", LogDir()},
               {{"api_server", "talk:run"}, {"engine_worker_1", "later:abort"}});
  ASSERT_TRUE(ChildrenRun(4)) << Stderr();
  EXPECT_TRUE(HasTalked("api_server.log"));
  EndAndAwaitNext("engine-worker-1");
  ASSERT_TRUE(EventuallySays("engine worker 1 died of signal 6"));
  StopInTime();
  EXPECT_THAT(Stderr(), HasSubstr(fmt::format("\n[api_server] {:099}\n", 1)));
  EXPECT_EQ(Log("api_server.log").size(), 20'000u * 100);
  // The last words come before what is said of the death.
  const std::string console = Stderr();
  EXPECT_LT(console.find("\n[engine_worker.1] last words\n"),
            console.find("engine worker 1 died of signal 6"));
  EXPECT_THAT(Log("workerlog.1"), ::testing::StartsWith("last words\n"));
  EXPECT_EQ(Log("workerlog.0"), "");
  EXPECT_EQ(Log("cache_manager.log"), "");
  EXPECT_THAT(Log("launcher.log"), HasSubstr("effective config: model="));
  EXPECT_THAT(Log("launcher.log"), HasSubstr("engine worker 1 died of signal 6"));
  EXPECT_THAT(Log("launcher.log"), Not(HasSubstr("last words")));
  struct stat info = {};
  ASSERT_EQ(::stat(LogDir().c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0700u);
}

TEST_F(LogTest, AConsoleThatNobodyReadsHoldsNobodyUp) {
  const std::string fifo = (dir_ / "fifo").string();
  ASSERT_EQ(::mkfifo(fifo.c_str(), 0600), 0);
  const UniqueFd console(::open(fifo.c_str(), O_RDWR | O_CLOEXEC));
  stderr_ = fifo;
  StartServing({"--log-dir", LogDir()}, {{"api_server", "talk:run"}});
  ASSERT_TRUE(ChildrenRun(3));
  EXPECT_TRUE(HasTalked("api_server.log"));
  EndAndAwaitNext("engine-worker-0");
  StopInTime();
}

TEST_F(LogTest, AClosedConsoleEndsNobody) {
  for (const char* closed : {"&-", "broken"}) {
    SCOPED_TRACE(closed);
    UniqueFd reader;
    stderr_ = closed;
    if (stderr_ == "broken") {
      stderr_ = (dir_ / "fifo").string();
      ASSERT_EQ(::mkfifo(stderr_.c_str(), 0600), 0);
      reader.Reset(::open(stderr_.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC));
    }
    StartServing({"--log-dir", LogDir()}, {{"api_server", "talk:run"}});
    if (reader.valid()) {
      ASSERT_TRUE(Eventually([&] { return !Reports().empty(); }));
      reader.Reset();
    }
    ASSERT_TRUE(ChildrenRun(3));
    EXPECT_TRUE(HasTalked("api_server.log"));
    EndAndAwaitNext("engine-worker-0");
    StopInTime();
    fs::remove_all(LogDir());
  }
}

TEST_F(LogTest, AFullDiskEndsNobody) {
  before_exec_ = "ulimit -f 64;";  // in half KiB: it holds for the console's file, too
  StartServing({"--log-dir", LogDir()}, {{"api_server", "talk:run"}});
  ASSERT_TRUE(ChildrenRun(3));
  ASSERT_TRUE(Eventually([&] { return Log("api_server.log").size() == 64 * 512; }));
  EndAndAwaitNext("engine-worker-0");
  EndAndAwaitNext("api-server");
  StopInTime();
  EXPECT_EQ(Log("api_server.log").size(), 64u * 512);
}

TEST_F(LogTest, ADirectoryThatCannotBeIsOneLineAndNothingStarts) {
  std::ofstream(dir_ / "log") << "a file";
  StartServing({"--log-dir", LogDir()});
  EXPECT_EQ(ExitCode(), kExitUsage);
  EXPECT_EQ(Stderr(), fmt::format("error: --log-dir: {}: is not a directory\n", LogDir()));
  ExpectNothingLeft();
}

}  // namespace
}  // namespace wintserve

int main(int argc, char** argv) { return wintserve::testing_launcher::RunTests(argc, argv); }
