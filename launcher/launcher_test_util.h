// The real `wintserve` with launcher_test_child in the place of every child. What the test
// programs of the launcher share; their arguments are the paths of both.
#pragma once

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "common/child_process.h"
#include "common/exit_code.h"
#include "common/temp_dir_test_util.h"

namespace wintserve::testing_launcher {

namespace fs = std::filesystem;

inline std::string g_wintserve;   // NOLINT: set once, in main
inline std::string g_test_child;  // NOLINT
inline constexpr int64_t kTimeoutMs = 60'000;

inline const char* const kChildren[] = {"wintserve-api-server", "wintserve-cache-manager",
                                        "wintserve-engine-worker"};

inline std::string ReadFile(const fs::path& path) {
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

inline bool Eventually(const std::function<bool()>& condition, int64_t timeout_ms = kTimeoutMs) {
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
    for (const char* name : {"bin", "reports", "run", "model"}) fs::create_directory(dir_ / name);
    fs::permissions(dir_ / "run", fs::perms::owner_all);
    std::ofstream(dir_ / "model" / "config.json") << "{}";
    fs::copy_file(g_wintserve, dir_ / "bin" / "wintserve");
    for (const char* name : kChildren) fs::copy_file(g_test_child, dir_ / "bin" / name);
  }
  ~LauncherTest() override { launcher_ = ChildProcess(); }

  // behaviours: see launcher_test_child.cc, by "api_server", "cache_manager", "engine_worker_0".
  // environment_: beside ours.
  void Start(std::vector<std::string> args,
             const std::map<std::string, std::string>& behaviours = {}) {
    // The shell sends both streams to files and then becomes the launcher.
    ChildOptions options;
    options.argv = {
        "/bin/sh", "-c",
        fmt::format("{1} exec \"$0\" \"$@\" >{0}/stdout 2>{2}", dir_.string(), before_exec_,
                    stderr_.empty() ? (dir_ / "stderr").string() : stderr_),
        (dir_ / "bin" / "wintserve").string()};
    options.argv.insert(options.argv.end(), args.begin(), args.end());
    options.environment = {"XDG_RUNTIME_DIR=" + (dir_ / "run").string(),
                           "WINTSERVE_TEST_DIR=" + (dir_ / "reports").string()};
    for (const auto& [child, behaviour] : behaviours) {
      options.environment.push_back(fmt::format("WINTSERVE_TEST_{}={}", child, behaviour));
    }
    options.environment.insert(options.environment.end(), environment_.begin(), environment_.end());
    if (!keeps_reports_) {
      for (const auto& file : fs::directory_iterator(dir_ / "reports")) fs::remove(file);
    }
    fs::remove(dir_ / "stderr");
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
      if (const auto kind = file.path().extension(); kind != ".new" && kind != ".started") {
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
  // Whether it, or one before it, has told the launcher that it has started.
  bool HasStarted(const std::string& child) const {
    return fs::exists(dir_ / "reports" / ("wintserve-" + child + ".started"));
  }
  pid_t PidOf(const std::string& child) const { return std::stoi(Reported(child, "pid")); }

  // Waits until the next one runs.
  void EndAndAwaitNext(const std::string& child, int signal_number = SIGKILL) {
    const pid_t pid = PidOf(child);
    ::kill(pid, signal_number);
    ASSERT_TRUE(Eventually([&] { return PidOf(child) != pid; })) << Stderr();
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
    EXPECT_THAT(LivingChildren(), ::testing::IsEmpty());
    EXPECT_THAT(RuntimeDirs(), ::testing::IsEmpty());
  }

  int NumErrorLines() const {
    int count = 0;
    std::istringstream lines(Stderr());
    for (std::string line; std::getline(lines, line);) count += line.starts_with("ERROR");
    return count;
  }

  bool EventuallySays(const std::string& text, int64_t timeout_ms = kTimeoutMs) const {
    return Eventually([&] { return Stderr().find(text) != std::string::npos; }, timeout_ms);
  }

  const TempDir temp_dir_;
  const fs::path dir_ = temp_dir_.path();
  std::vector<std::string> environment_;  // "NAME=value", of the launcher
  std::string before_exec_;               // for the shell: ends with ;
  std::string stderr_;          // where the launcher's goes instead of the file: path or &-
  bool keeps_reports_ = false;  // another launcher's children have written some
  ChildProcess launcher_;
};

// The main of a test program.
inline int RunTests(int argc, char** argv) {
  ::testing::InitGoogleTest(&argc, argv);
  if (argc != 3) {
    fmt::print(stderr, "usage: {} PATH_OF_WINTSERVE PATH_OF_LAUNCHER_TEST_CHILD\n", argv[0]);
    return 1;
  }
  g_wintserve = argv[1];
  g_test_child = argv[2];
  return RUN_ALL_TESTS();
}

}  // namespace wintserve::testing_launcher
