// Deaths of every kind of child: who is started again, when, and who is told.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/resource.h>
#include <sys/socket.h>

#include <optional>

#include "common/unix_socket.h"
#include "launcher/launcher_test_util.h"
#include "proto/supervisor.pb.h"

namespace wintserve {
namespace {

using namespace testing_launcher;  // NOLINT: a test's own
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;

class RestartTest : public LauncherTest {
 protected:
  static std::string NameOf(std::string child) {
    std::replace(child.begin(), child.end(), '-', ' ');
    return child;
  }

  proto::SupervisorRequest Request() const {
    const std::string digits = Reported("api-server", "token_digits");
    std::string token;
    for (size_t i = 0; i < digits.size(); i += 2) {
      token += static_cast<char>(std::stoi(digits.substr(i, 2), nullptr, 16));
    }
    proto::SupervisorRequest request;
    request.set_token(token);
    return request;
  }
  // A connection on which the launcher has answered `request`.
  UniqueFd Ask(const proto::SupervisorRequest& request) const {
    auto fd = ConnectUnix(Reported("api-server", "runtime_dir") + "/supervisor.sock", kTimeoutMs);
    if (!fd.ok()) {
      ADD_FAILURE() << fd.status();
      return UniqueFd();
    }
    EXPECT_TRUE(SendPacket(fd->get(), request.SerializeAsString()).ok());
    const auto packet = ReceivePacket(fd->get(), kTimeoutMs);
    proto::SupervisorReply reply;
    EXPECT_TRUE(packet.ok() && reply.ParseFromString(packet->bytes)) << packet.status();
    EXPECT_EQ(reply.status_code(), 0u) << reply.text();
    return *std::move(fd);
  }
  UniqueFd Watch() const {
    proto::SupervisorRequest request = Request();
    request.mutable_watch_workers();
    return Ask(request);
  }
  void AskForEnd(int rank, uint64_t worker_id, bool at_fault = false) const {
    proto::SupervisorRequest request = Request();
    request.mutable_end_worker()->set_rank(rank);
    request.mutable_end_worker()->set_worker_id(worker_id);
    request.mutable_end_worker()->set_at_fault(at_fault);
    Ask(request);
  }
  static std::optional<proto::WorkerExit> NextExit(const UniqueFd& watcher,
                                                   int64_t timeout_ms = kTimeoutMs) {
    const auto packet = ReceivePacket(watcher.get(), timeout_ms);
    proto::WorkerExit worker_exit;
    if (!packet.ok() || !worker_exit.ParseFromString(packet->bytes)) return std::nullopt;
    return worker_exit;
  }
  uint64_t WorkerIdOf(int rank) const {
    return std::stoull(Reported(fmt::format("engine-worker-{}", rank), "worker_id"));
  }

  // Time on a processor, since its start.
  double LauncherSeconds() const {
    std::istringstream stat(ReadFile(fmt::format("/proc/{}/stat", launcher_.pid())));
    std::string field;
    for (int i = 1; i < 14; ++i) stat >> field;
    double user = 0;
    double system = 0;
    stat >> user >> system;
    return (user + system) / static_cast<double>(::sysconf(_SC_CLK_TCK));
  }
  void LimitDescriptorsOfLauncher(rlim_t limit) const {
    rlimit limits = {};
    ASSERT_EQ(::prlimit(launcher_.pid(), RLIMIT_NOFILE, nullptr, &limits), 0);
    limits.rlim_cur = limit;
    ASSERT_EQ(::prlimit(launcher_.pid(), RLIMIT_NOFILE, &limits, nullptr), 0);
  }

  rlim_t LowestFreeDescriptorOfLauncher() const {
    rlim_t fd = 0;
    while (fs::exists(fs::symlink_status(fmt::format("/proc/{}/fd/{}", launcher_.pid(), fd)))) ++fd;
    return fd;
  }
  // Once every child has started: until then the launcher has a descriptor more for it.
  size_t NumDescriptorsOfLauncher() const {
    size_t num_fds = 0;
    EXPECT_TRUE(Eventually([&] {
      num_fds = 0;
      bool all_have_started = true;
      const auto fds = fs::directory_iterator(fmt::format("/proc/{}/fd", launcher_.pid()));
      for (const fs::directory_entry& fd : fds) {
        ++num_fds;
        std::error_code gone;
        all_have_started &= fs::read_symlink(fd.path(), gone) != "anon_inode:[eventfd]";
      }
      return all_have_started;
    }));
    return num_fds;
  }
};

TEST_F(RestartTest, WhoeverDiesIsStartedAgainAndTheOthersStay) {
  StartServing({"-tp=2"});
  ASSERT_TRUE(ChildrenRun(4)) << Stderr();
  const size_t num_descriptors = NumDescriptorsOfLauncher();
  for (const std::string child :
       {"api-server", "engine-worker-0", "engine-worker-1", "cache-manager"}) {
    SCOPED_TRACE(child);
    std::map<std::string, std::string> before = Reports();
    EndAndAwaitNext(child);
    std::map<std::string, std::string> after = Reports();
    for (const char* same : {"runtime_dir", "token_digits", "port", "http"}) {
      EXPECT_NE(after["wintserve-" + child].find(fmt::format(" {}=", same)), std::string::npos);
    }
    EXPECT_EQ(Reported(child, "http"), child == "api-server" ? "true" : "false");
    EXPECT_NE(before["wintserve-" + child], after["wintserve-" + child]);
    before.erase("wintserve-" + child);
    after.erase("wintserve-" + child);
    EXPECT_EQ(before, after);
    EXPECT_EQ(LivingChildren().size(), 4u);
    EXPECT_THAT(Stderr(),
                HasSubstr(NameOf(child) + " died of signal 9 (Killed); starting it again\n"));
  }
  EXPECT_EQ(NumErrorLines(), 0) << Stderr();
  EXPECT_EQ(NumDescriptorsOfLauncher(), num_descriptors);
  launcher_.Signal(SIGTERM);
  EXPECT_EQ(ExitCode(), kExitOk);
  ExpectNothingLeft();
}

TEST_F(RestartTest, EveryProcessOfARankHasAWorkerIdOfItsOwn) {
  StartServing({"-tp=2"});
  ASSERT_TRUE(ChildrenRun(4)) << Stderr();
  const uint64_t first = WorkerIdOf(1);
  EndAndAwaitNext("engine-worker-1");
  EXPECT_NE(WorkerIdOf(1), first);
  EXPECT_NE(WorkerIdOf(1), WorkerIdOf(0));
}

TEST_F(RestartTest, WhatAChildFindsAtItsFirstStartEndsTheInstanceWithItsCode) {
  struct Case {
    const char* child;
    const char* behaviour;
    int expected;
    const char* text;
  };
  const Case cases[] = {
      {"engine_worker_0", "exit:66", kExitCheckpoint,
       "engine worker 0 died of exit code 66, while"},
      {"engine_worker_0", "exit:69", kExitUnavailable,
       "engine worker 0 died of exit code 69, while"},
      {"api_server", "exit:66", kExitCheckpoint, "api server died of exit code 66, while"},
      {"api_server", "exit:76", kExitInternal, "api server died of exit code 76"},
  };
  for (const Case& c : cases) {
    SCOPED_TRACE(c.behaviour);
    StartServing({}, {{c.child, c.behaviour}});
    EXPECT_EQ(ExitCode(), c.expected);
    EXPECT_THAT(Stderr(), HasSubstr(c.text));
    EXPECT_EQ(NumErrorLines(), 1) << Stderr();
    ExpectNothingLeft();
  }
}

TEST_F(RestartTest, WhatAChildFindsAtARestartMayPass) {
  for (const char* child : {"api-server", "engine-worker-0", "cache-manager"}) {
    SCOPED_TRACE(child);
    std::string variable = child;
    std::replace(variable.begin(), variable.end(), '-', '_');
    StartServing({}, {{variable, "later:exit:66"}});
    ASSERT_TRUE(ChildrenRun(3)) << Stderr();
    EndAndAwaitNext(child);
    EXPECT_TRUE(EventuallySays(NameOf(child) + " died of exit code 66; starting it again in 1."))
        << Stderr();
    launcher_.Signal(SIGTERM);
    EXPECT_EQ(ExitCode(), kExitOk) << Stderr();
    ExpectNothingLeft();
  }
}

TEST_F(RestartTest, AChildThatKeepsCrashingIsGivenTimeAndEndsTheInstanceWith71AndOneLine) {
  const auto before = std::chrono::steady_clock::now();
  StartServing({}, {{"engine_worker_0", "abort"}});
  EXPECT_EQ(ExitCode(), kExitCrashLoop);
  EXPECT_GE(std::chrono::steady_clock::now() - before, std::chrono::milliseconds(7500));
  // Up to a quarter longer by chance: 0.5 to 0.6, 1.0 to 1.2 (1.3), and so on.
  for (const char* pause : {"again\n", "again in 0.", "again in 1.", "again in 2.", "again in "}) {
    EXPECT_THAT(
        Stderr(),
        HasSubstr(std::string("engine worker 0 died of signal 6 (Aborted); starting it ") + pause));
  }
  EXPECT_THAT(Stderr(),
              HasSubstr("engine worker 0 died of signal 6 (Aborted), the 6th fault of its "
                        "own within 10 minutes: a crash loop; the instance ends"));
  EXPECT_EQ(NumErrorLines(), 1) << Stderr();
  ExpectNothingLeft();
}

TEST_F(RestartTest, KillsFromOutsideAreNoCrashLoopAndKeepNobodyAway) {
  StartServing();
  ASSERT_TRUE(ChildrenRun(3)) << Stderr();
  const int signals[] = {SIGKILL, SIGTERM, SIGINT, SIGKILL, SIGKILL, SIGKILL, SIGKILL, SIGKILL};
  for (const int number : signals) EndAndAwaitNext("engine-worker-0", number);
  const std::string text = Stderr();
  // At once, 0.5 s, then 1 s, each up to a quarter longer by chance.
  EXPECT_THAT(text, HasSubstr("starting it again\n"));
  for (const char* longer : {"again in 1.3", "again in 2", "again in 4", "again in 8"}) {
    EXPECT_THAT(text, Not(HasSubstr(longer)));
  }
  EXPECT_EQ(NumErrorLines(), 0) << text;
  launcher_.Signal(SIGTERM);
  EXPECT_EQ(ExitCode(), kExitOk);
  ExpectNothingLeft();
}

TEST_F(RestartTest, WatchersHearOfEveryEndOfAWorkerFromThenOn) {
  StartServing({"-tp=2"});
  ASSERT_TRUE(ChildrenRun(4)) << Stderr();
  EndAndAwaitNext("engine-worker-0");  // before anybody watched
  const UniqueFd watcher = Watch();
  struct Case {
    int signal;
    bool kv_trusted;
  };
  for (const Case& c : {Case{SIGKILL, true}, Case{SIGSEGV, false}}) {
    SCOPED_TRACE(c.signal);
    const pid_t pid = PidOf("engine-worker-1");
    const uint64_t worker_id = WorkerIdOf(1);
    ::kill(pid, c.signal);
    const auto worker_exit = NextExit(watcher);
    ASSERT_TRUE(worker_exit.has_value()) << Stderr();
    EXPECT_EQ(::kill(pid, 0), -1) << "it has not been reaped";
    EXPECT_EQ(worker_exit->rank(), 1u);
    EXPECT_EQ(worker_exit->worker_id(), worker_id);
    EXPECT_EQ(worker_exit->signal(), c.signal);
    EXPECT_EQ(worker_exit->code(), 0);
    EXPECT_EQ(worker_exit->kv_trusted(), c.kv_trusted);
    ASSERT_TRUE(Eventually([&] { return PidOf("engine-worker-1") != pid; })) << Stderr();
  }
  EndAndAwaitNext("cache-manager");
  EndAndAwaitNext("api-server");
  EXPECT_FALSE(NextExit(watcher, 100).has_value()) << "they are no engine workers";
}

TEST_F(RestartTest, WatchersHearOfExitCodes) {
  StartServing({}, {{"engine_worker_0", "exit_on_term:70"}});
  ASSERT_TRUE(ChildrenRun(3)) << Stderr();
  const UniqueFd watcher = Watch();
  ::kill(PidOf("engine-worker-0"), SIGTERM);
  const auto worker_exit = NextExit(watcher);
  ASSERT_TRUE(worker_exit.has_value()) << Stderr();
  EXPECT_EQ(worker_exit->signal(), 0);
  EXPECT_EQ(worker_exit->code(), 70);
  EXPECT_FALSE(worker_exit->kv_trusted());
}

TEST_F(RestartTest, AWorkerThatHasToGoIsKilledButNotTheOneThatHasTakenItsPlace) {
  StartServing({"-tp=2"}, {{"engine_worker_1", "ignore"}});
  ASSERT_TRUE(ChildrenRun(4)) << Stderr();
  const UniqueFd watcher = Watch();
  const uint64_t first = WorkerIdOf(1);
  AskForEnd(0, first);  // is rank 1's
  AskForEnd(7, first);
  AskForEnd(1, first);
  const auto worker_exit = NextExit(watcher);
  ASSERT_TRUE(worker_exit.has_value()) << Stderr();
  EXPECT_EQ(worker_exit->rank(), 1u);
  EXPECT_EQ(worker_exit->worker_id(), first);
  EXPECT_EQ(worker_exit->signal(), SIGKILL);
  EXPECT_TRUE(worker_exit->kv_trusted());
  ASSERT_TRUE(Eventually([&] { return WorkerIdOf(1) != first; })) << Stderr();
  EXPECT_EQ(Reported("engine-worker-0", "restarted"), "false");
  EXPECT_EQ(Reported("engine-worker-1", "restarted"), "true");
  AskForEnd(1, first);
  EXPECT_FALSE(NextExit(watcher, 200).has_value());
  EXPECT_THAT(Stderr(), HasSubstr("the API server wants engine worker 1 to go: killing it"));
  EXPECT_EQ(LivingChildren().size(), 4u);
}

// A kill, and yet a fault of its own: ranks that disagree again and again are no reason to go on
// for ever.
TEST_F(RestartTest, WorkersThatAreEndedBecauseTheyComputeWronglyAreACrashLoopInTheEnd) {
  StartServing();
  ASSERT_TRUE(ChildrenRun(3)) << Stderr();
  const UniqueFd watcher = Watch();
  for (int i = 0; i < 6; ++i) {
    SCOPED_TRACE(i);
    const uint64_t worker_id = WorkerIdOf(0);
    AskForEnd(0, worker_id, /*at_fault=*/true);
    const auto worker_exit = NextExit(watcher);
    ASSERT_TRUE(worker_exit.has_value()) << Stderr();
    EXPECT_EQ(worker_exit->signal(), SIGKILL);
    EXPECT_FALSE(worker_exit->kv_trusted());
    if (i == 5) break;
    // The last pause is one of 4 s, up to a quarter longer.
    ASSERT_TRUE(Eventually([&] { return WorkerIdOf(0) != worker_id; })) << Stderr();
  }
  EXPECT_EQ(ExitCode(), kExitCrashLoop);
  EXPECT_THAT(Stderr(), HasSubstr("the 6th fault of its own within 10 minutes"));
  EXPECT_THAT(
      Stderr(),
      HasSubstr("wants engine worker 0 to go, which hangs or computes wrongly: killing it"));
  ExpectNothingLeft();
}

// What was said of one process is not said of the next.
TEST_F(RestartTest, AWorkerInPlaceOfOneThatComputedWronglyIsTrusted) {
  StartServing();
  ASSERT_TRUE(ChildrenRun(3)) << Stderr();
  const UniqueFd watcher = Watch();
  const uint64_t first = WorkerIdOf(0);
  AskForEnd(0, first, /*at_fault=*/true);
  ASSERT_TRUE(NextExit(watcher).has_value());
  ASSERT_TRUE(Eventually([&] { return WorkerIdOf(0) != first; })) << Stderr();
  ::kill(PidOf("engine-worker-0"), SIGKILL);
  const auto worker_exit = NextExit(watcher);
  ASSERT_TRUE(worker_exit.has_value());
  EXPECT_TRUE(worker_exit->kv_trusted());
}

TEST_F(RestartTest, ALauncherWithoutDescriptorsForAPeerRestsAndAnswersItLater) {
  StartServing();
  ASSERT_TRUE(ChildrenRun(3)) << Stderr();
  const std::string path = Reported("api-server", "runtime_dir") + "/supervisor.sock";
  NumDescriptorsOfLauncher();  // none is closed from here on
  LimitDescriptorsOfLauncher(LowestFreeDescriptorOfLauncher());
  auto peer = ConnectUnix(path, kTimeoutMs);
  ASSERT_TRUE(peer.ok()) << peer.status();
  ASSERT_TRUE(EventuallySays("supervisor.sock: cannot accept a connection")) << Stderr();
  const double before = LauncherSeconds();
  std::this_thread::sleep_for(std::chrono::seconds(2));
  // Twenty tries; a loop without a pause takes the whole two seconds.
  EXPECT_LT(LauncherSeconds() - before, 0.5);
  LimitDescriptorsOfLauncher(100);
  ASSERT_TRUE(SendPacket(peer->get(), Request().SerializeAsString()).ok());
  EXPECT_TRUE(ReceivePacket(peer->get(), kTimeoutMs).ok());
  EXPECT_TRUE(EventuallySays("supervisor.sock: accepts connections again")) << Stderr();
}

TEST_F(RestartTest, WhoeverIsFrozenWhileItStartsIsReplacedAndWhoeverIsOnlySlowIsNot) {
  StartServing({"-tp=2", "--stall-timeout=1"}, {{"engine_worker_0", "first:freeze"},
                                                {"engine_worker_1", "slow:7000"},
                                                {"cache_manager", "first:freeze"},
                                                {"api_server", "first:freeze"}});
  ASSERT_TRUE(ChildrenRun(4)) << Stderr();
  const UniqueFd watcher = Watch();
  const std::map<std::string, std::string> before = Reports();
  const auto worker_exit = NextExit(watcher);
  ASSERT_TRUE(worker_exit.has_value()) << Stderr();
  EXPECT_EQ(worker_exit->rank(), 0u);
  EXPECT_TRUE(worker_exit->kv_trusted()) << "it has not got as far as to write any";
  for (const char* child : {"engine-worker-0", "cache-manager", "api-server"}) {
    const std::string name = fmt::format("wintserve-{}", child);
    EXPECT_TRUE(Eventually([&] { return Reports()[name] != before.at(name); })) << child;
  }
  const std::string how = " hangs: no sign of life for 5 s while it starts, and it has yet to ";
  EXPECT_TRUE(EventuallySays("engine worker 0" + how + "load its weights and attach to the API"));
  EXPECT_TRUE(EventuallySays("cache manager" + how + "listen for the API server; killing it"));
  EXPECT_TRUE(EventuallySays("api server" + how + "listen for engine workers and clients"));
  ASSERT_TRUE(Eventually([&] { return HasStarted("engine-worker-1"); }));
  EXPECT_EQ(Reports()["wintserve-engine-worker-1"], before.at("wintserve-engine-worker-1"));
  EXPECT_EQ(LivingChildren().size(), 4u);
  // Those that have started may be frozen: others judge them.
  ::kill(PidOf("engine-worker-1"), SIGSTOP);
  std::this_thread::sleep_for(std::chrono::seconds(6));
  EXPECT_EQ(Reports()["wintserve-engine-worker-1"], before.at("wintserve-engine-worker-1"));
  EXPECT_EQ(NumErrorLines(), 0) << Stderr();
}

TEST_F(RestartTest, ToFreezeAtItsStartIsAFaultOfAProcesssOwn) {
  StartServing({"--stall-timeout=1"}, {{"engine_worker_0", "freeze"}});
  ASSERT_TRUE(ChildrenRun(3)) << Stderr();
  EXPECT_TRUE(EventuallySays("engine worker 0 died of signal 9 (Killed); starting it again\n"));
  EXPECT_TRUE(EventuallySays("engine worker 0 died of signal 9 (Killed); starting it again in 0."));
  EXPECT_TRUE(EventuallySays("engine worker 0 died of signal 9 (Killed); starting it again in 1."));
  // Who is killed from outside would be awaited for 1 s at most: this is a fault of its own.
  EXPECT_TRUE(EventuallySays("engine worker 0 died of signal 9 (Killed); starting it again in 2."));
}

TEST_F(RestartTest, ClientsCanConnectWhileThereIsNoApiServer) {
  StartServing({}, {{"api_server", "later:abort"}});
  ASSERT_TRUE(ChildrenRun(3)) << Stderr();
  EndAndAwaitNext("api-server");
  ASSERT_TRUE(EventuallySays("api server died of signal 6 (Aborted); starting it again in 1."))
      << Stderr();
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.sin_port = htons(static_cast<uint16_t>(std::stoi(Reported("api-server", "port"))));
  const UniqueFd client(::socket(AF_INET, SOCK_STREAM, 0));
  EXPECT_EQ(::connect(client.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
}

TEST_F(RestartTest, AProgramThatIsMissingAtARestartMayComeBack) {
  StartServing();
  ASSERT_TRUE(ChildrenRun(3)) << Stderr();
  const pid_t pid = PidOf("engine-worker-0");
  fs::rename(dir_ / "bin" / "wintserve-engine-worker", dir_ / "bin" / "moved");
  ::kill(pid, SIGKILL);
  ASSERT_TRUE(EventuallySays("engine worker 0 could not be started: ")) << Stderr();
  fs::rename(dir_ / "bin" / "moved", dir_ / "bin" / "wintserve-engine-worker");
  EXPECT_TRUE(Eventually([&] { return PidOf("engine-worker-0") != pid; })) << Stderr();
  EXPECT_EQ(NumErrorLines(), 0) << Stderr();
}

TEST_F(RestartTest, ACacheManagerThatCannotStartEndsTheInstanceWithItsCode) {
  StartServing({}, {{"cache_manager", "exit:69"}});
  EXPECT_EQ(ExitCode(), kExitUnavailable);
  EXPECT_THAT(Stderr(), HasSubstr("cache manager died of exit code 69, while starting"));
  EXPECT_EQ(NumErrorLines(), 1) << Stderr();
  ExpectNothingLeft();
}

TEST_F(RestartTest, WhoeverRequestsNeedIsReplacedWhileTheyAreFinished) {
  StartServing({}, {{"api_server", "ignore"}});
  ASSERT_TRUE(ChildrenRun(3)) << Stderr();
  launcher_.Signal(SIGTERM);
  ASSERT_TRUE(EventuallySays("finishing open requests"));
  EndAndAwaitNext("cache-manager");
  EndAndAwaitNext("engine-worker-0");
  EXPECT_EQ(LivingChildren().size(), 3u);
  launcher_.Signal(SIGTERM);
  EXPECT_EQ(ExitCode(), kExitOk);
  ExpectNothingLeft();
}

TEST_F(RestartTest, AWorkerThatEndsInOrderWhileRequestsAreFinishedIsNotReplaced) {
  StartServing({}, {{"api_server", "ignore"}});
  ASSERT_TRUE(ChildrenRun(3)) << Stderr();
  launcher_.Signal(SIGTERM);
  ASSERT_TRUE(EventuallySays("finishing open requests"));
  ::kill(PidOf("engine-worker-0"), SIGTERM);
  ASSERT_TRUE(EventuallySays("engine worker 0 ended: exit code 0"));
  EXPECT_EQ(LivingChildren().size(), 2u);
  launcher_.Signal(SIGTERM);
  EXPECT_EQ(ExitCode(), kExitOk);
  ExpectNothingLeft();
}

TEST_F(RestartTest, AStopDoesNotWaitForAChildThatIsAboutToBeStarted) {
  for (const std::string child : {"api server", "engine worker 0", "cache manager"}) {
    SCOPED_TRACE(child);
    std::string variable = child;
    std::replace(variable.begin(), variable.end(), ' ', '_');
    StartServing({}, {{variable, "abort"}});
    ASSERT_TRUE(EventuallySays(child + " died of signal 6 (Aborted); starting it again in 4."));
    const auto before = std::chrono::steady_clock::now();
    launcher_.Signal(SIGTERM);
    EXPECT_EQ(ExitCode(), kExitOk);
    EXPECT_LT(std::chrono::steady_clock::now() - before, std::chrono::seconds(4));
    EXPECT_EQ(NumErrorLines(), 0) << Stderr();
    ExpectNothingLeft();
  }
}

TEST_F(RestartTest, WhoeverCrashesOnceTheApiServerHasEndedIsNoFailure) {
  StartServing({}, {{"engine_worker_0", "ignore"}});
  ASSERT_TRUE(ChildrenRun(3)) << Stderr();
  launcher_.Signal(SIGTERM);
  ASSERT_TRUE(EventuallySays("api server ended"));
  ::kill(PidOf("cache-manager"), SIGKILL);
  ASSERT_TRUE(EventuallySays("cache manager died of signal 9 (Killed) after the last request"));
  ::kill(PidOf("engine-worker-0"), SIGKILL);
  EXPECT_EQ(ExitCode(), kExitOk);
  EXPECT_THAT(Stderr(),
              HasSubstr("engine worker 0 died of signal 9 (Killed) after the last request"));
  EXPECT_EQ(NumErrorLines(), 0) << Stderr();
  ExpectNothingLeft();
}

TEST_F(RestartTest, AHangingCacheManagerIsKilledWhenTheApiServerSaysSoButAFreshOneIsNot) {
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

}  // namespace
}  // namespace wintserve

int main(int argc, char** argv) { return wintserve::testing_launcher::RunTests(argc, argv); }
