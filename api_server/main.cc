// wintserve-api-server: the process that owns requests. Started by the launcher.
#include <fmt/format.h>
#include <prometheus/registry.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "api_server/http/http_server.h"
#include "api_server/llm/create_llm.h"
#include "api_server/llm/offline.h"
#include "common/config/instance.h"
#include "common/descriptor_shares.h"
#include "common/exit_code.h"
#include "common/heap.h"
#include "common/log.h"
#include "common/start_pulse.h"
#include "common/transport/queue_transport.h"
#include "common/unix_socket.h"
#include "launcher/client/supervisor_client.h"
#include "launcher/client/worker_watch.h"

namespace wintserve {
namespace {

// What the engine's thread tells the main thread, which waits for signals and nothing else.
constexpr int kReadySignal = SIGUSR1;
constexpr int kFatalSignal = SIGUSR2;

// Beside those whose requests are answered: of clients that keep theirs open, and of probes.
constexpr int64_t kOtherConnections = 4096;

sigset_t AwaitedSignals() {
  sigset_t signals;
  sigemptyset(&signals);
  for (int signal : {SIGTERM, SIGINT, kReadySignal, kFatalSignal}) sigaddset(&signals, signal);
  return signals;
}

int NextSignal() {
  const sigset_t signals = AwaitedSignals();
  int signal = 0;
  sigwait(&signals, &signal);
  return signal;
}

bool SignalIsPending() {
  const sigset_t signals = AwaitedSignals();
  const timespec now = {};
  return sigtimedwait(&signals, nullptr, &now) > 0;
}

int ExitCodeFor(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kNotFound:
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kDataLoss:
      return kExitCheckpoint;
    case absl::StatusCode::kUnavailable:
      return kExitUnavailable;
    default:
      return kExitInternal;
  }
}

int Fail(const absl::Status& status) {
  LOG_ERROR("{}", std::string(status.message()));
  return ExitCodeFor(status);
}

// The engine fails every request: lets the errors reach the clients that read.
void WriteErrors(HttpServer* server) {
  constexpr std::chrono::milliseconds kTimeout{1'000};
  server->StopAccepting();
  server->WaitUntilIdle(kTimeout);
}

// Lets open streams finish. A further signal ends the wait, and those that are left get an error.
int Drain(HttpServer* server, LLM* llm, std::chrono::milliseconds timeout) {
  constexpr std::chrono::milliseconds kLookForSignal{50};
  server->StopAccepting();
  const auto deadline = std::chrono::steady_clock::now() + timeout;
  while (!server->WaitUntilIdle(kLookForSignal)) {
    if (SignalIsPending() || std::chrono::steady_clock::now() >= deadline) {
      llm->Stop();
      WriteErrors(server);
      return kExitDrainTimeout;
    }
  }
  return kExitOk;
}

int Serve(const Instance& instance, LLM* llm, std::shared_ptr<prometheus::Registry> registry,
          StartPulse* start) {
  const ServeOptions& options = instance.options;
  HttpOptions http;
  http.listen_fd = instance.http_fd;
  http.metrics_fd = instance.metrics_fd;
  http.api_keys = options.api_keys;
  http.model_names = {options.served_model_name, options.strict_model_name};
  http.max_concurrency = options.max_concurrency;
  http.max_connections = static_cast<int>(
      std::min<int64_t>(OwnDescriptorShares().http, options.max_concurrency + kOtherConnections));
  http.isolate_cache_by_key = options.cache_isolation == "key";
  http.client_stall_timeout = std::chrono::milliseconds(options.client_stall_timeout_ms);
  const auto server = HttpServer::Start(std::move(http), llm, std::move(registry));
  if (!server.ok()) return Fail(server.status());
  start->Started();
  LogStartupLines(options.host, options.port, options.metrics_port.value_or(options.port));

  bool was_ready = false;
  while (true) {
    const int signal = NextSignal();
    if (signal == kReadySignal) {
      if (!std::exchange(was_ready, true)) LogStartupComplete();
    } else if (signal == kFatalSignal) {
      WriteErrors(server->get());
      return was_ready ? kExitInternal : kExitNeverReady;  // the engine has said why
    } else {
      return Drain(server->get(), llm, std::chrono::milliseconds(options.drain_timeout_ms));
    }
  }
}

int Generate(const Instance& instance, LLM* llm) {
  switch (NextSignal()) {
    case kReadySignal:
      break;
    case kFatalSignal:
      return kExitInternal;
    default:
      return kExitOk;
  }
  const absl::Status status = GenerateOffline(llm, instance.generate_json);
  if (status.ok()) return kExitOk;
  LOG_ERROR("{}", std::string(status.message()));
  return absl::IsInvalidArgument(status) ? kExitUsage : kExitInternal;
}

void RestartCacheManager(const Instance& instance) {
  constexpr int64_t kTimeoutMs = 2'000;
  const absl::Status status =
      RequestCacheManagerRestart(instance.supervisor_socket(), instance.token, kTimeoutMs);
  if (!status.ok()) LOG_WARNING("{}", std::string(status.message()));
}

std::string TextOf(const WorkerExitNotice& notice) {
  if (notice.signal == 0) return fmt::format("exited with code {}", notice.code);
  return fmt::format("was ended by signal {}", notice.signal);
}

// The launcher's news of the engine workers' processes, as the engine wants them.
class LaunchedWorkers : public WorkerProcesses {
 public:
  LaunchedWorkers(const Instance& instance, WorkerProcessEvents events)
      : watch_(instance.supervisor_socket(), instance.token,
               {.on_watching = std::move(events.on_watching),
                .on_exit = [on_exit = std::move(events.on_exit)](const WorkerExitNotice& notice) {
                  on_exit(notice.rank, notice.worker_id, notice.kv_trusted, TextOf(notice));
                }}) {}
  void End(uint32_t rank, uint64_t worker_id, bool at_fault) override {
    watch_.EndWorker(rank, worker_id, at_fault);
  }

 private:
  WorkerWatch watch_;
};

int Main(int argc, char** argv) {
  // Blocked before the first thread exists, so that every thread inherits it and only the main
  // thread's waits see them.
  const sigset_t signals = AwaitedSignals();
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  signal(SIGPIPE, SIG_IGN);

  const auto instance = InstanceFromArgv(argc, argv);
  if (!instance.ok()) {
    fmt::print(stderr, "{}\n", std::string(instance.status().message()));
    return kExitUsage;
  }
  InitLog("api_server", instance->options.log_level);
  InitGrpcLog();
  StartPulse start(instance->start_fd);
  const HeapTrimmer heap_trimmer;
  if (const absl::Status status = CheckPrivateDirectory(instance->runtime_dir); !status.ok()) {
    return Fail(status);
  }
  auto queue_tls = LoadTlsIdentity(QueueTlsFiles(instance->options));
  if (!queue_tls.ok()) return Fail(queue_tls.status());

  const auto registry = std::make_shared<prometheus::Registry>();
  LlmOptions llm_options = LlmOptionsFor(*instance);
  llm_options.queue_tls = *std::move(queue_tls);
  llm_options.on_cache_hang = [&instance = *instance] { RestartCacheManager(instance); };
  llm_options.watch_workers = [&instance = *instance](WorkerProcessEvents events) {
    return std::make_unique<LaunchedWorkers>(instance, std::move(events));
  };
  llm_options.on_ready = [] { kill(getpid(), kReadySignal); };
  llm_options.on_fatal = [](const std::string&) { kill(getpid(), kFatalSignal); };
  const auto llm = CreateLlm(std::move(llm_options), registry);
  if (!llm.ok()) return Fail(llm.status());
  if (instance->mode != "generate") return Serve(*instance, llm->get(), registry, &start);
  start.Started();
  // A terminal may be set to stop who writes there in the background, where the launcher's children
  // are.
  ::signal(SIGTTOU, SIG_IGN);
  return Generate(*instance, llm->get());
}

}  // namespace
}  // namespace wintserve

int main(int argc, char** argv) { return wintserve::Main(argc, argv); }
