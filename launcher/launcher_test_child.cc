// Stands in for a child of the launcher: checks what it was started with, writes a line about
// itself to $WINTSERVE_TEST_DIR/<name>, then behaves as $WINTSERVE_TEST_<name> says: "run" (end on
// SIGTERM with code 0), "ignore" SIGTERM, "exit:CODE", "exit_on_term:CODE", "abort",
// "exit_after:MILLISECONDS" (with code 0), "report_hang" (of the cache manager, after 4 s, twice);
// "freeze" (before it has started, like "exit:" and "abort"), "slow:MILLISECONDS" to start;
// "later:BEHAVIOUR": "run" the first time, so from the second start on; "first:" the reverse;
// "talk:BEHAVIOUR": 20,000 lines of 100 bytes on stderr before; "load:BEHAVIOUR" (of engine
// workers): a line about loading and another one on stderr, and reports that half of 100 MiB are
// there, until there is a file "loaded" in the directory above; then those that all is there.
// "says:TEXT" writes it to stdout and runs.
// "abort" leaves a line without end there (mode "serve").
#include <fcntl.h>
#include <fmt/format.h>
#include <signal.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <string>

#include "common/config/instance.h"
#include "common/start_pulse.h"
#include "launcher/client/load_reporter.h"
#include "launcher/client/supervisor_client.h"

namespace {

bool IsListening(int fd) {
  int listening = 0;
  socklen_t length = sizeof(listening);
  return ::getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listening, &length) == 0 && listening == 1;
}

int NumOpenFds() {
  int count = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
    ++count;
  }
  return count - 1;  // the directory's own
}

// A line as common/log.h writes it.
void Log(const wintserve::Instance& instance, const std::string& message) {
  fmt::print(stderr, "INFO     2026-01-02 03:04:05,678 {} engine_worker.{}: {}\n", ::getpid(),
             instance.rank, message);
}

// False: SIGTERM has come before the end, which is when `loaded` exists.
bool Load(const wintserve::Instance& instance, const sigset_t& signals,
          const std::filesystem::path& loaded) {
  constexpr int64_t kMib = int64_t{1} << 20;
  wintserve::LoadReporter reporter({.supervisor_socket = instance.supervisor_socket(),
                                    .token = instance.token,
                                    .rank = static_cast<uint32_t>(instance.rank),
                                    .worker_id = instance.worker_id});
  reporter.Set(50 * kMib, 100 * kMib);
  while (!std::filesystem::exists(loaded)) {
    const timespec pause = {.tv_sec = 0, .tv_nsec = 300'000'000};
    if (::sigtimedwait(&signals, nullptr, &pause) > 0) return false;
    Log(instance, "loading: 50.0 of 100.0 MiB (50%)");
    Log(instance, "loads something");
  }
  reporter.Set(100 * kMib, 100 * kMib);
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  sigset_t signals;
  ::sigemptyset(&signals);
  ::sigaddset(&signals, SIGTERM);
  ::sigprocmask(SIG_BLOCK, &signals, nullptr);
  const int num_fds = NumOpenFds();
  const auto instance = wintserve::InstanceFromArgv(argc, argv);
  if (!instance.ok()) return 99;
  std::string name = std::filesystem::path(argv[0]).filename();
  if (name == "wintserve-engine-worker") name += fmt::format("-{}", instance->rank);

  std::string token_digits;
  for (const unsigned char byte : instance->token) token_digits += fmt::format("{:02x}", byte);
  const std::string path = fmt::format("{}/{}", std::getenv("WINTSERVE_TEST_DIR"), name);
  const std::string line = fmt::format(
      "pid={} pgid={} fds={} http={} metrics={} runtime_dir={} token={} port={} mode={} "
      "tunables={} "
      "worker_id={} restarted={} token_digits={} num_keys={} json={}\n",
      ::getpid(), ::getpgrp(), num_fds, IsListening(instance->http_fd),
      IsListening(instance->metrics_fd), instance->runtime_dir, instance->token.size(),
      instance->options.port, instance->mode, std::getenv("GLIBC_TUNABLES"), instance->worker_id,
      instance->restarted, token_digits, instance->options.api_keys.size(),
      instance->generate_json);
  const bool is_first_start = !std::filesystem::exists(path);
  const int fd = ::open((path + ".new").c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
  if (::write(fd, line.data(), line.size()) != static_cast<ssize_t>(line.size())) return 98;
  ::close(fd);
  std::filesystem::rename(path + ".new", path);

  std::string variable = "WINTSERVE_TEST_" + name.substr(std::strlen("wintserve-"));
  for (char& c : variable) c = c == '-' ? '_' : c;
  const char* set = std::getenv(variable.c_str());
  std::string behaviour = set == nullptr ? "run" : set;
  if (behaviour.starts_with("later:")) behaviour = is_first_start ? "run" : behaviour.substr(6);
  if (behaviour.starts_with("first:")) behaviour = is_first_start ? behaviour.substr(6) : "run";
  wintserve::StartPulse start(instance->start_fd);
  if (behaviour == "freeze") ::raise(SIGSTOP);
  if (behaviour.starts_with("slow:")) ::usleep(1000 * std::atoi(behaviour.c_str() + 5));
  if (behaviour.starts_with("talk:")) {
    for (int i = 0; i < 20'000; ++i) fmt::print(stderr, "{:099}\n", i);
    behaviour = behaviour.substr(5);
  }
  if (behaviour.starts_with("load:")) {
    const auto directory = std::filesystem::path(path).parent_path().parent_path();
    if (!Load(*instance, signals, directory / "loaded")) return 0;
    behaviour = behaviour.substr(5);
  }
  if (behaviour.starts_with("says:")) {
    fmt::print("{}\n", behaviour.substr(5));
    std::fflush(stdout);
  }
  if (behaviour == "abort") {
    if (instance->mode == "serve") fmt::print(stderr, "last words");
    std::abort();
  }
  if (behaviour.starts_with("exit:")) return std::atoi(behaviour.c_str() + 5);
  start.Started();
  ::close(::open((path + ".started").c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0600));
  if (behaviour.starts_with("exit_after:")) {
    ::usleep(1000 * std::atoi(behaviour.c_str() + 11));
    return 0;
  }
  if (behaviour == "report_hang") {
    ::sleep(4);
    for (int i = 0; i < 2; ++i) {
      const absl::Status status = wintserve::RequestCacheManagerRestart(
          instance->supervisor_socket(), instance->token, /*timeout_ms=*/5000);
      if (!status.ok()) return 97;
      ::usleep(100'000);
    }
  }
  int received = 0;
  do {
    ::sigwait(&signals, &received);
  } while (behaviour == "ignore");
  return behaviour.starts_with("exit_on_term:") ? std::atoi(behaviour.c_str() + 13) : 0;
}
