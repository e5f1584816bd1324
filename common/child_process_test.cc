#include "common/child_process.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <string>

namespace wintserve {
namespace {

using ::testing::HasSubstr;

constexpr int64_t kTimeoutMs = 20'000;

ChildOptions Shell(const std::string& script) {
  ChildOptions options;
  options.argv = {"/bin/sh", "-c", script};
  return options;
}

ChildProcess MustSpawn(const ChildOptions& options) {
  auto child = ChildProcess::Spawn(options);
  EXPECT_TRUE(child.ok()) << child.status();
  return child.ok() ? *std::move(child) : ChildProcess();
}

int ExitCode(ChildProcess* child) {
  const auto ended = child->Wait(kTimeoutMs);
  if (!ended.has_value() || ended->by_signal) return -1;
  return ended->code;
}

// What a script writes to descriptor 3.
std::string OutputOf(const std::string& script, std::vector<std::string> environment = {}) {
  const UniqueFd file(::memfd_create("output", MFD_CLOEXEC));
  ChildOptions options = Shell(script);
  options.descriptors = {{file.get(), 3}};
  options.environment = std::move(environment);
  ChildProcess child = MustSpawn(options);
  EXPECT_EQ(ExitCode(&child), 0);
  std::string text(::lseek(file.get(), 0, SEEK_END), '\0');
  EXPECT_EQ(::pread(file.get(), text.data(), text.size(), 0), static_cast<ssize_t>(text.size()));
  return text;
}

TEST(ChildProcess, InheritsOnlyTheVariablesThatItIsToHave) {
  ::setenv("CHILD_TEST_SECRET", "hidden", /*overwrite=*/1);
  ::setenv("CHILD_TEST_PATH", "seen", /*overwrite=*/1);
  const UniqueFd file(::memfd_create("output", MFD_CLOEXEC));
  ChildOptions options = Shell("env >&3");
  options.descriptors = {{file.get(), 3}};
  options.environment = {"CHILD_TEST_SECRET_OF_ITS_OWN=1"};
  options.inherits = [](std::string_view name) { return name.ends_with("PATH"); };
  ChildProcess child = MustSpawn(options);
  EXPECT_EQ(ExitCode(&child), 0);
  std::string text(::lseek(file.get(), 0, SEEK_END), '\0');
  EXPECT_EQ(::pread(file.get(), text.data(), text.size(), 0), std::ssize(text));
  EXPECT_NE(text.find("CHILD_TEST_PATH=seen\n"), std::string::npos) << text;
  EXPECT_NE(text.find("CHILD_TEST_SECRET_OF_ITS_OWN=1\n"), std::string::npos) << text;
  EXPECT_EQ(text.find("hidden"), std::string::npos) << text;
  ::unsetenv("CHILD_TEST_SECRET");
  ::unsetenv("CHILD_TEST_PATH");
}

TEST(ChildProcess, ReportsHowItEnded) {
  ChildProcess child = MustSpawn(Shell("exit 66"));
  auto ended = child.Wait(kTimeoutMs);
  ASSERT_TRUE(ended.has_value());
  EXPECT_EQ(ended->ToString(), "exit code 66");
  EXPECT_FALSE(child.running());
  EXPECT_EQ(child.Wait(0)->code, 66) << "the answer is kept";

  child = MustSpawn(Shell("kill -9 $$"));
  ended = child.Wait(kTimeoutMs);
  ASSERT_TRUE(ended.has_value());
  EXPECT_EQ(ended->ToString(), "signal 9 (Killed)");
}

TEST(ChildProcess, WaitGivesUpWhenToldTo) {
  ChildProcess child = MustSpawn(Shell("exec sleep 60"));
  EXPECT_FALSE(child.Wait(0).has_value());
  EXPECT_FALSE(child.Wait(20).has_value());
  EXPECT_TRUE(child.running());
}

TEST(ChildProcess, SaysWhatCannotBeExecuted) {
  ChildOptions options;
  options.argv = {"/no/such/program"};
  auto child = ChildProcess::Spawn(options);
  EXPECT_EQ(child.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(child.status().ToString(), HasSubstr("/no/such/program"));
  options.argv = {"/dev/null"};
  child = ChildProcess::Spawn(options);
  EXPECT_EQ(child.status().code(), absl::StatusCode::kPermissionDenied);
  EXPECT_THAT(child.status().ToString(), HasSubstr("/dev/null"));
}

TEST(ChildProcess, InheritsTheNamedDescriptorsAndNoOthers) {
  const int leaky = ::fcntl(STDERR_FILENO, F_DUPFD, 20);  // no close-on-exec
  // 4 is the directory that ls reads.
  EXPECT_EQ(OutputOf("exec ls /proc/self/fd >&3"), "0\n1\n2\n3\n4\n");
  ::close(leaky);
}

TEST(ChildProcess, DescriptorsMaySwapNumbers) {
  // Each takes the number at which the other one lives here.
  const UniqueFd a(::memfd_create("a", MFD_CLOEXEC));
  const UniqueFd b(::memfd_create("b", MFD_CLOEXEC));
  ChildOptions options = Shell("echo a >&\"$0\"; echo b >&\"$1\"");
  options.argv.push_back(std::to_string(b.get()));
  options.argv.push_back(std::to_string(a.get()));
  options.descriptors = {{a.get(), b.get()}, {b.get(), a.get()}};
  ChildProcess child = MustSpawn(options);
  EXPECT_EQ(ExitCode(&child), 0);
  char text[2] = {};
  EXPECT_EQ(::pread(a.get(), text, 2, 0), 2);
  EXPECT_EQ(std::string(text, 2), "a\n");
  EXPECT_EQ(::pread(b.get(), text, 2, 0), 2);
  EXPECT_EQ(std::string(text, 2), "b\n");
}

TEST(ChildProcess, BothOutputStreamsMayGoElsewhere) {
  const UniqueFd file(::memfd_create("output", MFD_CLOEXEC));
  ChildOptions options = Shell("echo out; echo err >&2; ls /proc/self/fd | wc -l");
  options.output_fd = file.get();
  ChildProcess child = MustSpawn(options);
  EXPECT_EQ(ExitCode(&child), 0);
  char text[64] = {};
  EXPECT_GT(::pread(file.get(), text, sizeof(text) - 1, 0), 0);
  EXPECT_STREQ(text, "out\nerr\n4\n") << "3 is the directory that ls reads";
}

TEST(ChildProcess, OurOwnStreamMayHaveAnotherNumber) {
  const UniqueFd file(::memfd_create("output", MFD_CLOEXEC));
  ChildOptions options = Shell("readlink /proc/$$/fd/3");
  options.output_fd = file.get();
  options.descriptors = {{STDERR_FILENO, 3}};
  ChildProcess child = MustSpawn(options);
  EXPECT_EQ(ExitCode(&child), 0);
  char text[4096] = {};
  EXPECT_GT(::pread(file.get(), text, sizeof(text) - 1, 0), 0);
  EXPECT_EQ(text, std::filesystem::read_symlink("/proc/self/fd/2").string() + "\n");
}

TEST(ChildProcess, StderrAloneMayGoElsewhere) {
  const UniqueFd file(::memfd_create("output", MFD_CLOEXEC));
  ChildOptions options = Shell("target=$(readlink /proc/$$/fd/1); echo \"$target\" >&2");
  options.output_fd = file.get();
  options.keeps_stdout = true;
  ChildProcess child = MustSpawn(options);
  EXPECT_EQ(ExitCode(&child), 0);
  char text[4096] = {};
  EXPECT_GT(::pread(file.get(), text, sizeof(text) - 1, 0), 0);
  EXPECT_EQ(text, std::filesystem::read_symlink("/proc/self/fd/1").string() + "\n");
}

TEST(ChildProcess, HasAFreshSignalStateGroupInputAndItsEnvironment) {
  sigset_t blocked;
  sigset_t before;
  ::sigemptyset(&blocked);
  ::sigaddset(&blocked, SIGTERM);
  ::pthread_sigmask(SIG_BLOCK, &blocked, &before);
  const auto previous = ::signal(SIGPIPE, SIG_IGN);
  const std::string state = OutputOf(
      "grep -E '^Sig(Blk|Ign):' /proc/self/status >&3; readlink /proc/$$/fd/0 >&3;"
      "[ $(cut -d' ' -f5 /proc/$$/stat) = $$ ] && echo leader >&3; echo \"$GREETING\" >&3",
      {"GREETING=hello"});
  ::signal(SIGPIPE, previous);
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
  // Signals 32 and 33 are the C library's own: it lets nobody reset them, and a parent may pass
  // them on ignored (0x180000000).
  EXPECT_THAT(state, testing::MatchesRegex("SigBlk:\t0{16}\nSigIgn:\t(0{16}|0{7}180000000)\n"
                                           "/dev/null\nleader\nhello\n"));
}

TEST(ChildProcess, StopKillsWhoIgnoresSigterm) {
  // The descriptor tells that the trap is set.
  int ready[2];
  ASSERT_EQ(::pipe2(ready, O_CLOEXEC), 0);
  ChildOptions options = Shell("trap '' TERM; echo >&3; while :; do sleep 0.05; done");
  options.descriptors = {{ready[1], 3}};
  ChildProcess child = MustSpawn(options);
  char byte;
  ASSERT_EQ(::read(ready[0], &byte, 1), 1);
  child.Stop(50);
  EXPECT_EQ(child.Wait(0)->ToString(), "signal 9 (Killed)");
  ::close(ready[0]);
  ::close(ready[1]);
}

TEST(ChildProcess, NoneOutlivesItsHandle) {
  pid_t pid = -1;
  {
    const ChildProcess child = MustSpawn(Shell("exec sleep 60"));
    pid = child.pid();
    ASSERT_EQ(::kill(pid, 0), 0);
  }
  EXPECT_EQ(::kill(pid, 0), -1) << "not even as a zombie";
  EXPECT_EQ(errno, ESRCH);
}

TEST(ChildProcess, AMovedFromHandleStandsForNothing) {
  ChildProcess first = MustSpawn(Shell("exec sleep 60"));
  const pid_t pid = first.pid();
  ChildProcess second = std::move(first);
  first = ChildProcess();
  EXPECT_EQ(::kill(pid, 0), 0);
  EXPECT_EQ(second.pid(), pid);
  second = ChildProcess();
  EXPECT_EQ(::kill(pid, 0), -1) << "assignment ends the process it replaces";
}

}  // namespace
}  // namespace wintserve
