#include "kernels/cuda/matmul/emulated_device_test_util.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "common/check.h"
#include "kernels/plan/float16.h"

namespace wintserve::kernels::cuda {
namespace {

constexpr int kLanes = 32;
constexpr size_t kStackBytes = 64 * 1024;

struct Copy {
  void* to;
  const void* from;
  int bytes;
};
using CopyGroup = std::vector<Copy>;

// A wgmma as one lane sees it.
struct Wgmma {
  bool add = false;
  float* d = nullptr;
  int count = 0;                                  // of d
  std::array<std::array<uint32_t, 4>, 4> a = {};  // of the lanes 4g … 4g + 3
  uint64_t descriptor = 0;
  std::vector<uint16_t> b;  // [token][16 k], empty: not read yet
};
using WgmmaGroup = std::vector<Wgmma>;

// Accumulators of wgmma that have not been waited for.
struct HeldSums {
  std::vector<float> values;
  int num_users = 0;
};

// A barrier in shared memory.
struct Barrier {
  int arrivals = 0;  // of a phase
  int missing = 0;   // of this phase
  uint32_t parity = 0;
  int64_t expected_bytes = 0;
  int64_t copied_bytes = 0;
  CopyGroup copies;
  std::vector<int> waiting;  // threads
};

// What a lane brings to an operation of its warp, and takes away.
struct LaneOperand {
  uint32_t a[4];
  std::array<std::array<uint32_t, 4>, 4> quad;
  uint32_t b[2];
  float c[4];
  uint32_t value;
};

using WarpOperation = std::function<void(std::array<LaneOperand, kLanes>&)>;

// A fiber begins on a stack of its own by setcontext and then goes back and forth by longjmp, which
// unlike swapcontext makes no system call.
struct Fiber {
  ucontext_t start;
  jmp_buf place;
  bool started = false;
  std::unique_ptr<char[]> stack;
  int thread = 0;
  CopyGroup open_group;
  std::deque<CopyGroup> pending_groups;
  WgmmaGroup open_wgmma;
  std::deque<WgmmaGroup> pending_wgmma;
  std::map<float*, HeldSums> held;
};

struct Warp {
  std::array<LaneOperand, kLanes> operands;
  int num_arrived = 0;
  const char* operation = nullptr;  // all lanes must do the same
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<int> runnable;  // threads that are not waiting, but for the current one
  int num_finished = 0;
  int num_at_barrier = 0;
  std::mt19937 rng;
  const std::function<void(uint8_t*)>* body = nullptr;
  uint8_t* shared = nullptr;
  int64_t shared_bytes = 0;
  std::map<uint32_t, Barrier> barriers;
  jmp_buf scheduler;
  Fiber* current = nullptr;
  int index = 0;
  int num_blocks = 0;
};

Block* block_state = nullptr;

Block& State() {
  CHECK(block_state != nullptr, "a kernel runs inside Launch");
  return *block_state;
}

void Yield() {
  Block& state = State();
  if (_setjmp(state.current->place) == 0) _longjmp(state.scheduler, 1);
}

void Continue(Block* state, Fiber* fiber) {
  state->current = fiber;
  if (_setjmp(state->scheduler) != 0) return;
  if (fiber->started) _longjmp(fiber->place, 1);
  fiber->started = true;
  setcontext(&fiber->start);
}

void FiberMain() {
  Block& state = State();
  (*state.body)(state.shared);
  ++state.num_finished;
  Yield();
}

// The last lane to arrive computes for all.
LaneOperand DoWithWarp(const char* name, const LaneOperand& operand,
                       const WarpOperation& operation) {
  Block& state = State();
  Fiber& fiber = *state.current;
  Warp& warp = state.warps[fiber.thread / kLanes];
  CHECK(warp.num_arrived == 0 || std::strcmp(warp.operation, name) == 0,
        "thread {} does {} while its warp does {}", fiber.thread, name, warp.operation);
  warp.operation = name;
  warp.operands[fiber.thread % kLanes] = operand;
  if (++warp.num_arrived < kLanes) {
    Yield();
  } else {
    operation(warp.operands);
    warp.num_arrived = 0;
    const int first = fiber.thread / kLanes * kLanes;
    for (int thread = first; thread < first + kLanes; ++thread) {
      if (thread != fiber.thread) state.runnable.push_back(thread);
    }
  }
  return warp.operands[fiber.thread % kLanes];
}

uint32_t Exchange(const char* name, uint32_t value, int (*source)(int lane, int argument),
                  int argument) {
  LaneOperand operand = {};
  operand.value = value;
  return DoWithWarp(name, operand,
                    [&](std::array<LaneOperand, kLanes>& lanes) {
                      std::array<uint32_t, kLanes> values;
                      for (int i = 0; i < kLanes; ++i) values[i] = lanes[i].value;
                      for (int i = 0; i < kLanes; ++i) lanes[i].value = values[source(i, argument)];
                    })
      .value;
}

double HalfOf(uint32_t word, int half) {
  static const auto* const values = [] {
    auto* table = new std::vector<double>;
    for (uint32_t bits = 0; bits <= 0xFFFF; ++bits) {
      table->push_back(plan::Float16ToFloat(static_cast<uint16_t>(bits)));
    }
    return table;
  }();
  return (*values)[(word >> (16 * half)) & 0xFFFF];
}

// The fragments of the PTX manual: lane 4g + t holds A rows g and g + 8, k 2t, 2t + 1, 2t + 8 and
// 2t + 9; B the same k of column g; C rows g and g + 8 of columns 2t and 2t + 1.
void MultiplyFragments(std::array<LaneOperand, kLanes>& lanes) {
  double a[16][16];
  double b[16][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4;
    const int t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      for (int half = 0; half < 2; ++half) {
        a[g + i % 2 * 8][2 * t + i / 2 * 8 + half] = HalfOf(lanes[lane].a[i], half);
        if (i < 2) b[2 * t + i * 8 + half][g] = HalfOf(lanes[lane].b[i], half);
      }
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8;
      const int column = lane % 4 * 2 + i % 2;
      double sum = lanes[lane].c[i];
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      lanes[lane].c[i] = static_cast<float>(sum);
    }
  }
}

void RunBlock(Block* state) {
  for (Fiber& fiber : state->fibers) {
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStackBytes;
    fiber.start.uc_link = nullptr;
    fiber.started = false;
    fiber.open_group.clear();
    fiber.pending_groups.clear();
    fiber.open_wgmma.clear();
    fiber.pending_wgmma.clear();
    fiber.held.clear();
    makecontext(&fiber.start, FiberMain, 0);
  }
  std::memset(state->shared, 0xFF, state->shared_bytes);
  state->num_finished = 0;
  state->barriers.clear();
  state->runnable.resize(state->fibers.size());
  std::iota(state->runnable.begin(), state->runnable.end(), 0);
  while (!state->runnable.empty()) {
    int& next = state->runnable[state->rng() % state->runnable.size()];
    std::swap(next, state->runnable.back());
    const int thread = state->runnable.back();
    state->runnable.pop_back();
    Continue(state, &state->fibers[thread]);
  }
  CHECK(state->num_finished == static_cast<int>(state->fibers.size()),
        "block {}: {} threads wait for the others, which are done", state->index,
        state->fibers.size() - state->num_finished);
}

}  // namespace

void EmulatedDevice::Launch(int num_blocks, int num_threads, int64_t shared_bytes, uint32_t seed,
                            const std::function<void(uint8_t*)>& body) {
  CHECK(block_state == nullptr && num_threads % kLanes == 0);
  Block state;
  state.fibers.resize(num_threads);
  for (int thread = 0; thread < num_threads; ++thread) {
    state.fibers[thread].thread = thread;
    state.fibers[thread].stack = std::make_unique<char[]>(kStackBytes);
  }
  state.warps.resize(num_threads / kLanes);
  state.rng.seed(seed);
  state.body = &body;
  state.num_blocks = num_blocks;
  // Not rounded up, so that an access behind its end is seen by memory checkers.
  const std::unique_ptr<uint8_t, void (*)(void*)> shared(
      static_cast<uint8_t*>(std::aligned_alloc(16, (shared_bytes + 15) / 16 * 16 + 16)), std::free);
  state.shared = shared.get();
  state.shared_bytes = shared_bytes;
  block_state = &state;
  for (state.index = 0; state.index < num_blocks; ++state.index) RunBlock(&state);
  block_state = nullptr;
}

int EmulatedDevice::thread() { return State().current->thread; }
int EmulatedDevice::block() { return State().index; }
int EmulatedDevice::num_blocks() { return State().num_blocks; }

void EmulatedDevice::SyncBlock() {
  Block& state = State();
  if (++state.num_at_barrier < static_cast<int>(state.fibers.size())) {
    Yield();
    return;
  }
  state.num_at_barrier = 0;
  for (const Fiber& fiber : state.fibers) {
    if (&fiber != state.current) state.runnable.push_back(fiber.thread);
  }
}

namespace {

// In the eight bytes of a barrier.
struct SharedBarrier {
  uint16_t count;
  uint16_t missing;
  uint32_t completions;
};
static_assert(sizeof(SharedBarrier) == 8);

}  // namespace

void EmulatedDevice::InitBarrier(void* barrier, int count) {
  CheckAligned(barrier, sizeof(SharedBarrier));
  const auto arrivals = static_cast<uint16_t>(count);
  *static_cast<SharedBarrier*>(barrier) = {arrivals, arrivals, 0};
}

void EmulatedDevice::ArriveAtBarrier(void* barrier) {
  auto* own = static_cast<SharedBarrier*>(barrier);
  CHECK(own->missing > 0 && own->missing <= own->count, "thread {}: not a barrier", thread());
  if (--own->missing == 0) {
    own->missing = own->count;
    ++own->completions;
  }
}

// As on a GPU it cannot tell a completion from the one two before it.
void EmulatedDevice::WaitBarrier(const void* barrier, int parity) {
  const auto* own = static_cast<const SharedBarrier*>(barrier);
  while (own->completions % 2 == static_cast<uint32_t>(parity)) {
    State().runnable.push_back(State().current->thread);
    Yield();
  }
}

void EmulatedDevice::SyncWarp() {
  DoWithWarp("SyncWarp", {}, [](std::array<LaneOperand, kLanes>&) {});
}

float EmulatedDevice::ShuffleXor(float value, int mask) {
  return std::bit_cast<float>(Exchange(
      "ShuffleXor", std::bit_cast<uint32_t>(value), [](int lane, int m) { return lane ^ m; },
      mask));
}
int EmulatedDevice::ShuffleXor(int value, int mask) {
  return static_cast<int>(Exchange(
      "ShuffleXor", static_cast<uint32_t>(value), [](int lane, int m) { return lane ^ m; }, mask));
}
int EmulatedDevice::ShuffleUp(int value, int step) {
  return static_cast<int>(Exchange(
      "ShuffleUp", static_cast<uint32_t>(value),
      [](int lane, int s) { return lane >= s ? lane - s : lane; }, step));
}
int EmulatedDevice::Shuffle(int value, int lane) {
  return static_cast<int>(Exchange(
      "Shuffle", static_cast<uint32_t>(value), [](int, int from) { return from; }, lane));
}
uint32_t EmulatedDevice::Ballot(bool value) {
  LaneOperand operand = {};
  operand.value = value ? 1 : 0;
  return DoWithWarp("Ballot", operand,
                    [](std::array<LaneOperand, kLanes>& lanes) {
                      uint32_t bits = 0;
                      for (int i = 0; i < kLanes; ++i) bits |= lanes[i].value << i;
                      for (LaneOperand& lane : lanes) lane.value = bits;
                    })
      .value;
}

void EmulatedDevice::CheckAligned(const void* address, int bytes) {
  CHECK(reinterpret_cast<uintptr_t>(address) % bytes == 0, "thread {}: {} is not aligned to {}",
        thread(), address, bytes);
}

void EmulatedDevice::CopyAsync(void* shared, const void* global, int bytes) {
  Block& state = State();
  CheckAligned(shared, bytes);
  CheckAligned(global, bytes);
  const auto* begin = static_cast<const uint8_t*>(shared);
  CHECK(begin >= state.shared && begin + bytes <= state.shared + state.shared_bytes,
        "thread {} copies outside of shared memory", thread());
  std::memset(shared, 0xFF, bytes);
  state.current->open_group.push_back({shared, global, bytes});
}

void EmulatedDevice::CommitCopies() {
  Fiber& fiber = *State().current;
  fiber.pending_groups.push_back(std::exchange(fiber.open_group, {}));
}

void EmulatedDevice::WaitForCopies(int pending) {
  std::deque<CopyGroup>& groups = State().current->pending_groups;
  while (static_cast<int>(groups.size()) > pending) {
    for (const Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, copy.bytes);
    groups.pop_front();
  }
}

void EmulatedDevice::StoreGlobal16(void* to, const Words4& words) {
  CheckAligned(to, sizeof(words));
  std::memcpy(to, &words, sizeof(words));
}

void EmulatedDevice::MultiplyAccumulate(const uint32_t (&a)[4], const uint32_t (&b)[2],
                                        const float (&c)[4], float (&sum)[4]) {
  LaneOperand operand = {};
  std::copy(a, a + 4, operand.a);
  std::copy(b, b + 2, operand.b);
  std::copy(c, c + 4, operand.c);
  const LaneOperand result = DoWithWarp("MultiplyAccumulate", operand, MultiplyFragments);
  std::copy(result.c, result.c + 4, sum);
}

uint32_t EmulatedWgmmaDevice::SharedAddressOf(const void* shared) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(shared) - State().shared);
}

namespace {

Barrier& BarrierAt(uint32_t address) {
  const auto found = State().barriers.find(address);
  CHECK(found != State().barriers.end(), "no barrier at {}", address);
  return found->second;
}

void EndPhaseIfComplete(Barrier* barrier) {
  if (barrier->missing > 0 || barrier->copied_bytes != barrier->expected_bytes) return;
  for (const Copy& copy : barrier->copies) std::memcpy(copy.to, copy.from, copy.bytes);
  barrier->copies.clear();
  barrier->copied_bytes = 0;
  barrier->expected_bytes = 0;
  barrier->missing = barrier->arrivals;
  barrier->parity ^= 1;
  std::vector<int>& runnable = State().runnable;
  runnable.insert(runnable.end(), barrier->waiting.begin(), barrier->waiting.end());
  barrier->waiting.clear();
}

// The [token][16 k] halves behind a K-major descriptor in the 128-byte swizzle (PTX manual).
std::vector<uint16_t> ReadOperandB(uint64_t descriptor, int num_tokens) {
  const Block& state = State();
  CHECK(descriptor >> 62 == 1, "another swizzle than that of 128 bytes");
  const auto start = static_cast<uint32_t>(descriptor & 0x3FFF) << 4;
  const auto stride = static_cast<uint32_t>(descriptor >> 32 & 0x3FFF) << 4;
  std::vector<uint16_t> values(num_tokens * 16);
  for (int token = 0; token < num_tokens; ++token) {
    for (int piece = 0; piece < 2; ++piece) {  // of 16 bytes
      uint32_t address = start + token / 8 * stride + token % 8 * 128 + 16 * piece;
      address ^= (address >> 7 & 7) << 4;
      CHECK(address + 16 <= state.shared_bytes, "an operand outside of shared memory");
      std::memcpy(&values[token * 16 + 8 * piece], state.shared + address, 16);
    }
  }
  return values;
}

// Lane 4g + t holds rows g and g + 8 of tokens 8j + 2t and 8j + 2t + 1.
void FinishWgmma(Fiber* fiber, Wgmma* wgmma) {
  const int num_tokens = wgmma->count * 2;
  if (wgmma->b.empty()) wgmma->b = ReadOperandB(wgmma->descriptor, num_tokens);
  double a[2][16];
  for (int t = 0; t < 4; ++t) {
    for (int i = 0; i < 4; ++i) {
      for (int half = 0; half < 2; ++half) {
        a[i % 2][2 * t + i / 2 * 8 + half] = HalfOf(wgmma->a[t][i], half);
      }
    }
  }
  HeldSums& held = fiber->held.at(wgmma->d);
  for (int i = 0; i < wgmma->count; ++i) {
    const int token = i / 4 * 8 + fiber->thread % 4 * 2 + i % 2;
    double sum = wgmma->add ? held.values[i] : 0.0;
    for (int k = 0; k < 16; ++k) sum += a[i / 2 % 2][k] * HalfOf(wgmma->b[token * 16 + k], 0);
    held.values[i] = static_cast<float>(sum);
  }
  if (--held.num_users > 0) return;
  std::copy(held.values.begin(), held.values.end(), wgmma->d);
  fiber->held.erase(wgmma->d);
}

}  // namespace

void EmulatedWgmmaDevice::InitBarrier(uint32_t barrier, int arrivals) {
  CHECK(barrier % 8 == 0 && barrier + 8 <= State().shared_bytes && arrivals > 0);
  Barrier& made = State().barriers[barrier];
  made = {};
  made.arrivals = arrivals;
  made.missing = arrivals;
}

void EmulatedWgmmaDevice::ArriveAndExpect(uint32_t barrier, int bytes) {
  Barrier& at = BarrierAt(barrier);
  CHECK(at.missing > 0, "thread {} arrives once too often at the barrier at {}", thread(), barrier);
  at.expected_bytes += bytes;
  --at.missing;
  EndPhaseIfComplete(&at);
}

void EmulatedWgmmaDevice::WaitBarrier(uint32_t barrier, uint32_t parity) {
  Barrier& at = BarrierAt(barrier);
  while (at.parity == parity) {
    at.waiting.push_back(thread());
    Yield();
  }
}

void EmulatedWgmmaDevice::CopyBulk(uint32_t shared, const void* global, int bytes,
                                   uint32_t barrier) {
  Block& state = State();
  CHECK(shared % 16 == 0 && bytes % 16 == 0 && reinterpret_cast<uintptr_t>(global) % 16 == 0);
  CHECK(shared + bytes <= state.shared_bytes, "thread {} copies outside of shared memory",
        thread());
  std::memset(state.shared + shared, 0xFF, bytes);
  Barrier& at = BarrierAt(barrier);
  at.copies.push_back({state.shared + shared, global, bytes});
  at.copied_bytes += bytes;
  EndPhaseIfComplete(&at);
}

void EmulatedWgmmaDevice::ArriveAfterCopies(uint32_t barrier) {
  Fiber& fiber = *State().current;
  Barrier& at = BarrierAt(barrier);
  CHECK(fiber.pending_groups.empty());  // the kernel does not mix both ways of waiting
  at.copies.insert(at.copies.end(), fiber.open_group.begin(), fiber.open_group.end());
  fiber.open_group.clear();
  Arrive(barrier);
}

void EmulatedWgmmaDevice::Multiply(bool add, float* d, int count, const uint32_t (&a)[4],
                                   uint64_t b) {
  LaneOperand operand = {};
  std::copy(a, a + 4, operand.a);
  const LaneOperand result =
      DoWithWarp("WgmmaMultiply", operand, [](std::array<LaneOperand, kLanes>& lanes) {
        for (int lane = 0; lane < kLanes; ++lane) {
          for (int t = 0; t < 4; ++t) {
            std::copy_n(lanes[lane / 4 * 4 + t].a, 4, lanes[lane].quad[t].begin());
          }
        }
      });
  Block& state = State();
  Fiber& fiber = *state.current;
  HeldSums& held = fiber.held[d];
  if (held.num_users++ == 0) {
    held.values.assign(d, d + count);
    std::fill(d, d + count, std::nanf(""));
  }
  Wgmma wgmma = {add, d, count, result.quad, b, {}};
  if (state.rng() % 2 == 0) wgmma.b = ReadOperandB(b, count * 2);
  fiber.open_wgmma.push_back(std::move(wgmma));
}

void EmulatedWgmmaDevice::CommitWgmma() {
  Fiber& fiber = *State().current;
  fiber.pending_wgmma.push_back(std::exchange(fiber.open_wgmma, {}));
}

void EmulatedWgmmaDevice::WaitForWgmma(int pending) {
  Fiber& fiber = *State().current;
  while (static_cast<int>(fiber.pending_wgmma.size()) > pending) {
    for (Wgmma& wgmma : fiber.pending_wgmma.front()) FinishWgmma(&fiber, &wgmma);
    fiber.pending_wgmma.pop_front();
  }
}

uint16_t EmulatedDevice::FloatToHalf(float value) { return plan::FloatToFloat16(value); }
float EmulatedDevice::HalfToFloat(uint16_t bits) { return plan::Float16ToFloat(bits); }

}  // namespace wintserve::kernels::cuda
