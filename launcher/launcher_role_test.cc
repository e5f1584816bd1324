// An instance whose processes have two launchers: --role api and --role engine.
#include "launcher/launcher_test_util.h"

namespace wintserve {
namespace {

using namespace testing_launcher;  // NOLINT: a test's own
using ::testing::ElementsAre;
using ::testing::HasSubstr;

class RoleTest : public LauncherTest {
 protected:
  // Leaves it in launcher_; move it away before the next.
  void StartRole(const std::string& role, const std::map<std::string, std::string>& behaviours = {},
                 const std::string& shared = "shared") {
    stderr_ = (dir_ / (role + ".stderr")).string();
    keeps_reports_ = true;
    StartServing({"--role", role, "--runtime-dir", (dir_ / shared).string(), "--orphan-timeout=5"},
                 behaviours);
  }
  void StartBoth(const std::map<std::string, std::string>& behaviours = {}) {
    StartRole("engine", behaviours);
    engine_ = std::move(launcher_);
    StartRole("api", behaviours);
    ASSERT_TRUE(ChildrenRun(3)) << Said("api") << Said("engine");
  }
  std::string Said(const std::string& role) const { return ReadFile(dir_ / (role + ".stderr")); }
  bool EventuallySaid(const std::string& role, const std::string& text) const {
    return Eventually([&] { return Said(role).find(text) != std::string::npos; });
  }
  static int CodeOf(ChildProcess* launcher) {
    const auto ended = launcher->Wait(kTimeoutMs);
    EXPECT_TRUE(ended.has_value() && !ended->by_signal);
    return ended.has_value() ? ended->code : -1;
  }
  std::vector<std::string> SharedFiles() const {
    std::vector<std::string> names;
    for (const auto& entry : fs::directory_iterator(dir_ / "shared")) {
      names.push_back(entry.path().filename());
    }
    std::sort(names.begin(), names.end());
    return names;
  }

  ChildProcess engine_;
};

TEST_F(RoleTest, EachLauncherStartsItsProcessesInTheSameInstance) {
  StartRole("engine");
  ASSERT_TRUE(ChildrenRun(2)) << Said("engine");
  EXPECT_EQ(Reports().count("wintserve-api-server"), 0u);
  engine_ = std::move(launcher_);
  StartRole("api");
  ASSERT_TRUE(ChildrenRun(3)) << Said("api");
  for (const char* key : {"runtime_dir", "token_digits"}) {
    EXPECT_EQ(Reported("api-server", key), Reported("engine-worker-0", key));
    EXPECT_EQ(Reported("api-server", key), Reported("cache-manager", key));
  }
  EXPECT_EQ(Reported("api-server", "runtime_dir"), (dir_ / "shared").string());
  EXPECT_EQ(Reported("api-server", "http"), "true");
  EXPECT_EQ(ReadFile(dir_ / "shared" / "token"), Reported("api-server", "token_digits"));
  // One that dies is its own launcher's to replace.
  EndAndAwaitNext("api-server");
  EndAndAwaitNext("engine-worker-0");
  EndAndAwaitNext("cache-manager");
  EXPECT_THAT(Said("api"), HasSubstr("api server died of signal 9"));
  EXPECT_THAT(Said("engine"), HasSubstr("engine worker 0 died of signal 9"));
  launcher_.Signal(SIGTERM);
  engine_.Signal(SIGTERM);
  EXPECT_EQ(CodeOf(&launcher_), kExitOk) << Said("api");
  EXPECT_EQ(CodeOf(&engine_), kExitOk) << Said("engine");
  EXPECT_THAT(SharedFiles(), ElementsAre("lock.api", "lock.engine", "token"));
}

TEST_F(RoleTest, TheEngineStaysUntilTheApiServerHasDrained) {
  StartBoth({{"api_server", "ignore"}});
  launcher_.Signal(SIGTERM);
  engine_.Signal(SIGTERM);
  ASSERT_TRUE(EventuallySaid("engine", "finishing open requests"));
  // A worker that is killed meanwhile is replaced: requests may need it.
  EndAndAwaitNext("engine-worker-0");
  std::this_thread::sleep_for(std::chrono::milliseconds(500));
  EXPECT_EQ(LivingChildren().size(), 3u) << Said("engine");
  ::kill(PidOf("api-server"), SIGKILL);
  EXPECT_EQ(CodeOf(&launcher_), kExitInternal);
  EXPECT_EQ(CodeOf(&engine_), kExitOk) << Said("engine");
  EXPECT_EQ(LivingChildren().size(), 0u);
}

TEST_F(RoleTest, TheEngineGoesWhenItsWorkersHaveEnded) {
  StartBoth({{"api_server", "ignore"}});
  engine_.Signal(SIGTERM);
  ASSERT_TRUE(EventuallySaid("engine", "finishing open requests"));
  ::kill(PidOf("engine-worker-0"), SIGTERM);  // so it ends in order
  EXPECT_EQ(CodeOf(&engine_), kExitOk) << Said("engine");
}

TEST_F(RoleTest, ASecondSignalStartsNoWorkerThatWasDue) {
  StartBoth({{"api_server", "ignore"}, {"engine_worker_0", "later:abort"}});
  engine_.Signal(SIGTERM);
  ASSERT_TRUE(EventuallySaid("engine", "finishing open requests"));
  ::kill(PidOf("engine-worker-0"), SIGKILL);
  ASSERT_TRUE(EventuallySaid("engine", "starting it again in 2.")) << Said("engine");
  const pid_t last = PidOf("engine-worker-0");
  engine_.Signal(SIGTERM);
  EXPECT_EQ(CodeOf(&engine_), kExitOk) << Said("engine");
  EXPECT_EQ(PidOf("engine-worker-0"), last);
}

TEST_F(RoleTest, AnEngineWithoutAnApiServerStopsAtOnce) {
  StartRole("engine");
  ASSERT_TRUE(ChildrenRun(2)) << Said("engine");
  launcher_.Signal(SIGTERM);
  const auto before = std::chrono::steady_clock::now();
  EXPECT_EQ(CodeOf(&launcher_), kExitOk) << Said("engine");
  EXPECT_LT(std::chrono::steady_clock::now() - before, std::chrono::seconds(20));
}

TEST_F(RoleTest, TwoLaunchersOfARoleAreRefused) {
  StartRole("engine");
  ASSERT_TRUE(ChildrenRun(2)) << Said("engine");
  engine_ = std::move(launcher_);
  stderr_ = (dir_ / "second.stderr").string();
  StartServing({"--role=engine", "--runtime-dir", (dir_ / "shared").string()});
  EXPECT_EQ(ExitCode(), kExitUnavailable);
  EXPECT_EQ(Said("second"), fmt::format("error: --runtime-dir: {}: another launcher with --role "
                                        "engine uses it\n",
                                        (dir_ / "shared").string()));
}

TEST_F(RoleTest, ADirectoryThatOthersCanEnterIsRefused) {
  fs::create_directory(dir_ / "shared");
  fs::permissions(dir_ / "shared", fs::perms::all);
  StartRole("api");
  EXPECT_EQ(ExitCode(), kExitUsage);
  EXPECT_THAT(Said("api"), ::testing::StartsWith("error: --runtime-dir: "));
}

}  // namespace
}  // namespace wintserve

int main(int argc, char** argv) { return wintserve::testing_launcher::RunTests(argc, argv); }
