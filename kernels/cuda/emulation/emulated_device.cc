#include "kernels/cuda/emulation/emulated_device.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <vector>

#include "common/check.h"
#include "kernels/formats/bf16.h"
#include "kernels/plan/half.h"

namespace wintserve::kernels::cuda {
namespace {

constexpr int kLanes = 32;
constexpr size_t kStackBytes = 256 * 1024;

struct Copy {
  uint32_t address = 0;
  std::array<unsigned char, 16> bytes = {};
};

// What a lane brings to an instruction that the whole warp executes.
struct LaneInput {
  const char* instruction = nullptr;
  std::array<uint32_t, 6> words = {};
};

struct Warp {
  int64_t turn = 0;  // instructions executed so far
  int arrived = 0;
  // Two, because a lane may be an instruction ahead of one that still reads its neighbours' inputs.
  std::array<std::array<LaneInput, kLanes>, 2> inputs;
};

struct Thread {
  ucontext_t start;  // only entered once: its successors switch without a system call
  jmp_buf state;
  std::unique_ptr<char[]> stack;
  int index = 0;
  bool started = false;
  bool done = false;
  const int64_t* waits_for = nullptr;  // a turn counter that has to pass `passed`
  int64_t passed = 0;
  std::vector<Copy> open_copies;
  std::deque<std::vector<Copy>> copy_groups;
};

struct Cluster;

struct Block {
  const EmulatedLaunch* launch = nullptr;
  Cluster* cluster = nullptr;
  const std::function<void()>* kernel = nullptr;
  int index = 0;
  jmp_buf scheduler;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  int64_t barriers = 0;
  int at_barrier = 0;
  std::vector<unsigned char> shared;
  Thread* running = nullptr;
};

struct Cluster {
  std::vector<Block> blocks;
  int64_t barriers = 0;
  int at_barrier = 0;  // threads
};

Block* current_block = nullptr;

Block& block() {
  CHECK(current_block != nullptr, "a device function outside a kernel");
  return *current_block;
}
Thread& thread() { return *block().running; }
Warp& warp() { return block().warps[thread().index / kLanes]; }
int lane() { return thread().index % kLanes; }

__attribute__((noinline)) void Resume(Block* b, Thread* t) {
  current_block = b;
  b->running = t;
  if (_setjmp(b->scheduler) != 0) return;
  if (t->started) _longjmp(t->state, 1);
  t->started = true;
  setcontext(&t->start);
}

__attribute__((noinline)) void Yield(Block* b, Thread* t) {
  if (_setjmp(t->state) == 0) _longjmp(b->scheduler, 1);
}

void WaitUntilPassed(const int64_t& counter, int64_t value) {
  Thread& self = thread();
  self.waits_for = &counter;
  self.passed = value;
  Yield(&block(), &self);
  self.waits_for = nullptr;
}

// The inputs of all lanes of this warp to an instruction that it executes together.
const std::array<LaneInput, kLanes>& Exchange(const LaneInput& input) {
  Warp& w = warp();
  const int64_t turn = w.turn;
  auto& inputs = w.inputs[turn % 2];
  inputs[lane()] = input;
  if (++w.arrived == kLanes) {
    for (int l = 0; l < kLanes; ++l) {
      CHECK(std::strcmp(inputs[l].instruction, input.instruction) == 0,
            "block {} warp {}: lane {} is at {}, lane {} at {}", block().index,
            thread().index / kLanes, l, inputs[l].instruction, lane(), input.instruction);
    }
    w.arrived = 0;
    ++w.turn;
  } else {
    WaitUntilPassed(w.turn, turn);
  }
  return inputs;
}

unsigned char* SharedBytes(uint32_t address, uint32_t num_bytes) {
  auto& shared = block().shared;
  CHECK(address % num_bytes == 0 && address + num_bytes <= shared.size(),
        "block {} thread {}: {} bytes of shared memory at {} of {}", block().index, thread().index,
        num_bytes, address, shared.size());
  return shared.data() + address;
}

void Arrive(const Copy& copy) {
  std::memcpy(SharedBytes(copy.address, 16), copy.bytes.data(), copy.bytes.size());
}

void RunThread() {
  (*block().kernel)();
  thread().done = true;
  Yield(&block(), &thread());
}

void Prepare(Thread* t, int index) {
  t->index = index;
  t->started = false;
  t->done = false;
  CHECK(t->open_copies.empty(), "block {} thread {} ended between a copy and its commit",
        block().index, index);
  t->copy_groups.clear();
  if (t->stack == nullptr) t->stack.reset(new char[kStackBytes]);
  CHECK(getcontext(&t->start) == 0);
  t->start.uc_stack.ss_sp = t->stack.get();
  t->start.uc_stack.ss_size = kStackBytes;
  t->start.uc_link = nullptr;
  makecontext(&t->start, RunThread, 0);
}

// All threads of the cluster's blocks, in an order drawn from rng.
void RunCluster(Cluster* cluster, std::mt19937* rng) {
  struct Entry {
    Block* block;
    Thread* thread;
  };
  std::vector<Entry> order;
  for (Block& b : cluster->blocks) {
    for (size_t i = 0; i < b.threads.size(); ++i) {
      current_block = &b;
      Prepare(&b.threads[i], static_cast<int>(i));
      order.push_back({&b, &b.threads[i]});
    }
  }
  std::shuffle(order.begin(), order.end(), *rng);
  size_t num_done = 0;
  while (num_done < order.size()) {
    bool progress = false;
    num_done = 0;
    for (const auto [b, t] : order) {
      if (!t->done && (t->waits_for == nullptr || *t->waits_for > t->passed)) {
        Resume(b, t);
        progress = true;
      }
      num_done += t->done ? 1 : 0;
    }
    CHECK(progress || num_done == order.size(),
          "block {}: {} of {} threads ended, {} stand at a barrier, {} at one of the cluster, the "
          "rest wait for their warps",
          cluster->blocks[0].index, num_done, order.size(), cluster->blocks[0].at_barrier,
          cluster->at_barrier);
  }
}

float Float(uint32_t bits) { return std::bit_cast<float>(bits); }
uint32_t Bits(float value) { return std::bit_cast<uint32_t>(value); }

std::array<uint32_t, 6> Halves(uint64_t value) {
  return {static_cast<uint32_t>(value), static_cast<uint32_t>(value >> 32)};
}
uint64_t Whole(const LaneInput& input) { return uint64_t{input.words[1]} << 32 | input.words[0]; }

float Bfloat16(uint32_t pair, int half) {
  return formats::Bfloat16ToFloat(static_cast<uint16_t>(pair >> (16 * half)));
}

uint16_t SharedElement(uint32_t row_address, int element) {
  uint16_t value;
  std::memcpy(&value, SharedBytes(row_address, 16) + 2 * element, sizeof(value));
  return value;
}

}  // namespace

void Emulate(const EmulatedLaunch& launch, const std::function<void()>& kernel) {
  CHECK(launch.threads_per_block % kLanes == 0, "threads_per_block={}", launch.threads_per_block);
  CHECK(launch.num_blocks % launch.blocks_per_cluster == 0, "{} blocks in clusters of {}",
        launch.num_blocks, launch.blocks_per_cluster);
  std::mt19937 rng(launch.seed);
  std::vector<int> order(launch.num_blocks / launch.blocks_per_cluster);
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
  std::shuffle(order.begin(), order.end(), rng);
  CHECK(current_block == nullptr, "a launch inside a kernel");
  Cluster cluster;
  cluster.blocks.resize(launch.blocks_per_cluster);
  for (Block& b : cluster.blocks) {
    b.launch = &launch;
    b.cluster = &cluster;
    b.kernel = &kernel;
    b.threads.resize(launch.threads_per_block);
  }
  for (const int index : order) {
    for (int i = 0; i < launch.blocks_per_cluster; ++i) {
      Block& b = cluster.blocks[i];
      b.index = index * launch.blocks_per_cluster + i;
      b.warps.assign(launch.threads_per_block / kLanes, Warp());
      b.shared.assign(launch.shared_bytes, 0xFF);  // NaN in every format
    }
    RunCluster(&cluster, &rng);
  }
  current_block = nullptr;
}

int ThreadIndex() { return thread().index; }
int BlockIndex() { return block().index; }
int NumBlocks() { return block().launch->num_blocks; }

void SyncBlock() {
  Block& b = block();
  const int64_t barriers = b.barriers;
  if (++b.at_barrier == static_cast<int>(b.threads.size())) {
    b.at_barrier = 0;
    ++b.barriers;
  } else {
    WaitUntilPassed(b.barriers, barriers);
  }
}

void SyncCluster() {
  Cluster& cluster = *block().cluster;
  const int64_t barriers = cluster.barriers;
  const size_t num_threads = cluster.blocks.size() * block().threads.size();
  if (++cluster.at_barrier == static_cast<int>(num_threads)) {
    cluster.at_barrier = 0;
    ++cluster.barriers;
  } else {
    WaitUntilPassed(cluster.barriers, barriers);
  }
}

int32_t Shuffle(int32_t value, int source_lane) {
  const auto& inputs = Exchange({"shfl.idx", {static_cast<uint32_t>(value)}});
  return static_cast<int32_t>(inputs[source_lane % kLanes].words[0]);
}
float Shuffle(float value, int source_lane) {
  return Float(Exchange({"shfl.idx", {Bits(value)}})[source_lane % kLanes].words[0]);
}
int32_t ShuffleUp(int32_t value, int distance) {
  const auto& inputs = Exchange({"shfl.up", {static_cast<uint32_t>(value)}});
  return lane() < distance ? value : static_cast<int32_t>(inputs[lane() - distance].words[0]);
}
uint64_t ShuffleUp(uint64_t value, int distance) {
  const auto& inputs = Exchange({"shfl.up.64", Halves(value)});
  return lane() < distance ? value : Whole(inputs[lane() - distance]);
}
float ShuffleXor(float value, int mask) {
  return Float(Exchange({"shfl.bfly", {Bits(value)}})[lane() ^ mask].words[0]);
}
uint64_t ShuffleXor(uint64_t value, int mask) {
  return Whole(Exchange({"shfl.bfly.64", Halves(value)})[lane() ^ mask]);
}
uint32_t Ballot(bool predicate) {
  const auto& inputs = Exchange({"vote.ballot", {predicate ? 1u : 0u}});
  uint32_t votes = 0;
  for (int l = 0; l < kLanes; ++l) votes |= inputs[l].words[0] << l;
  return votes;
}

bool IsSameInWarp(int value) {
  const auto& inputs = Exchange({"match.all", {static_cast<uint32_t>(value)}});
  return std::all_of(inputs.begin(), inputs.end(), [&](const LaneInput& input) {
    return input.words[0] == static_cast<uint32_t>(value);
  });
}

uint32_t SharedBase() { return 0; }
unsigned char* SharedMemory() { return block().shared.data(); }
void* SharedOfBlock(int block_of_cluster, const void* object) {
  auto& blocks = block().cluster->blocks;
  const auto offset = static_cast<const unsigned char*>(object) - block().shared.data();
  CHECK(block_of_cluster >= 0 && block_of_cluster < std::ssize(blocks) && offset >= 0 &&
            offset < std::ssize(block().shared),
        "byte {} of the shared memory of block {} of the cluster", offset, block_of_cluster);
  return blocks[block_of_cluster].shared.data() + offset;
}
void StoreShared(uint32_t address, uint32_t value) {
  std::memcpy(SharedBytes(address, 4), &value, 4);
}
void StoreShared(uint32_t address, uint2 value) { std::memcpy(SharedBytes(address, 8), &value, 8); }
void StoreShared(uint32_t address, uint4 value) {
  std::memcpy(SharedBytes(address, 16), &value, 16);
}
uint32_t LoadShared(uint32_t address) {
  uint32_t value;
  std::memcpy(&value, SharedBytes(address, 4), 4);
  return value;
}
uint4 LoadShared4(uint32_t address) {
  uint4 value;
  std::memcpy(&value, SharedBytes(address, 16), 16);
  return value;
}

void LoadMatrices(uint32_t row_address, uint32_t (&matrices)[4]) {
  const auto& inputs = Exchange({"ldmatrix", {row_address}});
  for (int i = 0; i < 4; ++i) {
    const uint32_t row = inputs[8 * i + lane() / 4].words[0];
    const int first = 2 * (lane() % 4);
    matrices[i] = SharedElement(row, first) | uint32_t{SharedElement(row, first + 1)} << 16;
  }
}

void LoadMatricesTransposed(uint32_t row_address, uint32_t (&matrices)[4]) {
  const auto& inputs = Exchange({"ldmatrix.trans", {row_address}});
  for (int i = 0; i < 4; ++i) {
    const int row = 8 * i + 2 * (lane() % 4);
    matrices[i] = SharedElement(inputs[row].words[0], lane() / 4) |
                  uint32_t{SharedElement(inputs[row + 1].words[0], lane() / 4)} << 16;
  }
}

void MatrixMultiplyAdd(const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float& c0, float& c1,
                       float& c2, float& c3) {
  const auto& inputs = Exchange({"mma.m16n8k16", {a[0], a[1], a[2], a[3], b0, b1}});
  const auto element_a = [&](int row, int k) {
    const LaneInput& owner = inputs[4 * (row % 8) + k % 8 / 2];
    return Bfloat16(owner.words[row / 8 + 2 * (k / 8)], k % 2);
  };
  const auto element_b = [&](int k, int column) {
    const LaneInput& owner = inputs[4 * column + k % 8 / 2];
    return Bfloat16(owner.words[4 + k / 8], k % 2);
  };
  const auto add = [&](int row, int column, float* c) {
    double sum = *c;
    for (int k = 0; k < 16; ++k) sum += double{element_a(row, k)} * element_b(k, column);
    *c = static_cast<float>(sum);
  };
  const int row = lane() / 4;
  const int column = 2 * (lane() % 4);
  add(row, column, &c0);
  add(row, column + 1, &c1);
  add(row + 8, column, &c2);
  add(row + 8, column + 1, &c3);
}

void CopyToShared(uint32_t address, const void* from, int num_bytes) {
  CHECK(num_bytes >= 0 && num_bytes <= 16, "num_bytes={}", num_bytes);
  CHECK(reinterpret_cast<uintptr_t>(from) % 16 == 0, "a copy from {}", from);
  Copy copy = {.address = address};
  std::memcpy(copy.bytes.data(), from, num_bytes);
  SharedBytes(address, 16);  // in bounds
  if (block().launch->copy_timing == CopyTiming::kEarly) {
    Arrive(copy);
  } else {
    thread().open_copies.push_back(copy);
  }
}

void CommitCopies() {
  thread().copy_groups.push_back(std::move(thread().open_copies));
  thread().open_copies.clear();
}

void WaitForCopiesUntil(int pending) {
  auto& groups = thread().copy_groups;
  while (static_cast<int>(groups.size()) > pending) {
    for (const Copy& copy : groups.front()) Arrive(copy);
    groups.pop_front();
  }
}

float Add(float a, float b) { return a + b; }
float Subtract(float a, float b) { return a - b; }
float Multiply(float a, float b) { return a * b; }
float MultiplyAdd(float a, float b, float c) { return std::fma(a, b, c); }
float Divide(float a, float b) { return a / b; }
float Exp2(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;  // subnormal results are flushed
}

uint32_t PackBfloat16(float low, float high) {
  return formats::FloatToBfloat16(low) | uint32_t{formats::FloatToBfloat16(high)} << 16;
}
float LowBfloat16(uint32_t pair) { return Bfloat16(pair, 0); }
float HighBfloat16(uint32_t pair) { return Bfloat16(pair, 1); }
uint32_t AddBfloat16Pairs(uint32_t a, uint32_t b) {
  return PackBfloat16(Bfloat16(a, 0) + Bfloat16(b, 0), Bfloat16(a, 1) + Bfloat16(b, 1));
}
float2 UnpackHalves(uint32_t pair) {
  return {plan::HalfToFloat(static_cast<uint16_t>(pair)),
          plan::HalfToFloat(static_cast<uint16_t>(pair >> 16))};
}

void FenceDevice() {}
int32_t FetchAndAdd(int32_t* counter, int32_t value) {
  const int32_t before = *counter;
  *counter += value;
  return before;
}
uint32_t FetchAndAdd(uint32_t* counter, uint32_t value) {
  const uint32_t before = *counter;
  *counter += value;
  return before;
}
uint32_t FetchAndOr(uint32_t* word, uint32_t bits) {
  const uint32_t before = *word;
  *word |= bits;
  return before;
}

}  // namespace wintserve::kernels::cuda
