// A GPU for tests: runs the threads of a kernel's blocks as coroutines and gives the functions of
// kernels/cuda/device_ops.h the meaning that the PTX manual gives their instructions.
//
// What it finds: a wrong index or fragment, shared memory out of bounds, a misaligned access, a
// barrier that some thread misses, lanes of a warp that meet in different instructions, a copy that
// is used before it was waited for or overwrites what is still read (CopyTiming::kLate: from its
// start until the wait, the latest moment that the programming model allows, NaNs stand there;
// kEarly: it has landed at once). Shared memory begins as NaNs. The order of blocks, and at each
// wait which thread goes on, is drawn from the seed, so a missing barrier gives wrong results
// sooner or later. What it does not find: a wrong operand in a PTX string, and anything about
// memory order. Matrix products are summed in float64.
//
// Threading: one emulated launch at a time in a process.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <functional>

// The vector types of CUDA's headers, as far as they are used.
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace wintserve::kernels::cuda {

enum class CopyTiming { kEarly, kLate };

struct EmulatedLaunch {
  int num_blocks = 1;          // a multiple of blocks_per_cluster
  int blocks_per_cluster = 1;  // consecutive ones
  int threads_per_block = 32;  // a multiple of 32
  int shared_bytes = 0;
  uint32_t seed = 0;
  CopyTiming copy_timing = CopyTiming::kLate;
};

// Calls `kernel` once for each thread of each block. Aborts, naming block and thread, on what is
// listed above.
void Emulate(const EmulatedLaunch& launch, const std::function<void()>& kernel);

int ThreadIndex();
int BlockIndex();
int NumBlocks();

void SyncBlock();
void SyncWarp();
void SyncCluster();

float Shuffle(float value, int source_lane);
int32_t Shuffle(int32_t value, int source_lane);
int32_t ShuffleUp(int32_t value, int distance);
uint64_t ShuffleUp(uint64_t value, int distance);
float ShuffleXor(float value, int mask);
int32_t ShuffleXor(int32_t value, int mask);
uint64_t ShuffleXor(uint64_t value, int mask);
uint32_t Ballot(bool predicate);
bool IsSameInWarp(int value);

uint32_t SharedBase();
unsigned char* SharedMemory();
uint32_t SharedAddressOf(const void* shared);
void* SharedOfBlock(int block_of_cluster, const void* object);
template <typename T>
T* OfBlock(int block_of_cluster, T* object) {
  return static_cast<T*>(SharedOfBlock(block_of_cluster, object));
}

// Launches run one after another.
inline void WaitForPreviousKernel() {}
inline void LetNextKernelBegin() {}
inline void BeginAfterPreviousKernel() {}

void InitBarrier(uint32_t barrier, int arrivals);
void ArriveAtBarrier(uint32_t barrier);
void WaitAtBarrier(uint32_t barrier, uint32_t parity);

void CheckAligned(const void* address, int bytes);
template <typename T>
T LoadAligned(const void* from) {
  CheckAligned(from, sizeof(T));
  return *static_cast<const T*>(from);
}
template <typename T>
void StoreAligned(void* to, const T& value) {
  CheckAligned(to, sizeof(T));
  *static_cast<T*>(to) = value;
}

void StoreShared(uint32_t address, uint32_t value);
void StoreShared(uint32_t address, uint2 value);
void StoreShared(uint32_t address, uint4 value);
uint32_t LoadShared(uint32_t address);
uint4 LoadShared4(uint32_t address);

void LoadMatrices(uint32_t row_address, uint32_t (&matrices)[4]);
void LoadMatricesTransposed(uint32_t row_address, uint32_t (&matrices)[4]);
void MatrixMultiplyAdd(const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float& c0, float& c1,
                       float& c2, float& c3);
void MatrixMultiplyAddHalves(const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4],
                             float (&sum)[4]);

void CopyToShared(uint32_t address, const void* from, int num_bytes = 16);
void CopyToSharedIf(bool condition, uint32_t address, const void* from);
void CopyWordToShared(uint32_t address, const void* from);
void CommitCopies();
void WaitForCopiesUntil(int pending);
template <int kPending>
void WaitForCopies() {
  WaitForCopiesUntil(kPending);
}

// Built in under nvcc.
constexpr int32_t min(int32_t a, int32_t b) { return a < b ? a : b; }
constexpr int32_t max(int32_t a, int32_t b) { return a < b ? b : a; }

float Add(float a, float b);
float Subtract(float a, float b);
float Multiply(float a, float b);
float MultiplyAdd(float a, float b, float c);
float Divide(float a, float b);
float Exp2(float x);
inline float Abs(float a) { return std::fabs(a); }
inline float Max(float a, float b) { return std::fmax(a, b); }
inline float Exp(float a) { return std::exp(a); }
inline int CountBits(uint32_t bits) { return std::popcount(bits); }
inline float BitsToFloat(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t FloatToBits(float value) { return std::bit_cast<uint32_t>(value); }

uint32_t PackBfloat16(float low, float high);
float LowBfloat16(uint32_t pair);
float HighBfloat16(uint32_t pair);
template <uint32_t kMask>
uint32_t AndOr(uint32_t a, uint32_t bits) {
  return (a & kMask) | bits;
}
template <int kIndex>
uint32_t ByteOf(uint32_t word) {
  return (word >> (8 * kIndex)) & 255;
}
template <uint32_t kSelector>
uint32_t PermuteBytes(uint32_t low, uint32_t high) {
  const uint64_t bytes = low | uint64_t{high} << 32;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<uint32_t>((bytes >> (8 * ((kSelector >> (4 * i)) & 7))) & 255) << (8 * i);
  }
  return result;
}
uint32_t AddBfloat16Pairs(uint32_t a, uint32_t b);
uint16_t FloatToHalf(float value);
float HalfToFloat(uint16_t bits);
float2 UnpackHalves(uint32_t pair);

template <typename T>
T LoadConstant(const T* from) {
  return LoadAligned<T>(from);
}
inline void PrefetchToL2(const void*) {}
inline int32_t LoadFresh(const int32_t* from) { return LoadAligned<int32_t>(from); }
inline float LoadFresh(const float* from) { return LoadAligned<float>(from); }
inline float4 LoadFresh(const float4* from) { return LoadAligned<float4>(from); }
inline uint2 LoadFresh(const uint2* from) { return LoadAligned<uint2>(from); }
inline uint4 LoadFresh(const uint4* from) { return LoadAligned<uint4>(from); }
inline uint2 LoadFreshAnywhere(const uint2* from) { return LoadAligned<uint2>(from); }
inline uint4 LoadFreshAnywhere(const uint4* from) { return LoadAligned<uint4>(from); }
inline float4 LoadFromL2(const float4* from) { return *from; }
inline float LoadFromL2(const float* from) { return *from; }
inline float2 LoadFromL2(const float2* from) { return *from; }
void FenceDevice();
int32_t FetchAndAdd(int32_t* counter, int32_t value);
uint32_t FetchAndAdd(uint32_t* counter, uint32_t value);
uint32_t FetchAndOr(uint32_t* word, uint32_t bits);

}  // namespace wintserve::kernels::cuda
