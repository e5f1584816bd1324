// Start, stop, drain and what is wrong before anything runs.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include "launcher/launcher_test_util.h"

namespace wintserve {
namespace {

using namespace testing_launcher;  // NOLINT: a test's own
using ::testing::HasSubstr;
using ::testing::IsEmpty;

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
    // stdin, stdout, stderr, the instance, the signs of its start, two sockets.
    EXPECT_EQ(Reported(child, "fds"), api_server ? "7" : "5");
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

// What is in a process shows in its core file, and in /proc to whatever runs as its user.
TEST_F(LauncherTest, KeysGoToTheApiServerAloneAndSecretsOfTheEnvironmentToNobody) {
  environment_ = {"FD_API_KEY=first-key,second-key", "AWS_SECRET_ACCESS_KEY=of-somebody",
                  "http_proxy=http://me:password@proxy", "CUDA_MODULE_LOADING=EAGER"};
  StartServing();
  ASSERT_TRUE(ChildrenRun(3)) << Stderr();
  EXPECT_EQ(Reported("api-server", "num_keys"), "2");
  EXPECT_EQ(Reported("engine-worker-0", "num_keys"), "0");
  EXPECT_EQ(Reported("cache-manager", "num_keys"), "0");
  for (const char* child : {"api-server", "engine-worker-0", "cache-manager"}) {
    SCOPED_TRACE(child);
    const std::string environment = ReadFile(fmt::format("/proc/{}/environ", PidOf(child)));
    EXPECT_THAT(environment, HasSubstr("CUDA_MODULE_LOADING=EAGER"));
    const std::string command_line = ReadFile(fmt::format("/proc/{}/cmdline", PidOf(child)));
    for (const char* secret :
         {"FD_API_KEY", "first-key", "second-key", "of-somebody", "password"}) {
      EXPECT_EQ(environment.find(secret), std::string::npos) << secret;
      EXPECT_EQ(command_line.find(secret), std::string::npos) << secret;
      EXPECT_EQ(Stderr().find(secret), std::string::npos) << secret;
    }
  }
}

TEST_F(LauncherTest, HidesKeysInItsOwnArgumentsAndEnvironment) {
  environment_ = {"FD_API_KEY=of-the-environment"};
  StartServing({"--api-key", "first-key", "--api-key=second-key"});
  ASSERT_TRUE(ChildrenRun(3)) << Stderr();
  EXPECT_EQ(Reported("api-server", "num_keys"), "2") << "the command line wins";
  std::string command_line = ReadFile(fmt::format("/proc/{}/cmdline", launcher_.pid()));
  std::ranges::replace(command_line, '\0', ' ');
  EXPECT_THAT(command_line, HasSubstr("--api-key ********* --api-key=********** "));
  EXPECT_THAT(command_line, HasSubstr("--model " + Model()));
  EXPECT_THAT(ReadFile(fmt::format("/proc/{}/environ", launcher_.pid())),
              HasSubstr(std::string("FD_API_KEY=******************\0", 30)));
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
  // Less than the patience with those who stop in order.
  EXPECT_LT(std::chrono::steady_clock::now() - before, std::chrono::milliseconds(4500));
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

TEST_F(LauncherTest, AMissingProgramIsNamed) {
  fs::remove(dir_ / "bin" / "wintserve-engine-worker");
  StartServing();
  EXPECT_EQ(ExitCode(), kExitInternal);
  EXPECT_THAT(Stderr(),
              HasSubstr("cannot start " + (dir_ / "bin/wintserve-engine-worker").string()));
  EXPECT_THAT(Stderr(), HasSubstr("No such file or directory"));
  ExpectNothingLeft();
}

// A shell stands in for the program: it shows what it is started with.
TEST_F(LauncherTest, AVerbThatIsAProgramBecomesItWithItsArgumentsAndFreshSignals) {
  fs::copy_file("/bin/sh", dir_ / "bin" / "wintserve-quantize");
  Start({"quantize", "-c", "echo \"<$0>\"; echo $$; grep ^Sig /proc/self/status; exit 7"});
  const pid_t pid = launcher_.pid();
  EXPECT_EQ(ExitCode(), 7) << Stderr();
  EXPECT_THAT(Stdout(), HasSubstr(fmt::format("<wintserve quantize>\n{}\n", pid)));
  // Not what the launcher itself blocks and ignores. Signals 32 and 33 are the C library's own: it
  // lets nobody reset them, and whoever runs the tests may pass them on ignored (0x180000000).
  EXPECT_THAT(Stdout(), testing::ContainsRegex("SigBlk:\t0{16}\nSigIgn:\t(0{16}|0{7}180000000)\n"));
  EXPECT_EQ(Stderr(), "");
}

TEST_F(LauncherTest, AVerbWhoseProgramIsMissingIsOneLine) {
  Start({"inspect", "x"});
  EXPECT_EQ(ExitCode(), kExitInternal);
  EXPECT_EQ(Stderr(), fmt::format("error: cannot start {}: No such file or directory\n",
                                  (dir_ / "bin/wintserve-inspect").string()));
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

TEST_F(LauncherTest, AChildOfGenerateThatLostItsPeerIsNotTheCause) {
  Start({"generate", "--model", Model(), "--prompt", "x"}, {{"engine_worker_0", "exit:0"}});
  ASSERT_TRUE(ChildrenRun(3)) << Stderr();
  ASSERT_TRUE(Eventually([&] { return LivingChildren().size() == 2; }));
  ::kill(PidOf("api-server"), SIGKILL);
  EXPECT_EQ(ExitCode(), kExitInternal);
  EXPECT_THAT(Stderr(), HasSubstr("api server died of signal 9"));
  EXPECT_EQ(NumErrorLines(), 1) << Stderr();
  ExpectNothingLeft();
}

TEST_F(LauncherTest, ADeadChildOfGenerateEndsItWithOneLine) {
  for (const char* behaviour : {"exit:0", "exit:1", "abort"}) {
    SCOPED_TRACE(behaviour);
    Start({"generate", "--model", Model(), "--prompt", "x"}, {{"engine_worker_0", behaviour}});
    EXPECT_EQ(ExitCode(), kExitInternal);
    EXPECT_THAT(Stderr(), HasSubstr("engine worker 0 died of "));
    EXPECT_EQ(NumErrorLines(), 1) << Stderr();
    ExpectNothingLeft();
  }
}

TEST_F(LauncherTest, ManyStartsAndStopsLeaveNothing) {
  const char* set = std::getenv("LAUNCHER_TEST_CYCLES");
  const int num_cycles = set == nullptr ? 20 : std::atoi(set);
  for (int i = 0; i < num_cycles; ++i) {
    SCOPED_TRACE(i);
    StartServing();
    // Also in the middle of the start.
    ASSERT_TRUE(EventuallySays("effective config"));
    if (i % 3 != 0) {
      ASSERT_TRUE(ChildrenRun(3)) << Stderr();
    }
    launcher_.Signal(i % 2 == 0 ? SIGTERM : SIGINT);
    ASSERT_EQ(ExitCode(), kExitOk) << Stderr();
    ExpectNothingLeft();
  }
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

int main(int argc, char** argv) { return wintserve::testing_launcher::RunTests(argc, argv); }
