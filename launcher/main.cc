// The `wintserve` command.
#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "common/config/command_line.h"
#include "common/config/serve_options_json.h"
#include "common/exit_code.h"
#include "common/log.h"
#include "common/progress.h"
#include "common/status_macros.h"
#include "common/unique_fd.h"
#include "launcher/child.h"
#include "launcher/instance_log.h"
#include "launcher/instance_token.h"
#include "launcher/preflight.h"
#include "launcher/runtime_dir.h"
#include "launcher/shared_dir.h"
#include "launcher/sibling_program.h"
#include "launcher/supervisor.h"

namespace wintserve {
namespace {

int Fail(int exit_code, const std::string& text) {
  fmt::print(stderr, "error: {}\n", text);
  return exit_code;
}

std::vector<std::string> LogNames(const ServeOptions& options) {
  std::vector<std::string> names = {kLauncherLogName};
  if (options.role != "engine") names.push_back(LogNameOf(ChildRole::kApiServer, 0));
  if (options.role == "api") return names;
  names.push_back(LogNameOf(ChildRole::kCacheManager, 0));
  for (int rank = 0; rank < options.tensor_parallel_size; ++rank) {
    names.push_back(LogNameOf(ChildRole::kEngineWorker, rank));
  }
  return names;
}

// What is opened later must not take the number of a stream that we were started without: others
// would write there.
void OpenMissingStandardStreams() {
  int fd;
  do {
    fd = ::open("/dev/null", O_RDWR);
  } while (fd >= 0 && fd <= STDERR_FILENO);
  if (fd >= 0) ::close(fd);
}

// What is checked, and what is taken, before anything starts.
PreflightError Prepare(Verb verb, ServeOptions* options, ReservedPorts* ports,
                       std::vector<std::string>* warnings) {
  PreflightError error = CheckModelAndDevice(*options);
  if (!error.ok()) return error;
  if (verb == Verb::kServe) {
    const std::string warning = RaiseDescriptorLimit(*options);
    if (!warning.empty()) warnings->push_back(warning);
  }
  error = CheckQueueTls(*options, warnings);
  if (!error.ok()) return error;
  return ReservePorts(verb == Verb::kServe, options, ports);
}

int ExitCodeOf(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kPermissionDenied:
      return kExitUsage;
    case absl::StatusCode::kUnavailable:
      return kExitUnavailable;
    default:
      return kExitInternal;
  }
}

int Fail(const absl::Status& status) {
  return Fail(ExitCodeOf(status), std::string(status.message()));
}

// The directory of the sockets: of our own, or shared with the other launcher.
struct Place {
  std::optional<RuntimeDir> own;
  std::optional<SharedDir> shared;
};

// Puts directory and token into the instance.
absl::Status Settle(Instance* instance, Place* place, std::string* warning) {
  const ServeOptions& options = instance->options;
  if (options.role == "all") {
    absl::StatusOr<RuntimeDir> dir = RuntimeDir::Create();
    if (!dir.ok()) return absl::InternalError(dir.status().message());
    place->own.emplace(*std::move(dir));
    instance->runtime_dir = place->own->path();
  } else {
    ASSIGN_OR_RETURN(SharedDir dir, SharedDir::Open(options.runtime_dir, options.role));
    place->shared.emplace(std::move(dir));
    instance->runtime_dir = place->shared->path();
  }
  if (place->shared.has_value() && options.queue_token_file.empty()) {
    ASSIGN_OR_RETURN(instance->token, place->shared->Token(warning));
  } else {
    ASSIGN_OR_RETURN(instance->token, MakeInstanceToken(options, warning));
  }
  return absl::OkStatus();
}

// Where whoever has started us wants to see how far loading is; invalid: nobody said. Call before
// any descriptor is opened.
absl::StatusOr<UniqueFd> TakeLoadingFd() {
  const char* const text = ::getenv(kLoadingFdVariable);
  if (text == nullptr) return UniqueFd();
  int fd = -1;
  if (!absl::SimpleAtoi(text, &fd) || fd <= STDERR_FILENO ||
      ::fcntl(fd, F_SETFD, FD_CLOEXEC) != 0) {
    return absl::InvalidArgumentError(
        fmt::format("{}: must be the number of an open descriptor, from 3 on (got '{}')",
                    kLoadingFdVariable, text));
  }
  ::unsetenv(kLoadingFdVariable);  // it is not for our children
  return UniqueFd(fd);
}

// Runs until everything has ended. What is logged goes to our stderr and where --log-dir says; the
// answer of `wintserve generate` goes to stdout as it is.
int Supervise(Instance instance, Supervisor::Surroundings surroundings, UniqueFd loading_fd) {
  // Of an answer the log says nothing below the level of warnings.
  const bool in_own_lines = instance.mode == "generate";
  auto log = InstanceLog::Open(instance.options.log_dir, LogNames(instance.options),
                               {.fd = std::move(loading_fd), .in_own_lines = in_own_lines});
  if (!log.ok()) return Fail(log.status());
  surroundings.log = &*log;
  const std::string level = instance.options.log_level;
  InitLog(kLauncherLogName, level, [&log](std::string_view line) { log->WriteOwn(line); });
  LOG_INFO("effective config: {}", EffectiveConfig(instance.options));
  const int exit_code = Supervisor(std::move(instance), std::move(surroundings)).Run();
  InitLog(kLauncherLogName, level);
  return exit_code;
}

int RunInstance(CommandLine command, UniqueFd loading_fd) {
  InitLog(kLauncherLogName, command.options.log_level);
  std::vector<std::string> warnings = std::move(command.notes);
  Instance instance;
  instance.options = std::move(command.options);
  Supervisor::Surroundings surroundings;
  const PreflightError error =
      Prepare(*command.verb, &instance.options, &surroundings.ports, &warnings);
  for (const std::string& warning : warnings) LOG_WARNING("{}", warning);
  if (!error.ok()) return Fail(error.exit_code, error.text);

  Place place;
  std::string warning;
  if (const absl::Status status = Settle(&instance, &place, &warning); !status.ok()) {
    return Fail(status);
  }
  if (!warning.empty()) LOG_WARNING("{}", warning);
  surroundings.shared = place.shared.has_value() ? &*place.shared : nullptr;
  if (instance.options.role != "api") {
    auto server = SupervisorServer::Listen(instance.supervisor_socket(), instance.token);
    if (!server.ok()) return Fail(kExitInternal, std::string(server.status().message()));
    surroundings.server.emplace(*std::move(server));
  }
  if (*command.verb == Verb::kGenerate) {
    instance.mode = "generate";
    instance.options.log_dir.clear();  // FD_LOG_DIR is a server's
    instance.generate_json = command.generate.ToJson();
  }
  return Supervise(std::move(instance), std::move(surroundings), std::move(loading_fd));
}

void Hide(char* text, size_t length) { std::memset(text, '*', length); }

// ps shows every user our arguments, and whatever runs as ours can read the environment that we
// were started with: from now on neither has the keys in it.
void HideKeys(const std::vector<std::string>& keys, char** argv) {
  for (char** arg = argv + 1; *arg != nullptr; ++arg) {
    const std::string_view text = *arg;
    for (const std::string& key : keys) {
      if (key.empty() || (text != key && !text.ends_with("=" + key))) continue;
      Hide(*arg + text.size() - key.size(), key.size());
      break;
    }
  }
  if (char* value = ::getenv("FD_API_KEY"); value != nullptr) Hide(value, std::strlen(value));
}

int Main(int argc, char** argv) {
  OpenMissingStandardStreams();
  absl::StatusOr<UniqueFd> loading_fd = TakeLoadingFd();
  if (!loading_fd.ok()) return Fail(loading_fd.status());
  BlockSupervisedSignals();
  CommandLine command = ParseCommandLine({argv + 1, argv + argc}, ::getenv);
  if (!command.error.empty()) fmt::print(stderr, "{}\n", command.error);
  if (!command.print.empty()) fmt::print("{}", command.print);
  if (!command.program.empty()) {
    return Fail(kExitInternal, BecomeSibling(command.program, std::move(command.program_args)));
  }
  if (!command.verb.has_value()) return command.exit_code;
  HideKeys(command.options.api_keys, argv);
  return RunInstance(std::move(command), *std::move(loading_fd));
}

}  // namespace
}  // namespace wintserve

int main(int argc, char** argv) { return wintserve::Main(argc, argv); }
