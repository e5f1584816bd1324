// Every way in which the product kernels pass shared memory between warps, each alone and beside
// the same with a real race in it: what compute-sanitizer's racecheck makes of them tells how far
// its reports about kernels can be believed. tests/gpu/racecheck runs this under it.
//
//   nvcc -std=c++20 -arch=sm_90a -I. -o build/racecheck_patterns tests/gpu/racecheck_patterns.cu
//
// Alone it checks that the patterns without a race compute what they should: exit 1 if one does
// not. Without -lineinfo, so that racecheck names kernels and not the functions inlined into them.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "kernels/cuda/device_ops.h"
#include "kernels/cuda/wgmma_ops.h"

namespace wintserve::kernels::cuda {

constexpr int kLanes = 32;
constexpr int kPieceBytes = 16;
constexpr int kPlaceBytes = kLanes * kPieceBytes;  // a piece a lane
constexpr int kRounds = 24;
constexpr int kPlaces = 3;  // of a ring
constexpr int kSumWarps = 4;

// The one access that comes before the barrier that allows it; all barriers are still passed, so
// that nothing hangs.
enum class Race { kNone, kWritesEarly, kReadsEarly };

// How a place of the ring is filled and announced. For those who wait for the announcement, the PTX
// memory model makes what was written before visible in every case: an arrival releases what its
// thread did, and what other threads did before a barrier (SyncWarp) that it has passed; a copy
// belongs to that once its thread has waited for it, or where the barrier itself counts it.
enum class Full {
  kStores,         // stores; every lane arrives
  kStoresOneLane,  // stores, SyncWarp; lane 0 arrives for the warp
  kCopies,         // cp.async, wait_group; every lane arrives
  kCopiesOneLane,  // cp.async, wait_group, SyncWarp; lane 0 arrives for the warp
  kCopiesLater,    // as kCopies, but a place is announced when the copies of the next have started
  kCopiesCounted,  // cp.async, cp.async.mbarrier.arrive.noinc of every lane
  kBulk,           // lane 0: mbarrier.arrive.expect_tx, cp.async.bulk
};

// How the reader gives a place back.
enum class Empty {
  kEveryLane,
  kOneLane,  // SyncWarp; lane 0 arrives for the warp
};

__host__ __device__ constexpr bool IsOneArrival(Full full) {
  return full == Full::kStoresOneLane || full == Full::kCopiesOneLane || full == Full::kBulk;
}

// What piece `lane` of round `round` holds, in each of its words.
__host__ __device__ constexpr uint32_t ValueOf(int round, int lane) {
  return static_cast<uint32_t>(round * 1000 + lane);
}

WINTSERVE_DEVICE uint32_t Parity(int use) { return static_cast<uint32_t>(use % 2); }

// The warp arrives, every lane or lane 0 for all.
WINTSERVE_DEVICE void Arrive(bool one_lane, uint32_t barrier) {
  if (one_lane) SyncWarp();
  if (!one_lane || ThreadIndex() % kLanes == 0) ArriveAtBarrier(barrier);
}

// --- A ring between two warps: the first fills places, the second reads them ---

template <Full kFull, Race kRace>
WINTSERVE_DEVICE void Fill(const uint8_t* source, int round, uint32_t place, uint32_t full) {
  const int lane = ThreadIndex() % kLanes;
  const uint8_t* from = source + round * kPlaceBytes;
  if constexpr (kFull == Full::kBulk) {
    if (lane == 0) {
      if constexpr (kRace != Race::kWritesEarly) ArriveAndExpect(full, kPlaceBytes);
      CopyBulk(place, from, kPlaceBytes, full);
    }
  } else if constexpr (kFull == Full::kStores || kFull == Full::kStoresOneLane) {
    StoreShared(place + lane * kPieceBytes,
                *reinterpret_cast<const uint4*>(from + lane * kPieceBytes));
  } else {
    CopyToShared(place + lane * kPieceBytes, from + lane * kPieceBytes);
    CommitCopies();
  }
}

template <Full kFull, Race kRace>
WINTSERVE_DEVICE void Announce(uint32_t full) {
  if constexpr (kFull == Full::kBulk) {
    // Before the copy where nothing is wrong: Fill.
    if (kRace == Race::kWritesEarly && ThreadIndex() % kLanes == 0) {
      ArriveAndExpect(full, kPlaceBytes);
    }
  } else if constexpr (kFull == Full::kCopiesCounted) {
    ArriveAfterCopies(full);
  } else {
    if constexpr (kFull == Full::kCopies || kFull == Full::kCopiesOneLane) WaitForCopies<0>();
    Arrive(IsOneArrival(kFull), full);
  }
}

// source: [round][lane][4] words; sums: [lane]. Two warps.
template <Full kFull, Empty kEmpty, Race kRace>
__global__ void Ring(const uint8_t* source, uint32_t* sums) {
  const uint32_t places = SharedBase();
  const uint32_t barriers = places + kPlaces * kPlaceBytes;
  const auto full = [&](int round) { return barriers + round % kPlaces * 16; };
  const auto empty = [&](int round) { return full(round) + 8; };
  const int lane = ThreadIndex() % kLanes;
  if (ThreadIndex() == 0) {
    for (int i = 0; i < kPlaces; ++i) {
      InitBarrier(full(i), IsOneArrival(kFull) ? 1 : kLanes);
      InitBarrier(empty(i), kEmpty == Empty::kOneLane ? 1 : kLanes);
    }
    PublishBarriers();
  }
  SyncBlock();
  uint32_t sum = 0;
  if (ThreadIndex() < kLanes) {
    for (int round = 0; round < kRounds; ++round) {
      const uint32_t place = places + round % kPlaces * kPlaceBytes;
      if (kRace == Race::kWritesEarly) Fill<kFull, kRace>(source, round, place, full(round));
      if (round >= kPlaces) WaitAtBarrier(empty(round), Parity(round / kPlaces - 1));
      if (kRace != Race::kWritesEarly) Fill<kFull, kRace>(source, round, place, full(round));
      if constexpr (kFull != Full::kCopiesLater) {
        Announce<kFull, kRace>(full(round));
      } else if (round > 0) {
        WaitForCopies<1>();
        Announce<kFull, kRace>(full(round - 1));
      }
    }
    if constexpr (kFull == Full::kCopiesLater) {
      WaitForCopies<0>();
      Announce<kFull, kRace>(full(kRounds - 1));
    }
  } else {
    for (int round = 0; round < kRounds; ++round) {
      const uint32_t word =
          places + round % kPlaces * kPlaceBytes + (lane + 1) % kLanes * kPieceBytes;
      if (kRace == Race::kReadsEarly) sum += LoadShared(word);
      WaitAtBarrier(full(round), Parity(round / kPlaces));
      if (kRace != Race::kReadsEarly) sum += LoadShared(word);
      Arrive(kEmpty == Empty::kOneLane, empty(round));
    }
    sums[lane] = sum;
  }
}

// --- A warp's own ring: lanes read what other lanes have copied; no barrier but SyncWarp ---

template <Race kRace>
__global__ void WarpRing(const uint8_t* source, uint32_t* sums) {
  const int lane = ThreadIndex();
  const auto issue = [&](int round) {
    if (round < kRounds) {
      CopyToShared(SharedBase() + round % kPlaces * kPlaceBytes + lane * kPieceBytes,
                   source + round * kPlaceBytes + lane * kPieceBytes);
    }
    CommitCopies();
  };
  for (int round = 0; round < kPlaces - 1; ++round) issue(round);
  uint32_t sum = 0;
  for (int round = 0; round < kRounds; ++round) {
    WaitForCopies<kPlaces - 2>();
    // Now the copies of all lanes have landed, and all have read the round before, whose place is
    // filled next.
    if (kRace == Race::kNone) SyncWarp();
    issue(round + kPlaces - 1);
    sum += LoadShared(SharedBase() + round % kPlaces * kPlaceBytes +
                      (lane + 1) % kLanes * kPieceBytes);
  }
  sums[lane] = sum;
}

// --- Sums of several warps in two buffers: all write theirs, and a round later read all ---

template <Empty kArrival, Race kRace>
__global__ void Sums(const uint8_t* source, uint32_t* sums) {
  constexpr bool kOneLane = kArrival == Empty::kOneLane;
  constexpr int kBufferBytes = kSumWarps * kLanes * 4;
  const uint32_t barriers = SharedBase() + 2 * kBufferBytes;
  const auto full = [&](int round) { return barriers + round % 2 * 16; };
  const auto empty = [&](int round) { return full(round) + 8; };
  const auto buffer = [&](int round) { return SharedBase() + round % 2 * kBufferBytes; };
  const int lane = ThreadIndex() % kLanes;
  const int warp = ThreadIndex() / kLanes;
  if (ThreadIndex() == 0) {
    for (int i = 0; i < 4; ++i) InitBarrier(barriers + 8 * i, kSumWarps * (kOneLane ? 1 : kLanes));
  }
  SyncBlock();
  uint32_t sum = 0;
  const auto add = [&](int round) {
    for (int w = 0; w < kSumWarps; ++w) {
      sum += LoadShared(buffer(round) + (w * kLanes + (lane + 1) % kLanes) * 4);
    }
  };
  const auto finish = [&](int round) {
    if (kRace == Race::kReadsEarly) add(round);
    WaitAtBarrier(full(round), Parity(round / 2));
    if (kRace != Race::kReadsEarly) add(round);
    Arrive(kOneLane, empty(round));
  };
  for (int round = 0; round < kRounds; ++round) {
    const uint32_t value =
        *reinterpret_cast<const uint32_t*>(source + round * kPlaceBytes + lane * kPieceBytes);
    const uint32_t own = buffer(round) + (warp * kLanes + lane) * 4;
    if (kRace == Race::kWritesEarly) StoreShared(own, value);
    if (round >= 2) WaitAtBarrier(empty(round), Parity(round / 2 - 1));
    if (kRace != Race::kWritesEarly) StoreShared(own, value);
    Arrive(kOneLane, full(round));
    if (round > 0) finish(round - 1);
  }
  finish(kRounds - 1);
  if (warp == 0) sums[lane] = sum;
}

// --- The host ---

void CheckCuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "racecheck_patterns: %s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

class Runner {
 public:
  Runner() {
    std::vector<uint32_t> source;
    for (int round = 0; round < kRounds; ++round) {
      for (int i = 0; i < kPlaceBytes / 4; ++i) source.push_back(ValueOf(round, i / 4));
    }
    CheckCuda(cudaMalloc(&source_, source.size() * 4), "cudaMalloc");
    CheckCuda(cudaMalloc(&sums_, kLanes * 4), "cudaMalloc");
    CheckCuda(cudaMemcpy(source_, source.data(), source.size() * 4, cudaMemcpyHostToDevice),
              "copy");
  }

  // Each lane has added what the lane behind it copied, `factor` times.
  template <class Kernel>
  void Run(const std::string& name, bool has_race, Kernel kernel, int num_warps, int factor) {
    constexpr int kSharedBytes = 4096;
    std::vector<uint32_t> sums(kLanes);
    kernel<<<1, num_warps * kLanes, kSharedBytes>>>(source_, sums_);
    CheckCuda(cudaGetLastError(), name.c_str());
    CheckCuda(cudaMemcpy(sums.data(), sums_, kLanes * 4, cudaMemcpyDeviceToHost), name.c_str());
    bool is_right = true;
    for (int lane = 0; lane < kLanes; ++lane) {
      uint32_t expected = 0;
      for (int round = 0; round < kRounds; ++round) {
        expected += ValueOf(round, (lane + 1) % kLanes) * factor;
      }
      is_right = is_right && sums[lane] == expected;
    }
    std::printf("%-60s %s\n", name.c_str(), is_right ? "right" : "wrong");
    if (!has_race && !is_right) failed_ = true;
  }

  bool failed() const { return failed_; }

 private:
  uint8_t* source_ = nullptr;
  uint32_t* sums_ = nullptr;
  bool failed_ = false;
};

template <Full kFull, Empty kEmpty>
void RunRing(Runner* runner) {
  const std::string name = "Ring<" + std::to_string(static_cast<int>(kFull)) + ", " +
                           std::to_string(static_cast<int>(kEmpty)) + ", ";
  runner->Run(name + "0>", false, Ring<kFull, kEmpty, Race::kNone>, 2, 1);
  runner->Run(name + "1>", true, Ring<kFull, kEmpty, Race::kWritesEarly>, 2, 1);
  runner->Run(name + "2>", true, Ring<kFull, kEmpty, Race::kReadsEarly>, 2, 1);
}

template <Full kFull>
void RunRings(Runner* runner) {
  RunRing<kFull, Empty::kEveryLane>(runner);
  RunRing<kFull, Empty::kOneLane>(runner);
}

template <Empty kArrival>
void RunSums(Runner* runner) {
  const std::string name = "Sums<" + std::to_string(static_cast<int>(kArrival)) + ", ";
  runner->Run(name + "0>", false, Sums<kArrival, Race::kNone>, kSumWarps, kSumWarps);
  runner->Run(name + "1>", true, Sums<kArrival, Race::kWritesEarly>, kSumWarps, kSumWarps);
  runner->Run(name + "2>", true, Sums<kArrival, Race::kReadsEarly>, kSumWarps, kSumWarps);
}

int RunAll() {
  Runner runner;
  runner.Run("WarpRing<0>", false, WarpRing<Race::kNone>, 1, 1);
  runner.Run("WarpRing<1>", true, WarpRing<Race::kWritesEarly>, 1, 1);
  RunSums<Empty::kEveryLane>(&runner);
  RunSums<Empty::kOneLane>(&runner);
  RunRings<Full::kStores>(&runner);
  RunRings<Full::kStoresOneLane>(&runner);
  RunRings<Full::kCopies>(&runner);
  RunRings<Full::kCopiesOneLane>(&runner);
  RunRings<Full::kCopiesLater>(&runner);
  RunRings<Full::kCopiesCounted>(&runner);
  RunRings<Full::kBulk>(&runner);
  return runner.failed() ? 1 : 0;
}

}  // namespace wintserve::kernels::cuda

int main() { return wintserve::kernels::cuda::RunAll(); }
