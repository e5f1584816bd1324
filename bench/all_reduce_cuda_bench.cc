// All-reduces between GPUs, one thread a rank: one exchange through the peers' memory, the same in
// two exchanges, NCCL, and what the engine worker chooses. Each time is that of a replayed graph of
// 50 of them, over 50: as they follow each other in a decoding step.
//   build/cuda/bench/all_reduce_cuda_bench [RANKS]
#include <fmt/format.h>

#include <algorithm>
#include <barrier>
#include <cstdlib>
#include <functional>
#include <thread>
#include <utility>
#include <vector>

#include "common/check.h"
#include "engine_worker/collectives/nccl/nccl_collective.h"
#include "kernels/cuda/collective/peer_memory.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/handles.h"

namespace wintserve {
namespace {

using kernels::cuda::DeviceBuffer;
using kernels::cuda::kPeerSlotBytes;
using kernels::cuda::PeerMemory;

constexpr int kOperations = 50;
constexpr int kReplays = 40;
constexpr int64_t kMaxBytes = int64_t{16} << 20;

template <typename T>
T Must(absl::StatusOr<T> value) {
  CHECK(value.ok(), "{}", value.status().ToString());
  return *std::move(value);
}

// What the ranks' threads share.
struct Bench {
  explicit Bench(int num_ranks) : world_size(num_ranks), barrier(num_ranks), handles(num_ranks) {}

  const int world_size;
  std::barrier<> barrier;
  std::vector<kernels::cuda::PeerHandle> handles;
  std::shared_ptr<MappedMemory> memory;         // of the group that has NCCL alone
  std::shared_ptr<MappedMemory> chosen_memory;  // of the other
};

// Median time of one operation, the slowest rank's not known to the others: they wait for it.
double MicrosecondsOf(Bench& bench, cudaStream_t stream, const std::function<void()>& operation) {
  cudaGraph_t graph = nullptr;
  CUDA_CALL(cudaStreamBeginCapture, stream, cudaStreamCaptureModeThreadLocal);
  for (int i = 0; i < kOperations; ++i) operation();
  CUDA_CALL(cudaStreamEndCapture, stream, &graph);
  cudaGraphExec_t replay = nullptr;
  CUDA_CALL(cudaGraphInstantiate, &replay, graph, 0ull);
  const kernels::cuda::Event begin =
      Must(kernels::cuda::CreateEvent(kernels::cuda::EventTiming::kOn));
  const kernels::cuda::Event end =
      Must(kernels::cuda::CreateEvent(kernels::cuda::EventTiming::kOn));
  std::vector<double> times;
  for (int i = 0; i < kReplays; ++i) {
    bench.barrier.arrive_and_wait();
    CUDA_CALL(cudaEventRecord, begin.get(), stream);
    CUDA_CALL(cudaGraphLaunch, replay, stream);
    CUDA_CALL(cudaEventRecord, end.get(), stream);
    CUDA_CALL(cudaEventSynchronize, end.get());
    float milliseconds = 0;
    CUDA_CALL(cudaEventElapsedTime, &milliseconds, begin.get(), end.get());
    times.push_back(double{milliseconds} * 1000 / kOperations);
  }
  CUDA_CALL(cudaGraphExecDestroy, replay);
  CUDA_CALL(cudaGraphDestroy, graph);
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

void RunRank(Bench& bench, int rank) {
  const auto device = Must(kernels::cuda::UseDevice(rank));
  const kernels::cuda::Stream stream = Must(kernels::cuda::CreateStream());
  const DeviceBuffer data = Must(DeviceBuffer::Allocate(kMaxBytes));
  CUDA_CALL(cudaMemset, data.data(), 0, static_cast<size_t>(kMaxBytes));
  const auto peers = Must(PeerMemory::Create(rank, bench.world_size));
  bench.handles[rank] = peers->handle();
  bench.barrier.arrive_and_wait();
  CHECK(peers->Open(bench.handles).ok());
  auto control = Must(ShmCollective::Create(bench.memory, {.group_epoch = 1,
                                                           .rank = rank,
                                                           .world_size = bench.world_size,
                                                           .slot_bytes = kNcclControlSlotBytes}));
  const auto nccl = Must(
      NcclCollective::Create(std::move(control), {.stream = stream.get(), .max_peer_bytes = 0}));
  // As the engine worker does it, which chooses by size.
  auto chosen_control =
      Must(ShmCollective::Create(bench.chosen_memory, {.group_epoch = 2,
                                                       .rank = rank,
                                                       .world_size = bench.world_size,
                                                       .slot_bytes = kNcclControlSlotBytes}));
  const auto chosen =
      Must(NcclCollective::Create(std::move(chosen_control), {.stream = stream.get()}));
  if (rank == 0) {
    fmt::print("{} x {}; NCCL {}; us an all-reduce of float32\n", bench.world_size, device.name,
               NcclVersion());
    fmt::print("{:>10} {:>10} {:>10} {:>10} {:>10}\n", "bytes", "one-shot", "two-shot", "NCCL",
               "chosen");
  }
  float* const floats = data.data<float>();
  for (int64_t bytes = 4 << 10; bytes <= kMaxBytes; bytes *= 2) {
    const int64_t count = bytes / static_cast<int64_t>(sizeof(float));
    double one_shot = 0;
    double two_shot = 0;
    if (bytes <= kPeerSlotBytes) {
      one_shot = MicrosecondsOf(bench, stream.get(), [&] {
        kernels::cuda::LaunchPeerAllReduce(peers->group(), floats, count, stream.get());
      });
    }
    if (bytes <= bench.world_size * kPeerSlotBytes) {
      two_shot = MicrosecondsOf(bench, stream.get(), [&] {
        kernels::cuda::LaunchPeerTwoShotAllReduce(peers->group(), floats, count, stream.get());
      });
    }
    const double by_nccl =
        MicrosecondsOf(bench, stream.get(), [&] { CHECK(nccl->AllReduceSum(floats, count).ok()); });
    const double by_size = MicrosecondsOf(bench, stream.get(),
                                          [&] { CHECK(chosen->AllReduceSum(floats, count).ok()); });
    if (rank != 0) continue;
    const auto column = [](double us) { return us == 0 ? "-" : fmt::format("{:.2f}", us); };
    fmt::print("{:>10} {:>10} {:>10} {:>10} {:>10}\n", bytes, column(one_shot), column(two_shot),
               column(by_nccl), column(by_size));
  }
  bench.barrier.arrive_and_wait();
}

}  // namespace
}  // namespace wintserve

int main(int argc, char** argv) {
  using namespace wintserve;
  const int num_gpus = kernels::cuda::NumVisibleDevices();
  const int world_size = argc > 1 ? std::atoi(argv[1]) : 2;
  if (argc > 2 || world_size < 2 || world_size > std::min(num_gpus, kernels::cuda::kMaxPeerRanks)) {
    fmt::print(stderr,
               "usage: all_reduce_cuda_bench [RANKS]; RANKS: 2 … {}, and {} GPUs are here\n",
               kernels::cuda::kMaxPeerRanks, num_gpus);
    return 64;
  }
  Bench bench(world_size);
  for (auto* memory : {&bench.memory, &bench.chosen_memory}) {
    *memory = std::make_shared<MappedMemory>(Must(MappedMemory::Create(
        "all_reduce_cuda_bench", ShmGroupMemoryBytes(world_size, kNcclControlSlotBytes))));
  }
  std::vector<std::thread> ranks;
  for (int rank = 0; rank < world_size; ++rank) {
    ranks.emplace_back([&, rank] { RunRank(bench, rank); });
  }
  for (std::thread& rank : ranks) rank.join();
  return 0;
}
