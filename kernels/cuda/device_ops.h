// What kernels ask of a GPU beyond C++: every function is about one instruction. Compiled by nvcc
// they are that; compiled without a toolkit they run in kernels/cuda/emulation, so that a kernel
// written with them alone is tested, every index and barrier of it, on a machine without a GPU.
//
// Shared memory is addressed by byte from SharedBase(). Nothing here is contracted or reassociated:
// arithmetic whose bits count says Add, Multiply, MultiplyAdd.
#pragma once

#if defined(__CUDACC__)

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#define WINTSERVE_DEVICE __device__ __forceinline__
#define WINTSERVE_KERNEL(max_threads) __global__ void __launch_bounds__(max_threads)
#define WINTSERVE_PARAMS const __grid_constant__
#define WINTSERVE_UNROLL _Pragma("unroll")
#define WINTSERVE_UNROLL_BY(count) WINTSERVE_PRAGMA(unroll count)
#define WINTSERVE_PRAGMA(text) _Pragma(#text)
#define WINTSERVE_NO_UNROLL _Pragma("unroll 1")

namespace wintserve::kernels::cuda {

inline constexpr unsigned kWholeWarp = 0xFFFFFFFFu;

WINTSERVE_DEVICE int ThreadIndex() { return static_cast<int>(threadIdx.x); }
WINTSERVE_DEVICE int BlockIndex() { return static_cast<int>(blockIdx.x); }
WINTSERVE_DEVICE int NumBlocks() { return static_cast<int>(gridDim.x); }

WINTSERVE_DEVICE void SyncBlock() { __syncthreads(); }
WINTSERVE_DEVICE void SyncWarp() { __syncwarp(); }

// A warp's lanes, all of which take part.
template <typename T>
WINTSERVE_DEVICE T Shuffle(T value, int source_lane) {
  return __shfl_sync(kWholeWarp, value, source_lane);
}
template <typename T>
WINTSERVE_DEVICE T ShuffleUp(T value, int distance) {  // lanes below `distance` keep theirs
  return __shfl_up_sync(kWholeWarp, value, distance);
}
template <typename T>
WINTSERVE_DEVICE T ShuffleXor(T value, int mask) {
  return __shfl_xor_sync(kWholeWarp, value, mask);
}
WINTSERVE_DEVICE uint32_t Ballot(bool predicate) { return __ballot_sync(kWholeWarp, predicate); }
WINTSERVE_DEVICE bool IsSameInWarp(int value) {
  int is_same = 0;
  __match_all_sync(kWholeWarp, value, &is_same);
  return is_same != 0;
}

WINTSERVE_DEVICE uint32_t SharedBase() {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory));
}

// The same memory as an object of C++.
WINTSERVE_DEVICE unsigned char* SharedMemory() {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  return shared_memory;
}

WINTSERVE_DEVICE uint32_t SharedAddressOf(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// The kernel may have begun before the one launched before it has ended: from here on that one's
// memory is visible. Every block calls this.
WINTSERVE_DEVICE void WaitForPreviousKernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The next kernel may begin, once all blocks have said so. After WaitForPreviousKernel, so that
// the next one sees the memory of the one before this without waiting.
WINTSERVE_DEVICE void LetNextKernelBegin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Of a kernel that reads nothing before.
WINTSERVE_DEVICE void BeginAfterPreviousKernel() {
  WaitForPreviousKernel();
  LetNextKernelBegin();
}

// The blocks of a cluster, which not every device has: where a launch asks for none, and compiled
// for such a device, every block is one of its own.
WINTSERVE_DEVICE void SyncCluster() {
#if __CUDA_ARCH__ >= 900
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
#else
  SyncBlock();
#endif
}
// The object of another block of the cluster that lies in shared memory where `object` does here.
template <typename T>
WINTSERVE_DEVICE T* OfBlock([[maybe_unused]] int block_of_cluster, T* object) {
#if __CUDA_ARCH__ >= 900
  return static_cast<T*>(__cluster_map_shared_rank(object, block_of_cluster));
#else
  return object;
#endif
}

// Barriers in shared memory, 8 bytes each. A phase of one ends when `arrivals` threads have arrived
// and all bytes that it expects have been copied: a wait for the first phase has parity 0, for the
// second 1, for the third 0. What a thread wrote before it arrived is seen by those that waited.
WINTSERVE_DEVICE void InitBarrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
WINTSERVE_DEVICE void ArriveAtBarrier(uint32_t barrier) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(barrier)
               : "memory");
}
WINTSERVE_DEVICE void WaitAtBarrier(uint32_t barrier, uint32_t parity) {
  uint32_t complete = 0;
  do {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(complete)
        : "r"(barrier), "r"(parity)
        : "memory");
#else
    asm volatile(
        "{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(complete)
        : "r"(barrier), "r"(parity)
        : "memory");
#endif
  } while (complete == 0);
}

// An object at an address that is aligned to its size, in any memory.
template <typename T>
WINTSERVE_DEVICE T LoadAligned(const void* from) {
  return *static_cast<const T*>(from);
}
template <typename T>
WINTSERVE_DEVICE void StoreAligned(void* to, const T& value) {
  *static_cast<T*>(to) = value;
}

WINTSERVE_DEVICE void StoreShared(uint32_t address, uint32_t value) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}
WINTSERVE_DEVICE void StoreShared(uint32_t address, uint2 value) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(value.x), "r"(value.y)
               : "memory");
}
WINTSERVE_DEVICE void StoreShared(uint32_t address, uint4 value) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(value.x),
               "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
}
WINTSERVE_DEVICE uint32_t LoadShared(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}
WINTSERVE_DEVICE uint4 LoadShared4(uint32_t address) {
  uint4 value;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(address)
               : "memory");
  return value;
}

// Four matrices of 8 x 8 16-bit elements: lane l gives the address of row l % 8 (16 bytes) of
// matrix l / 8 and gets, of each matrix, elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4.
WINTSERVE_DEVICE void LoadMatrices(uint32_t row_address, uint32_t (&matrices)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(row_address)
               : "memory");
}
// The same of the matrices transposed: rows 2 (l % 4) and 2 (l % 4) + 1 of column l / 4.
WINTSERVE_DEVICE void LoadMatricesTransposed(uint32_t row_address, uint32_t (&matrices)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(row_address)
               : "memory");
}

// c [16, 8] += a [16, 16] * b [16, 8] over a warp: bfloat16 pairs, float32 sums. With g = lane / 4
// and t = lane % 4, and the lower half of a pair first:
//   a: (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8)   and the column behind each
//   b: (2t, g), (2t + 8, g)                                 and the row below each
//   c: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
WINTSERVE_DEVICE void MatrixMultiplyAdd(const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float& c0,
                                        float& c1, float& c2, float& c3) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same with binary16 operands, b in an array, and sum = c + a * b. sum may be c.
WINTSERVE_DEVICE void MatrixMultiplyAddHalves(const uint32_t (&a)[4], const uint32_t (&b)[2],
                                              const float (&c)[4], float (&sum)[4]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
      : "=f"(sum[0]), "=f"(sum[1]), "=f"(sum[2]), "=f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]),
        "f"(c[2]), "f"(c[3]));
}

// Copies 16 bytes, aligned to that, to shared memory; with num_bytes (0 … 16) only so many are
// read, and zeros stand for the rest. A thread's copies since its last CommitCopies make a group;
// WaitForCopies waits until at most kPending of its groups are under way, and what they copied is
// visible to the thread itself, to others after a barrier.
WINTSERVE_DEVICE void CopyToShared(uint32_t address, const void* from, int num_bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from),
               "r"(num_bytes)
               : "memory");
}
WINTSERVE_DEVICE void CopyToShared(uint32_t address, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
}
// A copy or none, without a branch.
WINTSERVE_DEVICE void CopyToSharedIf(bool condition, uint32_t address, const void* from) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %2, 0;\n"
      "@p cp.async.cg.shared.global [%0], [%1], 16; }" ::"r"(address),
      "l"(from), "r"(static_cast<int>(condition))
      : "memory");
}
// 4 bytes.
WINTSERVE_DEVICE void CopyWordToShared(uint32_t address, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(address), "l"(from) : "memory");
}
WINTSERVE_DEVICE void CommitCopies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
WINTSERVE_DEVICE void WaitForCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

WINTSERVE_DEVICE float Add(float a, float b) { return __fadd_rn(a, b); }
WINTSERVE_DEVICE float Subtract(float a, float b) { return __fsub_rn(a, b); }
WINTSERVE_DEVICE float Multiply(float a, float b) { return __fmul_rn(a, b); }
WINTSERVE_DEVICE float MultiplyAdd(float a, float b, float c) { return __fmaf_rn(a, b, c); }
WINTSERVE_DEVICE float Divide(float a, float b) { return __fdiv_rn(a, b); }

WINTSERVE_DEVICE float Abs(float a) { return fabsf(a); }
WINTSERVE_DEVICE float Max(float a, float b) { return fmaxf(a, b); }
WINTSERVE_DEVICE float Exp(float a) { return expf(a); }
WINTSERVE_DEVICE int CountBits(uint32_t bits) { return __popc(bits); }
WINTSERVE_DEVICE float BitsToFloat(uint32_t bits) { return __uint_as_float(bits); }
WINTSERVE_DEVICE uint32_t FloatToBits(float value) { return __float_as_uint(value); }

// 2^x to a relative 2^-22; 0 for minus infinity.
WINTSERVE_DEVICE float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Both rounded to bfloat16, nearest even, `low` in the lower half.
WINTSERVE_DEVICE uint32_t PackBfloat16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
WINTSERVE_DEVICE float LowBfloat16(uint32_t pair) { return __uint_as_float(pair << 16); }
WINTSERVE_DEVICE float HighBfloat16(uint32_t pair) { return __uint_as_float(pair & 0xFFFF0000u); }

// (a & kMask) | bits as one instruction: a LOP3 takes one immediate, so left to itself the compiler
// makes two of it.
template <uint32_t kMask>
WINTSERVE_DEVICE uint32_t AndOr(uint32_t a, uint32_t bits) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(a), "n"(kMask), "r"(bits));
  return result;
}

// Byte kIndex of a word. A dot product with a unit vector: it runs on another pipe than shifts.
template <int kIndex>
WINTSERVE_DEVICE uint32_t ByteOf(uint32_t word) {
  return __dp4a(word, 1u << (8 * kIndex), 0u);
}
// Byte i of the result is byte (nibble i of kSelector) of the eight bytes low, high.
template <uint32_t kSelector>
WINTSERVE_DEVICE uint32_t PermuteBytes(uint32_t low, uint32_t high) {
  return __byte_perm(low, high, kSelector);
}

// a + b in both halves. As a product with 1, which sm_80 has too.
WINTSERVE_DEVICE uint32_t AddBfloat16Pairs(uint32_t a, uint32_t b) {
  uint32_t sum;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(0x3F803F80u), "r"(b));
  return sum;
}

// Bits of the binary16 nearest to a value, ties to even, and the value of such bits.
WINTSERVE_DEVICE uint16_t FloatToHalf(float value) {
  return __half_as_ushort(__float2half_rn(value));
}
WINTSERVE_DEVICE float HalfToFloat(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }

// Both halves of a pair of IEEE halves.
WINTSERVE_DEVICE float2 UnpackHalves(uint32_t pair) {
  __half2 halves;
  asm("mov.b32 %0, %1;" : "=r"(*reinterpret_cast<uint32_t*>(&halves)) : "r"(pair));
  return __half22float2(halves);
}

// Of memory that nobody writes while the kernel runs.
template <typename T>
WINTSERVE_DEVICE T LoadConstant(const T* from) {
  return __ldg(from);
}

// The same, asked for where it stands in the program: compilers move loads that they know to be of
// constants down to where they are needed, also behind WaitForPreviousKernel.
WINTSERVE_DEVICE float LoadConstantEarly(const float* from) {
  float value;
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(value) : "l"(from) : "memory");
  return value;
}
WINTSERVE_DEVICE float4 LoadConstantEarly(const float4* from) {
  float4 value;
  asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "l"(from)
               : "memory");
  return value;
}

// Past the first-level cache, which does not see what other multiprocessors write.
WINTSERVE_DEVICE float4 LoadFromL2(const float4* from) { return __ldcg(from); }
WINTSERVE_DEVICE float LoadFromL2(const float* from) { return __ldcg(from); }
WINTSERVE_DEVICE float2 LoadFromL2(const float2* from) { return __ldcg(from); }

// Brings a line of memory that is read soon into the second-level cache.
WINTSERVE_DEVICE void PrefetchToL2(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

// Data that kernels wrote which this one may have overlapped with: no loads for constant data, and
// past the first-level cache for integers, which are read before WaitForPreviousKernel too.
WINTSERVE_DEVICE int LoadFresh(const int* from) {
  int value;
  asm volatile("ld.global.cg.b32 %0, [%1];" : "=r"(value) : "l"(from));
  return value;
}
WINTSERVE_DEVICE float LoadFresh(const float* from) {
  float value;
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(value) : "l"(from));
  return value;
}
WINTSERVE_DEVICE float4 LoadFresh(const float4* from) {
  float4 value;
  asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "l"(from));
  return value;
}
WINTSERVE_DEVICE uint2 LoadFresh(const uint2* from) {
  uint2 words;
  asm volatile("ld.global.v2.b32 {%0, %1}, [%2];" : "=r"(words.x), "=r"(words.y) : "l"(from));
  return words;
}
WINTSERVE_DEVICE uint4 LoadFresh(const uint4* from) {
  uint4 words;
  asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "l"(from));
  return words;
}

// The same from shared memory or from global memory.
WINTSERVE_DEVICE uint2 LoadFreshAnywhere(const uint2* from) {
  uint2 words;
  asm volatile("ld.v2.b32 {%0, %1}, [%2];" : "=r"(words.x), "=r"(words.y) : "l"(from));
  return words;
}
WINTSERVE_DEVICE uint4 LoadFreshAnywhere(const uint4* from) {
  uint4 words;
  asm volatile("ld.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "l"(from));
  return words;
}

// What this thread wrote before is seen by whoever sees what it writes after.
WINTSERVE_DEVICE void FenceDevice() { __threadfence(); }
// In any memory, also of another block of the cluster.
WINTSERVE_DEVICE int32_t FetchAndAdd(int32_t* counter, int32_t value) {
  return atomicAdd(counter, value);
}
WINTSERVE_DEVICE uint32_t FetchAndAdd(uint32_t* counter, uint32_t value) {
  return atomicAdd(counter, value);
}
WINTSERVE_DEVICE uint32_t FetchAndOr(uint32_t* word, uint32_t bits) { return atomicOr(word, bits); }

}  // namespace wintserve::kernels::cuda

#else

#include "kernels/cuda/emulation/emulated_device.h"

#define WINTSERVE_DEVICE inline
#define WINTSERVE_KERNEL(max_threads) void
#define WINTSERVE_PARAMS const
#define WINTSERVE_UNROLL
#define WINTSERVE_UNROLL_BY(count)
#define WINTSERVE_NO_UNROLL

#endif

namespace wintserve::kernels::cuda {

// How often a warp arrives at a barrier. One lane does for all, behind a SyncWarp, but where each
// is to arrive itself: compute-sanitizer's racecheck does not follow the former
// (tests/gpu/README.md).
#if defined(WINTSERVE_EVERY_LANE_ARRIVES)
inline constexpr int kWarpArrivals = 32;
#else
inline constexpr int kWarpArrivals = 1;
#endif
WINTSERVE_DEVICE void ArriveForWarp(int lane, uint32_t barrier) {
  if (kWarpArrivals == 32 || lane == 0) ArriveAtBarrier(barrier);
}

}  // namespace wintserve::kernels::cuda
