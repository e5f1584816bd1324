// wintserve-cache-manager: the process that owns the KV pool. Started by the launcher.
#include <fmt/format.h>
#include <signal.h>

#include <memory>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "cache_manager/memory/gpu_pool_memory.h"
#include "cache_manager/memory/host_pool_memory.h"
#include "cache_manager/memory/memory_server.h"
#include "cache_manager/memory/pool_memory.h"
#include "cache_manager/service/cache_server.h"
#include "cache_manager/service/pool_owner.h"
#include "common/config/instance.h"
#include "common/exit_code.h"
#include "common/heap.h"
#include "common/log.h"
#include "common/start_pulse.h"
#include "common/status_macros.h"
#include "common/transport/queue_transport.h"
#include "common/unix_socket.h"
#ifdef WINTSERVE_HAS_CUDA
#include "cache_manager/memory/cuda_driver.h"
#endif

namespace wintserve {
namespace {

int ExitWith(ExitCode code, const absl::Status& status) {
  LOG_ERROR("{}", std::string(status.message()));
  return code;
}

// Of memory of the host, or of the GPUs that the workers compute on: rank r's is the r-th that this
// process sees, as it is for the workers, which are started alike.
absl::StatusOr<PoolMemoryMaker> MemoryMakerOf(const ServeOptions& options) {
  if (options.device == "cpu") return &HostPoolMemory::Create;
#ifdef WINTSERVE_HAS_CUDA
  // Now, not when the pool is made: a session must not wait for the driver, nor a user for weights
  // that are loaded in vain.
  ASSIGN_OR_RETURN(std::shared_ptr<GpuDriver> driver, LoadCudaDriver());
  for (int rank = 0; rank < options.tensor_parallel_size; ++rank) {
    RETURN_IF_ERROR(CheckGpu(driver.get(), rank).status());
  }
  return [driver](const PoolSize& size, int64_t available_bytes) {
    return GpuPoolMemory::Create(size, available_bytes, driver.get());
  };
#else
  return absl::UnavailableError(
      fmt::format("--device {}: this build has no memory of it", options.device));
#endif
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
  InitGrpcLog();
  StartPulse start(instance->start_fd);
  const HeapTrimmer heap_trimmer;

  auto make_memory = MemoryMakerOf(instance->options);
  if (!make_memory.ok()) return ExitWith(kExitUnavailable, make_memory.status());
  if (const absl::Status status = CheckPrivateDirectory(instance->runtime_dir); !status.ok()) {
    return ExitWith(kExitUnavailable, status);
  }
  const auto tls = LoadTlsIdentity(QueueTlsFiles(instance->options));
  if (!tls.ok()) return ExitWith(kExitUsage, tls.status());
  const auto memory_server = MemoryServer::Start(instance->memory_socket(), instance->token);
  if (!memory_server.ok()) return ExitWith(kExitUnavailable, memory_server.status());
  // Beside the sockets, so that it goes with the instance.
  PoolOwner owner(memory_server->get(), instance->runtime_dir + "/host_bytes",
                  *std::move(make_memory));
  const auto cache_server = CacheServer::Start({.host = instance->options.queue_host,
                                                .port = instance->options.cache_queue_port,
                                                .unix_path = instance->cache_socket(),
                                                .tls = *tls,
                                                .token = instance->token},
                                               &owner);
  if (!cache_server.ok()) return ExitWith(kExitUnavailable, cache_server.status());
  start.Started();
  LOG_INFO("listening on {}:{}{} and {}", instance->options.queue_host, (*cache_server)->port(),
           tls->enabled() ? " (TLS)" : "", instance->cache_socket());

  int signal = 0;
  sigwait(&stop_signals, &signal);
  LOG_INFO("stopping on {}", signal == SIGTERM ? "SIGTERM" : "SIGINT");
  return kExitOk;
}

}  // namespace
}  // namespace wintserve

int main(int argc, char** argv) { return wintserve::Main(argc, argv); }
