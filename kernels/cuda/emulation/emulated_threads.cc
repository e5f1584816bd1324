#include "kernels/cuda/emulation/emulated_threads.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <random>
#include <utility>

#include "common/check.h"

namespace wintserve::kernels::cuda {
namespace emulation {
namespace {

constexpr size_t kStackBytes = 256 * 1024;

Cluster* current_cluster = nullptr;

__attribute__((noinline)) void Resume(Cluster* cluster, Thread* t) {
  running = t;
  if (_setjmp(cluster->scheduler) != 0) return;
  if (t->started) _longjmp(t->place, 1);
  t->started = true;
  setcontext(&t->start);
}

__attribute__((noinline)) void Yield(Thread* t) {
  if (_setjmp(t->place) == 0) _longjmp(t->block->cluster->scheduler, 1);
}

void RunThread() {
  (*current_cluster->kernel)();
  ++current_cluster->num_ended;
  Yield(running);
}

// Kept for the launches to come.
char* StackOf(size_t number) {
  static auto* const stacks = new std::vector<std::unique_ptr<char[]>>;
  while (stacks->size() <= number) stacks->emplace_back(new char[kStackBytes]);
  return (*stacks)[number].get();
}

void Prepare(Thread* t, size_t number) {
  CHECK(t->open_copies.empty(), "block {} thread {} ended between a copy and its commit",
        t->block->index, t->index);
  CHECK(t->held.empty(), "block {} thread {} ended before its wgmma", t->block->index, t->index);
  t->started = false;
  t->copy_groups.clear();
  CHECK(getcontext(&t->start) == 0);
  t->start.uc_stack.ss_sp = StackOf(number);
  // Stacks that end at the same place of a page would share few lines of the cache.
  t->start.uc_stack.ss_size = kStackBytes - number % 64 * 1088;
  t->start.uc_link = nullptr;
  makecontext(&t->start, RunThread, 0);
}

// All threads of the cluster's blocks.
void RunCluster(Cluster* cluster) {
  cluster->num_ended = 0;
  for (Block& b : cluster->blocks) {
    for (Thread& t : b.threads) {
      Prepare(&t, cluster->runnable.size());
      cluster->runnable.push_back(&t);
    }
  }
  const size_t num_threads = cluster->runnable.size();
  while (!cluster->runnable.empty()) {
    Threads& runnable = cluster->runnable;
    std::swap(runnable[Draw(cluster, runnable.size())], runnable.back());
    Thread* const next = runnable.back();
    runnable.pop_back();
    Resume(cluster, next);
  }
  CHECK(cluster->num_ended == static_cast<int>(num_threads),
        "block {}: {} of {} threads ended, {} stand at a barrier, {} at one of the cluster, the "
        "rest wait for their warps or at barriers in shared memory",
        cluster->blocks[0].index, cluster->num_ended, num_threads,
        cluster->blocks[0].at_barrier.size(), cluster->at_barrier.size());
}

}  // namespace

void WaitIn(Threads* waiting) {
  Thread* const self = &thread();
  waiting->push_back(self);
  Yield(self);
}

void WakeAll(Threads* waiting) {
  Threads& runnable = current_cluster->runnable;
  runnable.insert(runnable.end(), waiting->begin(), waiting->end());
  waiting->clear();
}

const WarpInputs& Exchange(const LaneInput& input, void (*execute)(WarpInputs*)) {
  const int number = thread().index / kLanes;
  Warp& warp = block().warps[number];
  WarpInputs& inputs = warp.inputs[warp.turn % 2];
  if (!warp.waiting.empty()) {
    const int other = warp.waiting.front()->index % kLanes;
    CHECK(inputs[other].instruction == input.instruction ||
              std::strcmp(inputs[other].instruction, input.instruction) == 0,
          "block {} warp {}: lane {} is at {}, lane {} at {}", block().index, number, other,
          inputs[other].instruction, lane(), input.instruction);
  }
  inputs[lane()] = input;
  if (static_cast<int>(warp.waiting.size()) + 1 < kLanes) {
    WaitIn(&warp.waiting);
  } else {
    ++warp.turn;
    if (execute != nullptr) execute(&inputs);
    WakeAll(&warp.waiting);
  }
  return inputs;
}

unsigned char* SharedBytes(uint32_t address, uint32_t num_bytes, uint32_t alignment) {
  auto& shared = block().shared;
  CHECK(address % alignment == 0 && uint64_t{address} + num_bytes <= shared.size(),
        "block {} thread {}: {} bytes of shared memory at {} of {}", block().index, thread().index,
        num_bytes, address, shared.size());
  return shared.data() + address;
}

void StartCopy(uint32_t address, const void* from, int num_bytes, int size, CopyGroup* copies) {
  const int alignment = std::min(size, 16);
  CHECK(num_bytes >= 0 && num_bytes <= size, "num_bytes={}", num_bytes);
  CHECK(reinterpret_cast<uintptr_t>(from) % alignment == 0, "a copy from {}", from);
  const Copy copy = {SharedBytes(address, size, alignment), from, num_bytes, size};
  if (block().launch->copy_timing == CopyTiming::kEarly) {
    Land({copy});
  } else {
    std::memset(copy.to, 0xFF, size);
    copies->push_back(copy);
  }
}

void Land(const CopyGroup& copies) {
  for (const Copy& copy : copies) {
    if (copy.num_bytes > 0) std::memcpy(copy.to, copy.from, copy.num_bytes);
    std::memset(copy.to + copy.num_bytes, 0, copy.size - copy.num_bytes);
  }
}

}  // namespace emulation

void Emulate(const EmulatedLaunch& launch, const std::function<void()>& kernel) {
  using namespace emulation;
  CHECK(launch.threads_per_block % kLanes == 0, "threads_per_block={}", launch.threads_per_block);
  CHECK(launch.num_blocks % launch.blocks_per_cluster == 0, "{} blocks in clusters of {}",
        launch.num_blocks, launch.blocks_per_cluster);
  CHECK(current_cluster == nullptr, "a launch inside a kernel");
  Cluster cluster;
  cluster.kernel = &kernel;
  std::mt19937 rng(launch.seed);
  std::vector<int> order(launch.num_blocks / launch.blocks_per_cluster);
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
  std::shuffle(order.begin(), order.end(), rng);
  cluster.random = uint64_t{rng()} << 32 | rng();
  cluster.blocks.resize(launch.blocks_per_cluster);
  for (Block& b : cluster.blocks) {
    b.launch = &launch;
    b.cluster = &cluster;
    b.threads.resize(launch.threads_per_block);
    for (size_t i = 0; i < b.threads.size(); ++i) {
      b.threads[i].block = &b;
      b.threads[i].index = static_cast<int>(i);
    }
    b.warps.resize(launch.threads_per_block / kLanes);
  }
  current_cluster = &cluster;
  for (const int number : order) {
    for (int i = 0; i < launch.blocks_per_cluster; ++i) {
      Block& b = cluster.blocks[i];
      b.index = number * launch.blocks_per_cluster + i;
      b.shared.assign(launch.shared_bytes, 0xFF);  // NaN in every format
      b.barriers.clear();
    }
    RunCluster(&cluster);
  }
  current_cluster = nullptr;
  running = nullptr;
}

}  // namespace wintserve::kernels::cuda
