// The bar on the launcher's console while engine workers load.
#include "common/terminal_test_util.h"
#include "launcher/launcher_test_util.h"

namespace wintserve {
namespace {

using namespace testing_launcher;  // NOLINT: a test's own
using ::testing::Contains;
using ::testing::ContainsRegex;
using ::testing::Each;
using ::testing::HasSubstr;
using ::testing::Not;

// What a terminal shows of such bytes, as lines. They have no other escape sequences than the ones
// here, and all is ASCII.
std::vector<std::string> Screen(std::string_view bytes) {
  std::vector<std::string> lines = {""};
  size_t column = 0;
  while (!bytes.empty()) {
    std::string& line = lines.back();
    size_t length = 1;
    if (bytes.starts_with("\033[K")) {
      line.resize(std::min(line.size(), column));
      length = 3;
    } else if (bytes.starts_with("\033[")) {
      length = bytes.find('m') + 1;
      EXPECT_NE(length, 0u) << bytes.substr(1, 20);
      EXPECT_EQ(bytes.substr(2, length - 3).find_first_not_of("0123456789;"), bytes.npos);
      if (length == 0) break;
    } else if (bytes[0] == '\n') {
      lines.emplace_back();
      column = 0;
    } else if (bytes[0] == '\r') {
      column = 0;
    } else {
      line.resize(std::max(line.size(), column + 1), ' ');
      line[column++] = bytes[0];
    }
    bytes.remove_prefix(length);
  }
  return lines;
}

class BarTest : public LauncherTest {
 protected:
  static constexpr char kLoadingLine[] = "loading: 50.0 of 100.0 MiB";

  void StartLoading(const std::string& stderr_path, std::vector<std::string> more = {}) {
    stderr_ = stderr_path;
    more.push_back("-tp=2");
    StartServing(more, {{"engine_worker_0", "load:run"}, {"engine_worker_1", "load:run"}});
  }
  void EndLoading() { std::ofstream(dir_ / "loaded") << "now"; }
  void Stop() {
    launcher_.Signal(SIGTERM);
    EXPECT_EQ(ExitCode(), kExitOk);
  }
  std::string Log(const std::string& name) const { return ReadFile(dir_ / "log" / name); }
};

TEST_F(BarTest, IsBelowTheLinesWhileWorkersLoadAndGoneThen) {
  TestTerminal terminal(70);
  StartLoading(terminal.path(), {"--log-dir", (dir_ / "log").string()});
  std::string bytes = terminal.ReadUntil("\rloading 2 ranks #########");
  // Lines come between, and it is behind each of them.
  for (int i = 0; i < 5; ++i) {
    bytes += terminal.ReadUntil("loads something\n");
    bytes += terminal.ReadUntil("\033[K");
    EXPECT_THAT(Screen(bytes).back(),
                ContainsRegex("^loading 2 ranks #+-+   50%  100.0/200.0 MiB"));
    EXPECT_LT(Screen(bytes).back().size(), 70u);
  }
  // By then it had been drawn.
  const std::string with_bar = bytes.substr(bytes.find("\rloading 2 ranks"));
  EXPECT_THAT(with_bar, Not(HasSubstr(kLoadingLine))) << "it is said twice";
  EndLoading();
  bytes += terminal.ReadUntil("\r\033[K");
  bytes += terminal.ReadUntilSilent(std::chrono::milliseconds(1000));
  EXPECT_THAT(Screen(bytes), Each(Not(HasSubstr("loading 2 ranks"))));
  Stop();
  bytes += terminal.ReadUntilSilent(std::chrono::milliseconds(100));
  const std::vector<std::string> screen = Screen(bytes);
  EXPECT_THAT(screen, Each(Not(HasSubstr("###"))));
  EXPECT_THAT(screen, Contains(ContainsRegex("^\\[engine_worker.0\\] INFO .*: loads something$")));
  EXPECT_THAT(screen, Contains(ContainsRegex("^INFO .* launcher: effective config: ")));
  EXPECT_EQ(screen.back(), "");
  // Files have the lines that the console left out, and nothing of the bar.
  EXPECT_THAT(Log("workerlog.0"), HasSubstr(kLoadingLine));
  EXPECT_THAT(Log("workerlog.0"), HasSubstr("loads something"));
  for (const char* name : {"workerlog.0", "workerlog.1", "launcher.log"}) {
    EXPECT_THAT(Log(name), Not(HasSubstr("\033"))) << name;
    EXPECT_THAT(Log(name), Not(HasSubstr("###"))) << name;
  }
}

TEST_F(BarTest, KeepsUpWithTheWidthOfTheTerminal) {
  TestTerminal terminal(100);
  StartLoading(terminal.path());
  terminal.ReadUntil("  100.0/200.0 MiB\033[K");
  terminal.SetColumns(30);
  terminal.ReadUntil("\rloading 2 ranks ######-------\033[K");
  terminal.SetColumns(10);
  terminal.ReadUntil("\rloading 2\033[K");
  terminal.SetColumns(1);
  terminal.ReadUntil("\r\033[K");
  Stop();
}

TEST_F(BarTest, AWorkerThatDiesIsTakenOutAndItsReplacementPutIn) {
  TestTerminal terminal(70);
  StartLoading(terminal.path());
  std::string bytes = terminal.ReadUntil("\rloading 2 ranks #########");
  EndAndAwaitNext("engine-worker-1");
  bytes += terminal.ReadUntil("engine worker 1 died of signal 9");
  bytes += terminal.ReadUntil("\rloading rank 0 #########");
  bytes += terminal.ReadUntil("\rloading 2 ranks #########");
  Stop();
  bytes += terminal.ReadUntilSilent(std::chrono::milliseconds(100));
  EXPECT_THAT(Screen(bytes), Each(Not(HasSubstr("###")))) << "it is left when the launcher stops";
}

TEST_F(BarTest, ADumbTerminalGetsTheLinesAndNoEscapeSequence) {
  TestTerminal terminal(70);
  ::setenv("TERM", "dumb", 1);
  StartLoading(terminal.path());
  std::string bytes;
  for (int i = 0; i < 5; ++i) bytes += terminal.ReadUntil(kLoadingLine);
  EndAndAwaitNext("engine-worker-1");  // a warning, which has a colour elsewhere
  bytes += terminal.ReadUntil("engine worker 1 died of signal 9");
  EndLoading();
  Stop();
  bytes += terminal.ReadUntilSilent(std::chrono::milliseconds(100));
  EXPECT_THAT(bytes, Not(HasSubstr("\033")));
  EXPECT_THAT(bytes, Not(HasSubstr("\r")));
}

TEST_F(BarTest, AFileGetsTheLinesAndNoEscapeSequence) {
  TestTerminal terminal;  // for TERM; stdout is one, and stderr counts
  StartLoading("");
  ASSERT_TRUE(EventuallySays(kLoadingLine)) << Stderr();
  EndAndAwaitNext("engine-worker-1");
  ASSERT_TRUE(EventuallySays("engine worker 1 died of signal 9"));
  EndLoading();
  Stop();
  EXPECT_THAT(Stderr(), Not(HasSubstr("\033")));
  EXPECT_THAT(Stderr(), Not(HasSubstr("\r")));
  EXPECT_THAT(Stderr(), Not(HasSubstr("###")));
}

// `wintserve generate`, whose answer goes to stdout.
class GenerateBarTest : public BarTest {
 protected:
  void StartGenerating(const std::string& stderr_path) {
    stderr_ = stderr_path;
    Start({"generate", "--model", Model(), "--prompt", "x"},
          {{"api_server", "says:the answer"}, {"engine_worker_0", "load:run"}});
  }
};

TEST_F(GenerateBarTest, StderrHasItIfThatIsATerminal) {
  TestTerminal terminal(70);
  StartGenerating(terminal.path());
  std::string bytes = terminal.ReadUntil("\rloading #########");
  bytes += terminal.ReadUntil("loads something\n");
  bytes += terminal.ReadUntil("\033[K");
  EXPECT_THAT(Screen(bytes).back(), ContainsRegex("^loading #+-+   50%  50.0/100.0 MiB"));
  EndLoading();
  bytes += terminal.ReadUntil("\r\033[K");
  Stop();
  bytes += terminal.ReadUntilSilent(std::chrono::milliseconds(100));
  EXPECT_THAT(Screen(bytes), Each(Not(HasSubstr("###"))));
  EXPECT_THAT(bytes, Not(HasSubstr("the answer")));
  EXPECT_EQ(Stdout(), "the answer\n");
}

TEST_F(GenerateBarTest, ElsewhereItGetsLinesThoughTheLogIsOfWarnings) {
  TestTerminal terminal;  // for TERM
  StartGenerating("");
  ASSERT_TRUE(EventuallySays("\nloading: 50.0 of 100.0 MiB (50%)\n")) << Stderr();
  EndLoading();
  Stop();
  EXPECT_THAT(Stderr(), Not(HasSubstr(": loading:"))) << "it is said twice";
  EXPECT_THAT(Stderr(), Not(HasSubstr("\033")));
  EXPECT_EQ(Stdout(), "the answer\n");
}

// Who starts a server for itself shows how far that is loaded.
class LoadingFdTest : public BarTest {
 protected:
  void StartWithLoadingFd(const std::string& path) {
    environment_.push_back("WINTSERVE_LOADING_FD=9");
    before_exec_ = fmt::format("exec 9>>{};", path);
    StartLoading("");
  }
};

TEST_F(LoadingFdTest, ATerminalGetsTheBarAndNothingElse) {
  TestTerminal terminal(70);
  StartWithLoadingFd(terminal.path());
  std::string bytes = terminal.ReadUntil("\rloading 2 ranks #########");
  ASSERT_TRUE(EventuallySays(kLoadingLine)) << "a log has the lines";
  EXPECT_EQ(Reported("engine-worker-0", "fds"), Reported("cache-manager", "fds"));
  EndLoading();
  bytes += terminal.ReadUntil("\r\033[K");
  Stop();
  bytes += terminal.ReadUntilSilent(std::chrono::milliseconds(100));
  EXPECT_EQ(Screen(bytes), std::vector<std::string>{""});
  EXPECT_THAT(Stderr(), Not(HasSubstr("###")));
}

TEST_F(LoadingFdTest, AFileGetsLines) {
  const fs::path path = dir_ / "loading";
  StartWithLoadingFd(path.string());
  const std::string line = "loading 2 ranks: 100.0 of 200.0 MiB (50%)\n";
  ASSERT_TRUE(Eventually([&] { return ReadFile(path).ends_with(line); })) << Stderr();
  EXPECT_THAT(ReadFile(path), ::testing::StartsWith("loading "));
  ASSERT_TRUE(EventuallySays(kLoadingLine));
  Stop();
}

TEST_F(LoadingFdTest, OneThatIsNotOpenIsRefused) {
  for (const char* text : {"99", "2", "-1", "x", ""}) {
    environment_ = {fmt::format("WINTSERVE_LOADING_FD={}", text)};
    StartServing();
    EXPECT_EQ(ExitCode(), kExitUsage);
    EXPECT_EQ(Stderr(), fmt::format("error: WINTSERVE_LOADING_FD: must be the number of an open "
                                    "descriptor, from 3 on (got '{}')\n",
                                    text));
  }
}

TEST_F(BarTest, WithoutColoursThereIsStillABar) {
  TestTerminal terminal(70);
  ::setenv("NO_COLOR", "1", 1);
  StartLoading(terminal.path());
  std::string bytes = terminal.ReadUntil("\rloading 2 ranks #########");
  EndAndAwaitNext("engine-worker-1");
  bytes += terminal.ReadUntil("engine worker 1 died of signal 9");
  EndLoading();
  Stop();
  ::unsetenv("NO_COLOR");
  bytes += terminal.ReadUntilSilent(std::chrono::milliseconds(100));
  EXPECT_THAT(bytes, HasSubstr("\033[K"));
  for (size_t at = bytes.find('\033'); at != bytes.npos; at = bytes.find('\033', at + 1)) {
    EXPECT_EQ(bytes.substr(at, 3), "\033[K");
  }
}

}  // namespace
}  // namespace wintserve

int main(int argc, char** argv) { return wintserve::testing_launcher::RunTests(argc, argv); }
