// One rank: loads its slice of the weights, attaches to the API server, executes plans.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>

#include "api_server/work_queue/client/work_queue_client.h"
#include "cache_manager/client/pool_memory_client.h"
#include "common/config/instance.h"
#include "common/exit_code.h"
#include "common/heap.h"
#include "common/log.h"
#include "common/start_pulse.h"
#include "common/status_macros.h"
#include "common/transport/queue_transport.h"
#include "engine_worker/collectives/rank_group.h"
#include "engine_worker/runner/join_group.h"
#include "engine_worker/runner/load_model.h"
#include "engine_worker/runner/stall_watch.h"
#include "engine_worker/runner/stop_signal.h"
#include "engine_worker/runner/worker.h"
#include "launcher/client/load_reporter.h"

namespace wintserve {
namespace {

constexpr int64_t kAttachTimeoutMs = 60'000;
constexpr int64_t kMemoryTimeoutMs = 30'000;
constexpr int64_t kStopPatienceMs = 2'000;
// An API server that is stopped with its workers may go before their signals come.
constexpr std::chrono::milliseconds kStopSkew(1'000);

uint64_t RandomId() {
  std::random_device random;
  return uint64_t{random()} << 32 | random();
}

WorkerHello MakeHello(const Instance& instance, const LoadedModel& loaded) {
  const ServeOptions& options = instance.options;
  const Model& model = *loaded.model;
  WorkerHello hello;
  hello.worker_id = instance.worker_id != 0 ? instance.worker_id : RandomId();
  hello.rank = instance.rank;
  hello.world_size = options.tensor_parallel_size;
  hello.backend = options.device;
  hello.weights_digest = model.weights_digest();
  hello.kv_layout_digest = model.kv_layout_digest();
  hello.kv_block_bytes = model.kv_block_bytes();
  hello.kv_bytes_available = loaded.kv_bytes_available;
  hello.max_slots = options.max_num_seqs;
  hello.max_tokens = std::max(options.max_num_batched_tokens, options.max_model_len);
  hello.vocab_size = model.vocab_size();
  hello.num_layers = model.num_layers();
  hello.max_position = model.max_position();
  hello.block_size_tokens = options.block_size;
  return hello;
}

absl::StatusOr<std::unique_ptr<WorkQueueClient>> Attach(const Instance& instance,
                                                        const WorkerHello& hello,
                                                        int64_t timeout_ms) {
  return WorkQueueClient::Attach("unix:" + instance.work_queue_socket(), instance.token, hello,
                                 timeout_ms);
}

WorkerLinks LinksOf(const Instance& instance, const LoadedModel& loaded, const WorkerHello& hello,
                    RankGroup* group) {
  const auto fetch = [&instance](const AttachPool& attach, PoolTier tier) {
    return FetchPoolMemory(attach.memory_socket, instance.token, attach.pool_epoch, instance.rank,
                           tier, kMemoryTimeoutMs);
  };
  return {
      .join_group =
          [&instance, &loaded, group](const ConfigureWorker& configure) {
            return JoinGroup({.supervisor_socket = instance.supervisor_socket(),
                              .token = instance.token,
                              .group_epoch = configure.group_epoch,
                              .rank = instance.rank,
                              .world_size = static_cast<int>(configure.world_size)},
                             *loaded.backend, [group](std::function<void()> abort) {
                               group->SetJoinAbort(std::move(abort));
                             });
          },
      .fetch_pool = [fetch](const AttachPool& attach) { return fetch(attach, PoolTier::kDevice); },
      .fetch_host_tier =
          [fetch](const AttachPool& attach) { return fetch(attach, PoolTier::kHost); },
      .attach_again =
          [&instance, hello](uint64_t mapped_pool_epoch, int64_t timeout_ms) {
            WorkerHello again = hello;
            again.mapped_pool_epoch = mapped_pool_epoch;
            return Attach(instance, again, timeout_ms);
          }};
}

int Fail(const absl::Status& status, ExitCode code) {
  LOG_ERROR("{}", std::string(status.message()));
  return code;
}

// Loading may take as long as the disks need, but has to get further: a process that hangs there
// would be waited for for ever, since the API server does not know of it yet.
absl::StatusOr<LoadedModel> LoadWatched(const Instance& instance, RankGroup* group) {
  const int64_t timeout_ms = instance.options.stall_timeout_ms;
  std::atomic<uint64_t> num_loaded = 0;
  const StallWatch watch(
      timeout_ms, [&] { return num_loaded + DiskProgress(); },
      [&] {
        LOG_ERROR(
            "loading {} has got no further for {} s (--stall-timeout), after {} tensors: the "
            "process ends, for another to try again",
            instance.options.model, static_cast<double>(timeout_ms) / 1e3, num_loaded.load());
        std::_Exit(kExitInternal);  // what hangs cannot be waited for
      });
  LoadReporter reporter({.supervisor_socket = instance.supervisor_socket(),
                         .token = instance.token,
                         .rank = static_cast<uint32_t>(instance.rank),
                         .worker_id = instance.worker_id});
  return LoadModel(instance.options, group, instance.restarted,
                   {.on_progress = [&] { ++num_loaded; },
                    .on_bytes = [&](int64_t done, int64_t total) { reporter.Set(done, total); }});
}

int RunEngineWorker(const Instance& instance, StopSignal& stop) {
  InitLog(fmt::format("engine_worker.{}", instance.rank), instance.options.log_level);
  InitGrpcLog();
  StartPulse start(instance.start_fd);
  ReturnLargePiecesAtOnce();  // while it loads, the worker unpacks one matrix after the other
  RankGroup group(instance.rank, instance.options.tensor_parallel_size);
  absl::StatusOr<LoadedModel> loaded = LoadWatched(instance, &group);
  if (!loaded.ok()) {
    const bool device_is_at_fault =
        absl::IsUnavailable(loaded.status()) || absl::IsResourceExhausted(loaded.status());
    return Fail(loaded.status(), device_is_at_fault ? kExitUnavailable : kExitCheckpoint);
  }
  const WorkerHello hello = MakeHello(instance, *loaded);
  const absl::StatusOr<std::unique_ptr<WorkQueueClient>> queue =
      Attach(instance, hello, kAttachTimeoutMs);
  if (!queue.ok()) {
    if (absl::IsUnavailable(queue.status())) std::this_thread::sleep_for(kStopSkew);
    return Fail(queue.status(), kExitInternal);
  }
  start.Started();  // from here on the API server notices when it hangs

  Worker worker(loaded->model.get(), &group, queue->get(),
                LinksOf(instance, *loaded, hello, &group),
                {.use_graphs = instance.options.use_cudagraph,
                 .orphan_timeout_ms = instance.options.orphan_timeout_ms});
  stop.SetHandler([&worker] {
    if (worker.RequestStop(kStopPatienceMs)) return;
    LOG_INFO("stopped before it was ready");
    std::_Exit(kExitOk);
  });
  const absl::Status status = worker.Run();
  stop.SetHandler(nullptr);
  if (!status.ok()) return Fail(status, kExitInternal);
  LOG_INFO("stopped");
  return kExitOk;
}

}  // namespace
}  // namespace wintserve

int main(int argc, char** argv) {
  // NCCL would have NVLink's switches add up where it may, in an order of their own. Here, because
  // other threads may read the environment later.
  ::setenv("NCCL_NVLS_ENABLE", "0", /*overwrite=*/0);
  wintserve::StopSignal stop;
  const absl::StatusOr<wintserve::Instance> instance = wintserve::InstanceFromArgv(argc, argv);
  if (!instance.ok()) {
    std::fprintf(stderr, "%s\n", std::string(instance.status().message()).c_str());
    return wintserve::kExitUsage;
  }
  return wintserve::RunEngineWorker(*instance, stop);
}
