// The `wintserve` command.
#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

#include "common/config/command_line.h"
#include "common/config/serve_options_json.h"
#include "common/exit_code.h"
#include "common/log.h"
#include "launcher/child.h"
#include "launcher/instance_log.h"
#include "launcher/instance_token.h"
#include "launcher/preflight.h"
#include "launcher/runtime_dir.h"
#include "launcher/supervisor.h"

namespace wintserve {
namespace {

int Fail(int exit_code, const std::string& text) {
  fmt::print(stderr, "error: {}\n", text);
  return exit_code;
}

std::vector<std::string> LogNames(const ServeOptions& options) {
  std::vector<std::string> names = {kLauncherLogName, LogNameOf(ChildRole::kApiServer, 0),
                                    LogNameOf(ChildRole::kCacheManager, 0)};
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

int RunInstance(CommandLine command) {
  InitLog(kLauncherLogName, command.options.log_level);
  for (const std::string& note : command.notes) LOG_WARNING("{}", note);

  PreflightError error = CheckModelAndDevice(command.options);
  if (!error.ok()) return Fail(error.exit_code, error.text);
  if (command.verb == Verb::kServe) {
    const std::string warning = RaiseDescriptorLimit(command.options);
    if (!warning.empty()) LOG_WARNING("{}", warning);
  }
  std::vector<std::string> warnings;
  error = CheckQueueTls(command.options, &warnings);
  if (!error.ok()) return Fail(error.exit_code, error.text);
  std::string token_warning;
  auto token = MakeInstanceToken(command.options, &token_warning);
  if (!token.ok()) return Fail(kExitUsage, std::string(token.status().message()));
  if (!token_warning.empty()) warnings.push_back(std::move(token_warning));
  for (const std::string& warning : warnings) LOG_WARNING("{}", warning);
  Instance instance;
  instance.options = std::move(command.options);
  ReservedPorts ports;
  error = ReservePorts(command.verb == Verb::kServe, &instance.options, &ports);
  if (!error.ok()) return Fail(error.exit_code, error.text);
  const auto runtime_dir = RuntimeDir::Create();
  if (!runtime_dir.ok()) {
    return Fail(kExitInternal, std::string(runtime_dir.status().message()));
  }
  instance.runtime_dir = runtime_dir->path();
  instance.token = *std::move(token);
  if (command.verb == Verb::kGenerate) {
    instance.mode = "generate";
    instance.generate_json = command.generate.ToJson();
  }
  auto server = SupervisorServer::Listen(instance.supervisor_socket(), instance.token);
  if (!server.ok()) return Fail(kExitInternal, std::string(server.status().message()));
  const std::string effective_config = EffectiveConfig(instance.options);
  if (command.verb == Verb::kGenerate) {
    LOG_INFO("effective config: {}", effective_config);
    // The answer goes to stdout as it is.
    return Supervisor(std::move(instance), std::move(ports), *std::move(server), nullptr).Run();
  }
  auto log = InstanceLog::Open(instance.options.log_dir, LogNames(instance.options));
  if (!log.ok()) return Fail(kExitUsage, std::string(log.status().message()));
  const std::string level = instance.options.log_level;
  InitLog(kLauncherLogName, level, [&log](std::string_view line) { log->WriteOwn(line); });
  LOG_INFO("effective config: {}", effective_config);
  const int exit_code =
      Supervisor(std::move(instance), std::move(ports), *std::move(server), &*log).Run();
  InitLog(kLauncherLogName, level);
  return exit_code;
}

int Main(int argc, char** argv) {
  OpenMissingStandardStreams();
  BlockSupervisedSignals();
  CommandLine command = ParseCommandLine({argv + 1, argv + argc}, ::getenv);
  if (!command.error.empty()) fmt::print(stderr, "{}\n", command.error);
  if (!command.print.empty()) fmt::print("{}", command.print);
  if (!command.verb.has_value()) return command.exit_code;
  return RunInstance(std::move(command));
}

}  // namespace
}  // namespace wintserve

int main(int argc, char** argv) { return wintserve::Main(argc, argv); }
