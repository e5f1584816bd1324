// `wintserve eval`: the quality of a model, through a server.
#include <fmt/format.h>
#include <poll.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>
#include <optional>
#include <thread>
#include <utility>

#include "api_server/text/tokenizer.h"
#include "common/check.h"
#include "common/exit_code.h"
#include "common/sibling_path.h"
#include "common/status_macros.h"
#include "common/unique_fd.h"
#include "tools/eval/evaluate.h"
#include "tools/eval/local_server.h"
#include "tools/eval/options.h"
#include "tools/eval/report.h"

namespace wintserve::eval {
namespace {

constexpr int kReadyPollMs = 200;
constexpr int kMostStarts = 3;  // of a server whose port somebody else took

// fmt::print ends the program where a disk is full.
void Tell(const std::string& text) { (void)std::fputs(text.c_str(), stderr); }

int Fail(int exit_code, const std::string& text) {
  Tell(fmt::format("error: {}\n", text));
  return exit_code;
}

// The world is at fault: what was given (64), or who should answer (69); or we (70).
int ExitCodeOf(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kNotFound:
    case absl::StatusCode::kPermissionDenied:
      return kExitUsage;
    case absl::StatusCode::kUnavailable:
    case absl::StatusCode::kUnimplemented:
      return kExitUnavailable;
    default:
      return kExitInternal;
  }
}

// SIGINT, SIGTERM and SIGHUP as a descriptor, blocked for all threads.
UniqueFd TakeSignals() {
  sigset_t signals;
  ::sigemptyset(&signals);
  for (const int number : {SIGINT, SIGTERM, SIGHUP}) ::sigaddset(&signals, number);
  CHECK(::pthread_sigmask(SIG_BLOCK, &signals, nullptr) == 0);
  ::signal(SIGPIPE, SIG_IGN);
  UniqueFd fd(::signalfd(-1, &signals, SFD_CLOEXEC));
  CHECK(fd.valid(), "signalfd: errno={}", errno);
  return fd;
}

// What ends the waiting of the main thread.
enum class Event { kSignal, kServerEnded, kDone, kTimeout };

class Waiter {
 public:
  Waiter() : done_(::eventfd(0, EFD_CLOEXEC)), signals_(TakeSignals()) {
    CHECK(done_.valid(), "eventfd: errno={}", errno);
  }
  // From any thread: Wait returns kDone from now on.
  void SetDone() { ::eventfd_write(done_.get(), 1); }

  // server_pidfd: -1, if there is no server to watch.
  Event Wait(int server_pidfd, int timeout_ms) {
    pollfd fds[] = {
        {signals_.get(), POLLIN, 0}, {done_.get(), POLLIN, 0}, {server_pidfd, POLLIN, 0}};
    int count;
    do {
      count = ::poll(fds, std::size(fds), timeout_ms);
    } while (count < 0 && errno == EINTR);
    CHECK(count >= 0, "poll: errno={}", errno);
    if (fds[0].revents != 0) {
      signalfd_siginfo info = {};
      CHECK(::read(signals_.get(), &info, sizeof(info)) == sizeof(info));
      signal_number_ = static_cast<int>(info.ssi_signo);
      return Event::kSignal;
    }
    if (fds[1].revents != 0) return Event::kDone;
    return fds[2].revents != 0 ? Event::kServerEnded : Event::kTimeout;
  }
  int signal_number() const { return signal_number_; }

 private:
  const UniqueFd done_;
  const UniqueFd signals_;
  int signal_number_ = 0;
};

absl::StatusOr<LocalServerOptions> ServerOptions(const Options& options) {
  ASSIGN_OR_RETURN(const std::filesystem::path program, SiblingPath("wintserve"));
  return LocalServerOptions{.program = program.string(),
                            .model = options.model,
                            .flags = options.server_flags,
                            .log_path = options.server_log,
                            .api_key = options.api_key,
                            .loading_fd = STDERR_FILENO};
}

// What a user does who interrupts: no report, and no server that stays.
[[noreturn]] void EndBySignal(int number, std::optional<LocalServer>* server) {
  if (server->has_value()) (*server)->Stop();
  Tell(fmt::format("error: stopped by signal {}\n", number));
  std::_Exit(128 + number);  // requests may still be on their way
}

int TellServerEnd(const std::string& when, const ChildExit& exit, const LocalServer& server) {
  Tell(server.LogTail());
  return Fail(exit.by_signal || exit.code == kExitOk ? int{kExitInternal} : exit.code,
              fmt::format("`wintserve serve` ended {} with {}", when, exit.ToString()));
}

// 0 once the server is ready, else the exit code of this program.
int StartServer(const Options& options, Waiter* waiter, std::optional<LocalServer>* server) {
  const auto server_options = ServerOptions(options);
  if (!server_options.ok()) {
    return Fail(kExitInternal, std::string(server_options.status().message()));
  }
  for (int num_starts = 1;; ++num_starts) {
    auto started = LocalServer::Start(*server_options);
    if (!started.ok()) {
      return Fail(ExitCodeOf(started.status()), std::string(started.status().message()));
    }
    server->reset();
    server->emplace(*std::move(started));
    while (true) {
      switch (waiter->Wait((*server)->pidfd(), kReadyPollMs)) {
        case Event::kSignal:
          EndBySignal(waiter->signal_number(), server);
        case Event::kServerEnded:
          break;
        default:
          if ((*server)->IsReady()) return 0;
          continue;
      }
      break;
    }
    const ChildExit exit = (*server)->Exit().value();
    const bool was_port = !exit.by_signal && exit.code == kExitUnavailable;
    if (!was_port || num_starts == kMostStarts) {
      return TellServerEnd("before it was ready", exit, **server);
    }
  }
}

int Show(const Report& report, const Options& options) {
  int exit_code = kExitOk;
  // One of the two is better than none.
  if (std::fputs(Table(report).c_str(), stdout) < 0 || std::fflush(stdout) != 0) {
    exit_code =
        Fail(kExitInternal, fmt::format("cannot write to stdout: {}", std::strerror(errno)));
  }
  if (options.json_path.empty()) return exit_code;
  const absl::Status status = WriteJson(ToJson(report, options), options.json_path);
  return status.ok() ? exit_code : Fail(kExitInternal, std::string(status.message()));
}

// The evaluation on a thread of its own, while this one watches signals and the server.
int RunTasks(const Options& options, const std::vector<Task>& tasks, const Endpoint& endpoint,
             Waiter* waiter, std::optional<LocalServer>* server) {
  StopFlag stop;
  absl::StatusOr<Report> report = absl::InternalError("no report");
  std::thread thread([&] {
    report = Evaluate(options, tasks, endpoint, &stop);
    waiter->SetDone();
  });
  const Event event = waiter->Wait(server->has_value() ? (*server)->pidfd() : -1, -1);
  if (event == Event::kSignal) EndBySignal(waiter->signal_number(), server);
  if (event == Event::kServerEnded) {
    stop.Set();
    thread.join();  // nobody answers any more, so it ends
    const ChildExit exit = (*server)->Exit().value();
    return TellServerEnd("during the evaluation", exit, **server);
  }
  thread.join();
  if (!report.ok()) {
    return Fail(ExitCodeOf(report.status()), std::string(report.status().message()));
  }
  if (server->has_value()) (*server)->Stop();
  return Show(*report, options);
}

int Run(const Options& options) {
  if (!options.json_path.empty()) {
    // Told before hours of work, not behind them.
    const absl::Status status = CheckJsonPlace(options.json_path);
    if (!status.ok()) return Fail(kExitUsage, std::string(status.message()));
  }
  std::unique_ptr<Tokenizer> tokenizer;
  if (options.NeedsTokenizer()) {
    auto loaded = Tokenizer::Load(options.tokenizer);
    if (!loaded.ok()) return Fail(kExitCheckpoint, std::string(loaded.status().message()));
    tokenizer = *std::move(loaded);
  }
  const auto tasks = ReadTasks(options, tokenizer.get());
  if (!tasks.ok()) return Fail(kExitUsage, std::string(tasks.status().message()));

  Waiter waiter;
  std::optional<LocalServer> server;
  Endpoint endpoint{options.server, options.api_key, options.retry_seconds,
                    options.request_timeout_seconds};
  if (!options.model.empty()) {
    const int exit_code = StartServer(options, &waiter, &server);
    if (exit_code != 0) return exit_code;
    endpoint.url = server->url();
    endpoint.api_key = server->api_key();
  }
  return RunTasks(options, *tasks, endpoint, &waiter, &server);
}

int Main(int argc, char** argv) {
  const CommandLine command = ParseCommandLine(argc, argv, ::getenv);
  (void)std::fputs(command.print.c_str(), stdout);
  if (!command.error.empty()) return Fail(command.exit_code, command.error);
  if (!command.print.empty()) return command.exit_code;
  return Run(command.options);
}

}  // namespace
}  // namespace wintserve::eval

int main(int argc, char** argv) { return wintserve::eval::Main(argc, argv); }
