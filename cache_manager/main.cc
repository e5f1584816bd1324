// wintserve-cache-manager: the process that owns the KV pool. Started by the launcher.
#include <fmt/format.h>
#include <grpc/support/log.h>
#include <signal.h>

#include <string>

#include "absl/status/status.h"
#include "cache_manager/memory/memory_server.h"
#include "cache_manager/service/cache_server.h"
#include "cache_manager/service/pool_owner.h"
#include "common/config/instance.h"
#include "common/exit_code.h"
#include "common/heap.h"
#include "common/log.h"

namespace wintserve {
namespace {

// What goes wrong is reported by us, in one line; gRPC's own account is for debugging.
void LogGrpcMessage(gpr_log_func_args* args) { LOG_DEBUG("grpc: {}", args->message); }

int ExitWith(ExitCode code, const absl::Status& status) {
  LOG_ERROR("{}", std::string(status.message()));
  return code;
}

int Main(int argc, char** argv) {
  // Blocked before the first thread exists, so that every thread inherits it and only sigwait sees
  // them.
  sigset_t stop_signals;
  sigemptyset(&stop_signals);
  sigaddset(&stop_signals, SIGTERM);
  sigaddset(&stop_signals, SIGINT);
  pthread_sigmask(SIG_BLOCK, &stop_signals, nullptr);

  const auto instance = InstanceFromArgv(argc, argv);
  if (!instance.ok()) {
    fmt::print(stderr, "{}\n", std::string(instance.status().message()));
    return kExitUsage;
  }
  InitLog("cache_manager", instance->options.log_level);
  gpr_set_log_function(LogGrpcMessage);
  const HeapTrimmer heap_trimmer;

  const auto memory_server = MemoryServer::Start(instance->memory_socket(), instance->token);
  if (!memory_server.ok()) return ExitWith(kExitUnavailable, memory_server.status());
  // Beside the sockets, so that it goes with the instance.
  PoolOwner owner(memory_server->get(), instance->runtime_dir + "/host_bytes");
  const auto cache_server = CacheServer::Start({.host = "127.0.0.1",
                                                .port = instance->options.cache_queue_port,
                                                .unix_path = instance->cache_socket(),
                                                .token = instance->token},
                                               &owner);
  if (!cache_server.ok()) return ExitWith(kExitUnavailable, cache_server.status());
  LOG_INFO("listening on 127.0.0.1:{} and {}", (*cache_server)->port(), instance->cache_socket());

  int signal = 0;
  sigwait(&stop_signals, &signal);
  LOG_INFO("stopping on {}", signal == SIGTERM ? "SIGTERM" : "SIGINT");
  return kExitOk;
}

}  // namespace
}  // namespace wintserve

int main(int argc, char** argv) { return wintserve::Main(argc, argv); }
