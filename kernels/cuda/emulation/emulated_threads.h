// The threads of an emulated launch and how they wait: what the emulated instructions are made of.
//
// Threads are fibers that switch where they wait and nowhere else; which one goes on is drawn each
// time from the seed of the launch.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <vector>

#include "common/check.h"
#include "kernels/cuda/emulation/emulated_device.h"

namespace wintserve::kernels::cuda::emulation {

inline constexpr int kLanes = 32;

// A copy to shared memory that has not landed. Behind num_bytes, zeros stand for the rest of
// `size`.
struct Copy {
  unsigned char* to;
  const void* from;
  int num_bytes;
  int size;
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

struct Block;

struct Thread {
  ucontext_t start;  // only entered once: its successors switch without a system call
  jmp_buf place;
  Block* block = nullptr;
  int index = 0;
  bool started = false;
  CopyGroup open_copies;
  std::vector<CopyGroup> copy_groups;
  WgmmaGroup open_wgmma;
  std::vector<WgmmaGroup> wgmma_groups;
  std::map<float*, HeldSums> held;
};
using Threads = std::vector<Thread*>;

// What a lane brings to an instruction that the whole warp executes.
struct LaneInput {
  const char* instruction = nullptr;
  std::array<uint32_t, 10> words = {};
};
using WarpInputs = std::array<LaneInput, kLanes>;

struct Warp {
  int64_t turn = 0;  // instructions executed so far
  Threads waiting;
  // Two, because a lane may be an instruction ahead of one that still reads its neighbours' inputs.
  std::array<WarpInputs, 2> inputs;
};

// A barrier in shared memory.
struct Barrier {
  int arrivals = 0;  // of a phase
  int missing = 0;   // of this phase
  uint32_t parity = 0;
  int64_t expected_bytes = 0;
  int64_t copied_bytes = 0;
  CopyGroup copies;  // that land when the phase ends
  Threads waiting;
};

struct Cluster;

struct Block {
  const EmulatedLaunch* launch = nullptr;
  Cluster* cluster = nullptr;
  int index = 0;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Threads at_barrier;
  std::vector<unsigned char> shared;
  std::map<uint32_t, Barrier> barriers;  // by address
};

struct Cluster {
  const std::function<void()>* kernel = nullptr;
  std::vector<Block> blocks;
  Threads runnable;  // that do not wait, but for the running one
  Threads at_barrier;
  int num_ended = 0;
  uint64_t random = 0;  // state of Draw
  jmp_buf scheduler;
};

// Null outside a launch.
inline Thread* running = nullptr;

// Of the running thread.
inline Thread& thread() {
  CHECK(running != nullptr, "a device function outside a kernel");
  return *running;
}
inline Block& block() { return *thread().block; }
inline int lane() { return thread().index % kLanes; }

// A number below `bound` from the launch's seed. Drawn at every switch, so quick: the upper half of
// a linear congruential generator with Knuth's multiplier.
inline uint32_t Draw(Cluster* cluster, size_t bound) {
  cluster->random = cluster->random * 6364136223846793005u + 1442695040888963407u;
  return static_cast<uint32_t>((cluster->random >> 32) * bound >> 32);
}

// The running thread joins `waiting` and goes on after a WakeAll of it.
void WaitIn(Threads* waiting);
void WakeAll(Threads* waiting);

// The inputs of all lanes of this warp to an instruction that it executes together, or what
// `execute` made of them when the last lane had come.
const WarpInputs& Exchange(const LaneInput& input, void (*execute)(WarpInputs*) = nullptr);

// In bounds and aligned, else the process aborts.
unsigned char* SharedBytes(uint32_t address, uint32_t num_bytes, uint32_t alignment);
inline unsigned char* SharedBytes(uint32_t address, uint32_t num_bytes) {
  return SharedBytes(address, num_bytes, num_bytes);
}

// Brings the bytes at once or, late, overwrites the target with NaNs and adds to `copies` what is
// then for Land to do.
void StartCopy(uint32_t address, const void* from, int num_bytes, int size, CopyGroup* copies);
void Land(const CopyGroup& copies);

}  // namespace wintserve::kernels::cuda::emulation
