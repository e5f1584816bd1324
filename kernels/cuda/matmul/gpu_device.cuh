// The Device of the kernels on a GPU: PTX of sm_80 and later.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/cuda/matmul/device_macros.h"

namespace wintserve::kernels::cuda {

struct GpuDevice {
  static WINTSERVE_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
  static WINTSERVE_DEVICE int block() { return static_cast<int>(blockIdx.x); }
  static WINTSERVE_DEVICE int num_blocks() { return static_cast<int>(gridDim.x); }

  static WINTSERVE_DEVICE void SyncBlock() { __syncthreads(); }
  static WINTSERVE_DEVICE void SyncWarp() { __syncwarp(); }
  static WINTSERVE_DEVICE float ShuffleXor(float value, int mask) {
    return __shfl_xor_sync(kAllLanes, value, mask);
  }
  static WINTSERVE_DEVICE int ShuffleXor(int value, int mask) {
    return __shfl_xor_sync(kAllLanes, value, mask);
  }
  static WINTSERVE_DEVICE int ShuffleUp(int value, int step) {
    return __shfl_up_sync(kAllLanes, value, step);
  }
  static WINTSERVE_DEVICE int Shuffle(int value, int lane) {
    return __shfl_sync(kAllLanes, value, lane);
  }
  static WINTSERVE_DEVICE uint32_t Ballot(bool value) { return __ballot_sync(kAllLanes, value); }

  // The kernel may have begun before the one launched before it has ended: from here on that one's
  // memory is visible. Every block calls this.
  static WINTSERVE_DEVICE void WaitForPreviousKernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  }
  // The next kernel may begin, once all blocks have said so. After WaitForPreviousKernel, so that
  // the next one sees the memory of the one before this without waiting.
  static WINTSERVE_DEVICE void LetNextKernelBegin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
  }

  // Barriers in shared memory, 8 bytes each. They complete whenever `count` threads have arrived; a
  // wait for the first completion has parity 0, for the second 1, for the third 0. What a thread
  // wrote before it arrived is seen by those that have waited.
  static WINTSERVE_DEVICE void InitBarrier(void* barrier, int count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(SharedAddress(barrier)), "r"(count)
                 : "memory");
  }
  static WINTSERVE_DEVICE void ArriveAtBarrier(void* barrier) {
    asm volatile(
        "{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(SharedAddress(barrier))
        : "memory");
  }
  static WINTSERVE_DEVICE void WaitBarrier(void* barrier, int parity) {
    const uint32_t address = SharedAddress(barrier);
    uint32_t complete = 0;
    do {
#if __CUDA_ARCH__ >= 900
      asm volatile(
          "{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
          : "=r"(complete)
          : "r"(address), "r"(parity)
          : "memory");
#else
      asm volatile(
          "{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;"
          " }"
          : "=r"(complete)
          : "r"(address), "r"(parity)
          : "memory");
#endif
    } while (complete == 0);
  }

  // Asynchronous copies to shared memory, past the L1 cache.
  static WINTSERVE_DEVICE void CopyAsync16(void* shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(SharedAddress(shared)),
                 "l"(global)
                 : "memory");
  }
  // A copy or none, without a branch.
  static WINTSERVE_DEVICE void CopyAsync16If(bool condition, void* shared, const void* global) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %2, 0;\n"
        "@p cp.async.cg.shared.global [%0], [%1], 16; }" ::"r"(SharedAddress(shared)),
        "l"(global), "r"(static_cast<int>(condition))
        : "memory");
  }
  // For what is read once.
  static WINTSERVE_DEVICE void CopyStream16If(bool condition, void* shared, const void* global) {
    CopyAsync16If(condition, shared, global);
  }
  static WINTSERVE_DEVICE void CopyAsync4(void* shared, const void* global) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(SharedAddress(shared)),
                 "l"(global)
                 : "memory");
  }
  static WINTSERVE_DEVICE void CommitCopies() {
    asm volatile("cp.async.commit_group;" ::: "memory");
  }
  template <int kPending>
  static WINTSERVE_DEVICE void WaitCopies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
  }

  // Data that no thread of the kernel writes.
  static WINTSERVE_DEVICE Words4 LoadGlobal16(const void* from) {
    const uint4 words = __ldg(static_cast<const uint4*>(from));
    return {words.x, words.y, words.z, words.w};
  }
  static WINTSERVE_DEVICE Words2 LoadGlobal8(const void* from) {
    const uint2 words = __ldg(static_cast<const uint2*>(from));
    return {words.x, words.y};
  }
  // Data that kernels wrote which this one may have overlapped with: no loads for constant data,
  // and past the L1 cache for integers, which are read before WaitForPreviousKernel too.
  static WINTSERVE_DEVICE int LoadFresh4(const int* from) {
    int value;
    asm volatile("ld.global.cg.b32 %0, [%1];" : "=r"(value) : "l"(from));
    return value;
  }
  static WINTSERVE_DEVICE float LoadFresh4(const float* from) {
    float value;
    asm volatile("ld.global.f32 %0, [%1];" : "=f"(value) : "l"(from));
    return value;
  }
  static WINTSERVE_DEVICE Words4 LoadFresh16(const void* from) {
    Words4 words;
    asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
                 : "l"(from));
    return words;
  }
  static WINTSERVE_DEVICE Words4 LoadShared16(const void* from) {
    const uint4 words = *static_cast<const uint4*>(from);
    return {words.x, words.y, words.z, words.w};
  }
  static WINTSERVE_DEVICE Words2 LoadShared8(const void* from) {
    const uint2 words = *static_cast<const uint2*>(from);
    return {words.x, words.y};
  }
  static WINTSERVE_DEVICE float LoadShared4(const void* from) {
    return *static_cast<const float*>(from);
  }
  static WINTSERVE_DEVICE uint32_t LoadShared2(const void* from) {
    return *static_cast<const uint16_t*>(from);
  }
  static WINTSERVE_DEVICE void StoreShared16(void* to, const Words4& words) {
    *static_cast<uint4*>(to) = make_uint4(words.x, words.y, words.z, words.w);
  }
  static WINTSERVE_DEVICE void StoreGlobal16(void* to, const Words4& words) {
    *static_cast<uint4*>(to) = make_uint4(words.x, words.y, words.z, words.w);
  }

  // sum = c + a * b; registers of one lane of mma.m16n8k16 with binary16 operands. sum may be c.
  static WINTSERVE_DEVICE void MultiplyAccumulate(const uint32_t (&a)[4], const uint32_t (&b)[2],
                                                  const float (&c)[4], float (&sum)[4]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
        : "=f"(sum[0]), "=f"(sum[1]), "=f"(sum[2]), "=f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]),
          "f"(c[2]), "f"(c[3]));
  }

  // (bits & kMask) | base in one instruction: a LOP3 takes one immediate, so left to itself the
  // compiler makes two of it.
  template <uint32_t kMask>
  static WINTSERVE_DEVICE uint32_t MaskOr(uint32_t bits, uint32_t base) {
    uint32_t result;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(bits), "n"(kMask), "r"(base));
    return result;
  }
  // A dot product with a unit vector: it runs on another pipe than the decoding's shifts.
  template <int kIndex>
  static WINTSERVE_DEVICE uint32_t Byte(uint32_t word) {
    return __dp4a(word, 1u << (8 * kIndex), 0u);
  }
  template <uint32_t kSelector>
  static WINTSERVE_DEVICE uint32_t Permute(uint32_t low, uint32_t high) {
    return __byte_perm(low, high, kSelector);
  }

  static WINTSERVE_DEVICE float BitsToFloat(uint32_t bits) { return __uint_as_float(bits); }
  static WINTSERVE_DEVICE uint32_t FloatToBits(float value) { return __float_as_uint(value); }
  // Never fused with a product before it, so that a sum has the same bits in every kernel.
  static WINTSERVE_DEVICE float Add(float a, float b) { return __fadd_rn(a, b); }
  static WINTSERVE_DEVICE float MultiplyAdd(float a, float b, float c) {
    return __fmaf_rn(a, b, c);
  }
  static WINTSERVE_DEVICE float Abs(float a) { return fabsf(a); }
  static WINTSERVE_DEVICE float Max(float a, float b) { return fmaxf(a, b); }
  static WINTSERVE_DEVICE float Exp(float a) { return expf(a); }
  static WINTSERVE_DEVICE int CountBits(uint32_t bits) { return __popc(bits); }
  static WINTSERVE_DEVICE uint16_t FloatToHalf(float value) {
    return __half_as_ushort(__float2half_rn(value));
  }
  static WINTSERVE_DEVICE float HalfToFloat(uint16_t bits) {
    return __half2float(__ushort_as_half(bits));
  }

 private:
  static constexpr unsigned kAllLanes = 0xFFFFFFFFu;

  static WINTSERVE_DEVICE uint32_t SharedAddress(const void* shared) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  }
};

}  // namespace wintserve::kernels::cuda
