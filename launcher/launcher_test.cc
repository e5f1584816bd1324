// Runs the real `wintserve` with launcher_test_child in the place of every child.
// Arguments: paths of both.
#include <arpa/inet.h>
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <signal.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <sstream>
#include <thread>

#include "common/child_process.h"
#include "common/exit_code.h"

namespace wintserve {
namespace {

namespace fs = std::filesystem;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

std::string g_wintserve;   // NOLINT: set once, in main
std::string g_test_child;  // NOLINT
constexpr int64_t kTimeoutMs = 20'000;

const char* const kChildren[] = {"wintserve-api-server", "wintserve-cache-manager",
                                 "wintserve-engine-worker"};

std::string ReadFile(const fs::path& path) {
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

bool Eventually(const std::function<bool()>& condition, int64_t timeout_ms = kTimeoutMs) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(timeout_ms);
  while (!condition()) {
    if (std::chrono::steady_clock::now() >= deadline) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  return true;
}

// A directory with the launcher, its stand-in children, a model and their reports; one launcher at
// a time runs from it.
class LauncherTest : public ::testing::Test {
 protected:
  LauncherTest() {
    std::string path = ::testing::TempDir() + "launcher_test.XXXXXX";
    EXPECT_NE(::mkdtemp(path.data()), nullptr);
    dir_ = path;
    for (const char* name : {"bin", "reports", "run", "model"}) fs::create_directory(dir_ / name);
    fs::permissions(dir_ / "run", fs::perms::owner_all);
    std::ofstream(dir_ / "model" / "config.json") << "{}";
    fs::copy_file(g_wintserve, dir_ / "bin" / "wintserve");
    for (const char* name : kChildren) fs::copy_file(g_test_child, dir_ / "bin" / name);
  }
  ~LauncherTest() override {
    launcher_ = ChildProcess();
    fs::remove_all(dir_);
  }

  // behaviours: see launcher_test_child.cc, by "api_server", "cache_manager", "engine_worker_0".
  void Start(std::vector<std::string> args,
             const std::map<std::string, std::string>& behaviours = {}) {
    // The shell sends both streams to files and then becomes the launcher.
    ChildOptions options;
    options.argv = {"/bin/sh", "-c",
                    fmt::format("exec \"$0\" \"$@\" >{0}/stdout 2>{0}/stderr", dir_.string()),
                    (dir_ / "bin" / "wintserve").string()};
    options.argv.insert(options.argv.end(), args.begin(), args.end());
    options.environment = {"XDG_RUNTIME_DIR=" + (dir_ / "run").string(),
                           "LAUNCHER_TEST_DIR=" + (dir_ / "reports").string()};
    for (const auto& [child, behaviour] : behaviours) {
      options.environment.push_back(fmt::format("wintserve_{}_BEHAVIOUR={}", child, behaviour));
    }
    for (const auto& file : fs::directory_iterator(dir_ / "reports")) fs::remove(file);
    auto launcher = ChildProcess::Spawn(options);
    ASSERT_TRUE(launcher.ok()) << launcher.status();
    launcher_ = *std::move(launcher);
  }

  void StartServing(std::vector<std::string> more = {},
                    const std::map<std::string, std::string>& behaviours = {}) {
    std::vector<std::string> args = {
        "serve", "--model", Model(), "--port=0", "--host=127.0.0.1", "--log-level", "debug"};
    args.insert(args.end(), more.begin(), more.end());
    Start(args, behaviours);
  }

  // Waits for the report of every child.
  bool ChildrenRun(size_t count) {
    return Eventually([&] { return Reports().size() == count; });
  }

  std::string Model() const { return (dir_ / "model").string(); }
  std::string Stderr() const { return ReadFile(dir_ / "stderr"); }
  std::string Stdout() const { return ReadFile(dir_ / "stdout"); }

  std::map<std::string, std::string> Reports() const {
    std::map<std::string, std::string> reports;
    for (const auto& file : fs::directory_iterator(dir_ / "reports")) {
      if (file.path().extension() != ".new") {
        reports[file.path().filename()] = ReadFile(file.path());
      }
    }
    return reports;
  }

  // A value in the report of a child.
  std::string Reported(const std::string& child, const std::string& key) const {
    const std::string report = " " + ReadFile(dir_ / "reports" / ("wintserve-" + child));
    const size_t at = report.find(" " + key + "=");
    if (at == std::string::npos) return "";
    const size_t begin = at + key.size() + 2;
    return report.substr(begin, report.find_first_of(" \n", begin) - begin);
  }
  pid_t PidOf(const std::string& child) const { return std::stoi(Reported(child, "pid")); }

  // Waits until the next one runs.
  void KillCacheManager() {
    const pid_t pid = PidOf("cache-manager");
    ::kill(pid, SIGKILL);
    ASSERT_TRUE(Eventually([&] { return PidOf("cache-manager") != pid; })) << Stderr();
  }

  // Ours only: reaped ones of the launcher have no entry in /proc.
  std::vector<std::string> LivingChildren() const {
    std::vector<std::string> living;
    for (const auto& [name, report] : Reports()) {
      const std::string pid = report.substr(4, report.find(' ') - 4);
      std::error_code error;
      const fs::path exe = fs::read_symlink(fmt::format("/proc/{}/exe", pid), error);
      if (!error && exe.parent_path() == dir_ / "bin") living.push_back(name);
    }
    return living;
  }

  std::vector<std::string> RuntimeDirs() const {
    std::vector<std::string> names;
    for (const auto& entry : fs::directory_iterator(dir_ / "run")) {
      names.push_back(entry.path().filename());
    }
    return names;
  }

  int ExitCode() {
    const auto ended = launcher_.Wait(kTimeoutMs);
    if (!ended.has_value()) {
      ADD_FAILURE() << "the launcher still runs";
      return -1;
    }
    EXPECT_FALSE(ended->by_signal) << ended->ToString();
    return ended->code;
  }

  void ExpectNothingLeft() {
    EXPECT_THAT(LivingChildren(), IsEmpty());
    EXPECT_THAT(RuntimeDirs(), IsEmpty());
  }

  int NumErrorLines() const {
    int count = 0;
    std::istringstream lines(Stderr());
    for (std::string line; std::getline(lines, line);) count += line.starts_with("ERROR");
    return count;
  }

  fs::path dir_;
  ChildProcess launcher_;
};

TEST_F(LauncherTest, StartsEveryProcessWithWhatItNeedsAndNothingElse) {
  StartServing({"--metrics-port=0", "-tp", "2"});
  ASSERT_TRUE(ChildrenRun(4)) << Stderr();
  const std::string runtime_dir = Reported("api-server", "runtime_dir");
  for (const char* child : {"api-server", "engine-worker-0", "engine-worker-1"}) {
    SCOPED_TRACE(child);
    EXPECT_EQ(Reported(child, "token"), "32");
    EXPECT_EQ(Reported(child, "runtime_dir"), runtime_dir);
    EXPECT_EQ(Reported(child, "pgid"), Reported(child, "pid"));
    EXPECT_EQ(Reported(child, "tunables"), "glibc.malloc.tcache_count=0");
    const bool api_server = std::string_view(child) == "api-server";
    EXPECT_EQ(Reported(child, "http"), api_server ? "true" : "false");
    EXPECT_EQ(Reported(child, "metrics"), api_server ? "true" : "false");
    // stdin, stdout, stderr, the instance, two sockets.
    EXPECT_EQ(Reported(child, "fds"), api_server ? "6" : "4");
    EXPECT_EQ(ReadFile(fmt::format("/proc/{}/cmdline", PidOf(child))).find("token"),
              std::string::npos);
  }
  EXPECT_EQ(Reported("cache-manager", "tunables"),
            "glibc.malloc.tcache_count=0:glibc.malloc.arena_max=1");
  EXPECT_NE(Reported("api-server", "port"), "0");
  EXPECT_EQ(Reported("api-server", "worker_id"), "0");
  EXPECT_NE(Reported("engine-worker-0", "worker_id"), "0");
  EXPECT_NE(Reported("engine-worker-0", "worker_id"), Reported("engine-worker-1", "worker_id"));
  EXPECT_THAT(Stderr(), HasSubstr("effective config: model=\"" + Model()));
  launcher_.Signal(SIGTERM);
  EXPECT_EQ(ExitCode(), kExitOk);
  ExpectNothingLeft();
}

TEST_F(LauncherTest, EverySignalToStopLeavesNothingAndIsNoError) {
  for (const int number : {SIGINT, SIGTERM, SIGHUP}) {
    SCOPED_TRACE(number);
    StartServing();
    ASSERT_TRUE(ChildrenRun(3)) << Stderr();
    launcher_.Signal(number);
    EXPECT_EQ(ExitCode(), kExitOk);
    EXPECT_EQ(NumErrorLines(), 0) << Stderr();
    ExpectNothingLeft();
  }
}

TEST_F(LauncherTest, DrainsTheApiServerBeforeTheOthersStop) {
  StartServing({}, {{"api_server", "ignore"}});
  ASSERT_TRUE(ChildrenRun(3)) << Stderr();
  launcher_.Signal(SIGTERM);
  ASSERT_TRUE(
      Eventually([&] { return Stderr().find("finishing open requests") != std::string::npos; }));
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  EXPECT_EQ(LivingChildren().size(), 3u) << "somebody stopped while requests are open";
  ::kill(PidOf("api-server"), SIGKILL);
  EXPECT_EQ(ExitCode(), kExitInternal) << "an API server that crashes while draining is no success";
  ExpectNothingLeft();
}

TEST_F(LauncherTest, ASecondSignalStopsAtOnce) {
  StartServing(
      {"--drain-timeout=600"},
      {{"api_server", "ignore"}, {"cache_manager", "ignore"}, {"engine_worker_0", "ignore"}});
  ASSERT_TRUE(ChildrenRun(3)) << Stderr();
  launcher_.Signal(SIGINT);
  ASSERT_TRUE(
      Eventually([&] { return Stderr().find("finishing open requests") != std::string::npos; }));
  launcher_.Signal(SIGINT);
  const auto before = std::chrono::steady_clock::now();
  EXPECT_EQ(ExitCode(), kExitOk);
  EXPECT_LT(std::chrono::steady_clock::now() - before, std::chrono::seconds(2));
  ExpectNothingLeft();
}

TEST_F(LauncherTest, CutStreamsShowInTheExitCode) {
  StartServing({}, {{"api_server", "exit_on_term:75"}});
  ASSERT_TRUE(ChildrenRun(3)) << Stderr();
  launcher_.Signal(SIGTERM);
  EXPECT_EQ(ExitCode(), kExitDrainTimeout);
  ExpectNothingLeft();
}

TEST_F(LauncherTest, AChildThatIgnoresSigtermIsKilledInTheEnd) {
  StartServing({}, {{"cache_manager", "ignore"}});
  ASSERT_TRUE(ChildrenRun(3)) << Stderr();
  launcher_.Signal(SIGTERM);
  EXPECT_EQ(ExitCode(), kExitOk);
  EXPECT_THAT(Stderr(), HasSubstr("cache manager did not stop in time: killed"));
  ExpectNothingLeft();
}

TEST_F(LauncherTest, ADeadChildEndsTheInstanceWithOneLine) {
  for (const char* child : {"api-server", "engine-worker-0", "engine-worker-1"}) {
    SCOPED_TRACE(child);
    StartServing({"-tp=2"});
    ASSERT_TRUE(ChildrenRun(4)) << Stderr();
    ::kill(PidOf(child), SIGKILL);
    EXPECT_EQ(ExitCode(), kExitInternal);
    std::string name = child;
    std::replace(name.begin(), name.end(), '-', ' ');
    EXPECT_THAT(Stderr(), HasSubstr(name + " died of signal 9 (Killed)"));
    EXPECT_EQ(NumErrorLines(), 1) << Stderr();
    ExpectNothingLeft();
  }
}

TEST_F(LauncherTest, TheExitCodeSaysWhatAChildFoundAtStartUp) {
  struct Case {
    const char* behaviour;
    int expected;
    const char* text;
  };
  const Case cases[] = {
      {"exit:66", kExitCheckpoint, "engine worker 0 died of exit code 66, while starting"},
      {"exit:69", kExitUnavailable, "engine worker 0 died of exit code 69, while starting"},
      {"exit:1", kExitInternal, "engine worker 0 died of exit code 1"},
      {"exit:0", kExitInternal, "engine worker 0 died of exit code 0"},
      {"abort", kExitInternal, "engine worker 0 died of signal 6 (Aborted)"},
  };
  for (const Case& c : cases) {
    SCOPED_TRACE(c.behaviour);
    StartServing({}, {{"engine_worker_0", c.behaviour}});
    EXPECT_EQ(ExitCode(), c.expected);
    EXPECT_THAT(Stderr(), HasSubstr(c.text));
    EXPECT_EQ(NumErrorLines(), 1) << Stderr();
    ExpectNothingLeft();
  }
}

TEST_F(LauncherTest, ADeadCacheManagerIsStartedAgainWithTheSameInstance) {
  StartServing();
  ASSERT_TRUE(ChildrenRun(3)) << Stderr();
  const std::string before = Reported("cache-manager", "runtime_dir");
  KillCacheManager();
  EXPECT_EQ(Reported("cache-manager", "runtime_dir"), before);
  EXPECT_EQ(LivingChildren().size(), 3u);
  EXPECT_THAT(Stderr(), HasSubstr("cache manager died of signal 9 (Killed); starting it again"));
  EXPECT_EQ(NumErrorLines(), 0) << Stderr();
  launcher_.Signal(SIGTERM);
  EXPECT_EQ(ExitCode(), kExitOk);
  ExpectNothingLeft();
}

TEST_F(LauncherTest, ACacheManagerThatKeepsDyingIsGivenTimeAndEndsTheInstanceWithOneLine) {
  const auto before = std::chrono::steady_clock::now();
  StartServing({}, {{"cache_manager", "abort"}});
  EXPECT_EQ(ExitCode(), kExitInternal);
  EXPECT_GE(std::chrono::steady_clock::now() - before, std::chrono::milliseconds(7500));
  for (const char* pause :
       {"again\n", "again in 0.5 s\n", "again in 1 s\n", "again in 2 s\n", "again in 4 s\n"}) {
    EXPECT_THAT(Stderr(), HasSubstr(std::string("(Aborted); starting it ") + pause));
  }
  EXPECT_THAT(Stderr(), HasSubstr("cache manager died of signal 6 (Aborted), for the 6th time "
                                  "within 10 minutes; the instance ends"));
  EXPECT_EQ(NumErrorLines(), 1) << Stderr();
  ExpectNothingLeft();
}

TEST_F(LauncherTest, ACacheManagerThatCannotStartEndsTheInstanceWithItsCode) {
  StartServing({}, {{"cache_manager", "exit:69"}});
  EXPECT_EQ(ExitCode(), kExitUnavailable);
  EXPECT_THAT(Stderr(), HasSubstr("cache manager died of exit code 69, while starting"));
  EXPECT_EQ(NumErrorLines(), 1) << Stderr();
  ExpectNothingLeft();
}

TEST_F(LauncherTest, ACacheManagerIsReplacedWhileRequestsAreFinished) {
  StartServing({}, {{"api_server", "ignore"}});
  ASSERT_TRUE(ChildrenRun(3)) << Stderr();
  launcher_.Signal(SIGTERM);
  ASSERT_TRUE(
      Eventually([&] { return Stderr().find("finishing open requests") != std::string::npos; }));
  KillCacheManager();
  launcher_.Signal(SIGTERM);
  EXPECT_EQ(ExitCode(), kExitOk);
  ExpectNothingLeft();
}

TEST_F(LauncherTest, AStopDoesNotWaitForACacheManagerThatIsAboutToBeStarted) {
  StartServing({}, {{"cache_manager", "abort"}});
  ASSERT_TRUE(Eventually([&] { return Stderr().find("again in 4 s") != std::string::npos; }));
  const auto before = std::chrono::steady_clock::now();
  launcher_.Signal(SIGTERM);
  EXPECT_EQ(ExitCode(), kExitOk);
  EXPECT_LT(std::chrono::steady_clock::now() - before, std::chrono::seconds(2));
  EXPECT_EQ(NumErrorLines(), 0) << Stderr();
  ExpectNothingLeft();
}

TEST_F(LauncherTest, ACacheManagerThatCrashesOnceTheApiServerHasEndedIsNoFailure) {
  StartServing({}, {{"engine_worker_0", "ignore"}});
  ASSERT_TRUE(ChildrenRun(3)) << Stderr();
  launcher_.Signal(SIGTERM);
  ASSERT_TRUE(Eventually([&] { return Stderr().find("api server ended") != std::string::npos; }));
  ::kill(PidOf("cache-manager"), SIGKILL);
  EXPECT_EQ(ExitCode(), kExitOk);
  EXPECT_THAT(Stderr(),
              HasSubstr("cache manager died of signal 9 (Killed) after the last request"));
  EXPECT_EQ(NumErrorLines(), 0) << Stderr();
  ExpectNothingLeft();
}

TEST_F(LauncherTest, AHangingCacheManagerIsKilledWhenTheApiServerSaysSoButAFreshOneIsNot) {
  StartServing({}, {{"api_server", "report_hang"}});
  ASSERT_TRUE(ChildrenRun(3)) << Stderr();
  const pid_t first = PidOf("cache-manager");
  // The stand-in says it once it is 4 s old, and again at once.
  ASSERT_TRUE(Eventually([&] { return PidOf("cache-manager") != first; })) << Stderr();
  const pid_t second = PidOf("cache-manager");
  std::this_thread::sleep_for(std::chrono::milliseconds(500));
  EXPECT_EQ(PidOf("cache-manager"), second);
  EXPECT_THAT(Stderr(), HasSubstr("the API server says that the cache manager hangs: killing it"));
  launcher_.Signal(SIGTERM);
  EXPECT_EQ(ExitCode(), kExitOk);
  ExpectNothingLeft();
}

TEST_F(LauncherTest, AMissingProgramIsNamed) {
  fs::remove(dir_ / "bin" / "wintserve-engine-worker");
  StartServing();
  EXPECT_EQ(ExitCode(), kExitInternal);
  EXPECT_THAT(Stderr(),
              HasSubstr("cannot start " + (dir_ / "bin/wintserve-engine-worker").string()));
  EXPECT_THAT(Stderr(), HasSubstr("No such file or directory"));
  ExpectNothingLeft();
}

TEST_F(LauncherTest, KillingTheLauncherKillsTheChildrenAndTheNextStartSweeps) {
  StartServing({}, {{"api_server", "ignore"}, {"cache_manager", "ignore"}});
  ASSERT_TRUE(ChildrenRun(3)) << Stderr();
  const std::vector<std::string> stale = RuntimeDirs();
  ASSERT_EQ(stale.size(), 1u);
  launcher_.Signal(SIGKILL);
  ASSERT_TRUE(launcher_.Wait(kTimeoutMs)->by_signal);
  EXPECT_TRUE(Eventually([&] { return LivingChildren().empty(); }, 2000));
  EXPECT_EQ(RuntimeDirs(), stale);

  StartServing();
  ASSERT_TRUE(ChildrenRun(3)) << Stderr();
  EXPECT_EQ(RuntimeDirs().size(), 1u);
  EXPECT_NE(RuntimeDirs(), stale);
  launcher_.Signal(SIGTERM);
  EXPECT_EQ(ExitCode(), kExitOk);
  ExpectNothingLeft();
}

TEST_F(LauncherTest, WhatIsWrongBeforeTheStartIsOneLineAndNothingStarts) {
  UniqueFd busy(::socket(AF_INET, SOCK_STREAM, 0));
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t length = sizeof(address);
  ASSERT_EQ(::bind(busy.get(), reinterpret_cast<sockaddr*>(&address), length), 0);
  ASSERT_EQ(::listen(busy.get(), 1), 0);
  ::getsockname(busy.get(), reinterpret_cast<sockaddr*>(&address), &length);
  const int port = ntohs(address.sin_port);
  std::ofstream(dir_ / "bad.yaml") << "prot: 1\n";

  struct Case {
    std::vector<std::string> args;
    int exit_code;
    std::string expected;
  };
  const Case cases[] = {
      {{fmt::format("--metrics-port={}", port)},
       kExitUnavailable,
       fmt::format("error: --metrics-port: {} is already in use\n", port)},
      {{fmt::format("--cache-queue-port={}", port)},
       kExitUnavailable,
       fmt::format("error: --cache-queue-port: {} is already in use\n", port)},
      {{"--port=99999999"}, kExitUsage, "error: --port: must be 0..65535 (got 99999999)\n"},
      {{"--config", (dir_ / "bad.yaml").string()},
       kExitConfigFile,
       fmt::format("error: {}:1: prot: unknown key (did you mean port?)\n",
                   (dir_ / "bad.yaml").string())},
      {{"--model=no/such"},
       kExitCheckpoint,
       "error: --model: no/such: no such directory; downloading from a hub is not in this "
       "version\n"},
      {{"--device=cuda"},
       kExitUnavailable,
       "error: --device: cuda is not in this build; use cpu\n"},
  };
  for (const Case& c : cases) {
    SCOPED_TRACE(c.expected);
    StartServing(c.args);
    EXPECT_EQ(ExitCode(), c.exit_code);
    EXPECT_EQ(Stderr(), c.expected);
    EXPECT_THAT(Reports(), IsEmpty());
    ExpectNothingLeft();
  }
}

TEST_F(LauncherTest, FlagsWithoutEffectAreWarnedAbout) {
  StartServing({"--workers=4", "--use-cudagraph"});
  ASSERT_TRUE(ChildrenRun(3)) << Stderr();
  EXPECT_THAT(Stderr(), HasSubstr("--workers: one API server process serves every connection"));
  EXPECT_THAT(Stderr(), HasSubstr("--use-cudagraph: there are no CUDA graphs on --device cpu"));
}

TEST_F(LauncherTest, GenerateEndsWithItsApiServer) {
  struct Case {
    const char* behaviour;
    int expected;
  };
  for (const Case& c : {Case{"exit:0", kExitOk}, Case{"exit:66", kExitCheckpoint},
                        Case{"exit:64", kExitUsage}, Case{"abort", kExitInternal}}) {
    SCOPED_TRACE(c.behaviour);
    Start({"generate", "--model", Model(), "--prompt", "x"}, {{"api_server", c.behaviour}});
    EXPECT_EQ(ExitCode(), c.expected) << Stderr();
    EXPECT_EQ(Reported("api-server", "mode"), "generate");
    EXPECT_EQ(Reported("api-server", "http"), "false");
    EXPECT_THAT(Reported("api-server", "json"), HasSubstr("\"prompt\":\"x\""));
    if (c.expected == kExitOk) {
      EXPECT_EQ(Stderr(), "");
    }
    ExpectNothingLeft();
  }
}

TEST_F(LauncherTest, ChildrenMayGoBeforeTheApiServerThatHasGenerated) {
  Start({"generate", "--model", Model(), "--prompt", "x"},
        {{"api_server", "exit_after:500"}, {"engine_worker_0", "exit:0"}});
  EXPECT_EQ(ExitCode(), kExitOk) << Stderr();
  EXPECT_EQ(Stderr(), "");
  ExpectNothingLeft();
}

TEST_F(LauncherTest, AChildThatLostItsPeerIsNotTheCause) {
  StartServing({}, {{"engine_worker_0", "exit:0"}});
  ASSERT_TRUE(ChildrenRun(3)) << Stderr();
  ASSERT_TRUE(Eventually([&] { return LivingChildren().size() == 2; }));
  ::kill(PidOf("api-server"), SIGKILL);
  EXPECT_EQ(ExitCode(), kExitInternal);
  EXPECT_THAT(Stderr(), HasSubstr("api server died of signal 9"));
  EXPECT_EQ(NumErrorLines(), 1) << Stderr();
  ExpectNothingLeft();
}

TEST_F(LauncherTest, PrintsHelpAndVersion) {
  Start({"serve", "--help"});
  EXPECT_EQ(ExitCode(), kExitOk);
  EXPECT_THAT(Stdout(), HasSubstr("--max-model-len"));
  Start({"--version"});
  EXPECT_EQ(ExitCode(), kExitOk);
  EXPECT_THAT(Stdout(), ::testing::StartsWith("wintserve "));
  Start({});
  EXPECT_EQ(ExitCode(), kExitUsage);
  EXPECT_THAT(Stdout(), HasSubstr("wintserve serve"));
}

}  // namespace
}  // namespace wintserve

int main(int argc, char** argv) {
  ::testing::InitGoogleTest(&argc, argv);
  if (argc != 3) {
    fmt::print(stderr, "usage: launcher_test PATH_OF_WINTSERVE PATH_OF_LAUNCHER_TEST_CHILD\n");
    return 1;
  }
  wintserve::g_wintserve = argv[1];
  wintserve::g_test_child = argv[2];
  return RUN_ALL_TESTS();
}
