// Time of one collective between forked processes: p50 and p99 over all calls of rank 0.
//   build/cpu/bench/shm_collective_bench
#include <benchmark/benchmark.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <vector>

#include "common/check.h"
#include "engine_worker/collectives/shm/shm_collective.h"

namespace wintserve {
namespace {

constexpr int64_t kSlotBytes = 512 << 10;

std::unique_ptr<ShmCollective> Join(const std::shared_ptr<MappedMemory>& memory, int rank,
                                    int world_size) {
  auto collective = ShmCollective::Create(
      memory, {.group_epoch = 1, .rank = rank, .world_size = world_size, .slot_bytes = kSlotBytes});
  CHECK(collective.ok(), "{}", collective.status().ToString());
  return *std::move(collective);
}

void AllReduceSum(benchmark::State& state) {
  const int world_size = static_cast<int>(state.range(0));
  const int64_t count = state.range(1);
  auto created =
      MappedMemory::Create("shm_collective_bench", ShmGroupMemoryBytes(world_size, kSlotBytes));
  CHECK(created.ok());
  const auto memory = std::make_shared<MappedMemory>(*std::move(created));
  std::vector<float> data(count, 0.0f);
  std::vector<pid_t> children;
  for (int rank = 1; rank < world_size; ++rank) {
    children.push_back(::fork());
    if (children.back() == 0) {
      const auto collective = Join(memory, rank, world_size);
      while (collective->AllReduceSum(data.data(), count).ok()) {
      }
      ::_exit(0);
    }
  }
  std::vector<double> us;
  {
    const auto collective = Join(memory, 0, world_size);
    for (auto _ : state) {
      const auto begin = std::chrono::steady_clock::now();
      CHECK(collective->AllReduceSum(data.data(), count).ok());
      us.push_back(
          std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin)
              .count());
    }
  }
  for (const pid_t child : children) ::waitpid(child, nullptr, 0);
  std::sort(us.begin(), us.end());
  state.counters["p50_us"] = us[us.size() / 2];
  state.counters["p99_us"] = us[us.size() * 99 / 100];
}
BENCHMARK(AllReduceSum)
    ->ArgNames({"ranks", "floats"})
    ->ArgsProduct({{2, 4}, {384, 8192, 98304}})
    ->UseRealTime();

}  // namespace
}  // namespace wintserve

BENCHMARK_MAIN();
