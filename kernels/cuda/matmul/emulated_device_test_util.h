// Runs kernels on the host, one block after another, with what differs on a GPU made visible:
//   threads  are fibers that switch at barriers and warp operations only, in an order drawn anew
//            each time, so that a missing barrier shows as a wrong or uninitialised value
//   copies   to shared memory overwrite their target with NaNs when they start and bring the bytes
//            when they are waited for, the latest moment that the programming model allows
//   shared   memory begins as NaNs
// Addresses of wide accesses must be aligned. mma.m16n8k16 is computed in float64.
//
// EmulatedWgmmaDevice has the instructions of the Hopper kernel as well. Copies that a barrier
// announces bring their bytes when its phase ends. The accumulators of a wgmma are NaNs until it is
// waited for, and its operand in shared memory is read, by chance, when it starts or when it is
// waited for. Registers of its A operand are read when it starts.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <functional>

#include "kernels/cuda/matmul/device_macros.h"

namespace wintserve::kernels::cuda {

class EmulatedDevice {
 public:
  // body(shared memory) for every thread of every block.
  static void Launch(int num_blocks, int num_threads, int64_t shared_bytes, uint32_t seed,
                     const std::function<void(uint8_t*)>& body);

  static int thread();
  static int block();
  static int num_blocks();

  static void SyncBlock();
  static void SyncWarp();
  static void InitBarrier(void* barrier, int count);
  static void ArriveAtBarrier(void* barrier);
  static void WaitBarrier(const void* barrier, int parity);
  static float ShuffleXor(float value, int mask);
  static int ShuffleXor(int value, int mask);
  static int ShuffleUp(int value, int step);
  static int Shuffle(int value, int lane);
  static uint32_t Ballot(bool value);

  // Kernels run one after another.
  static void WaitForPreviousKernel() {}
  static void LetNextKernelBegin() {}

  static void CopyAsync16(void* shared, const void* global) { CopyAsync(shared, global, 16); }
  static void CopyAsync16If(bool condition, void* shared, const void* global) {
    if (condition) CopyAsync(shared, global, 16);
  }
  static void CopyStream16If(bool condition, void* shared, const void* global) {
    if (condition) CopyAsync(shared, global, 16);
  }
  static void CopyAsync4(void* shared, const void* global) { CopyAsync(shared, global, 4); }
  static void CommitCopies();
  template <int kPending>
  static void WaitCopies() {
    WaitForCopies(kPending);
  }

  static Words4 LoadGlobal16(const void* from) { return Load<Words4>(from); }
  static Words2 LoadGlobal8(const void* from) { return Load<Words2>(from); }
  static int LoadFresh4(const int* from) { return Load<int>(from); }
  static float LoadFresh4(const float* from) { return Load<float>(from); }
  static Words4 LoadFresh16(const void* from) { return Load<Words4>(from); }
  static Words4 LoadShared16(const void* from) { return Load<Words4>(from); }
  static Words2 LoadShared8(const void* from) { return Load<Words2>(from); }
  static float LoadShared4(const void* from) { return Load<float>(from); }
  static uint32_t LoadShared2(const void* from) { return Load<uint16_t>(from); }
  static void StoreShared16(void* to, const Words4& words) { StoreGlobal16(to, words); }
  static void StoreGlobal16(void* to, const Words4& words);

  // sum = c + a * b; registers of one lane of mma.m16n8k16 with binary16 operands.
  static void MultiplyAccumulate(const uint32_t (&a)[4], const uint32_t (&b)[2],
                                 const float (&c)[4], float (&sum)[4]);
  template <uint32_t kMask>
  static uint32_t MaskOr(uint32_t bits, uint32_t base) {
    return (bits & kMask) | base;
  }

  template <int kIndex>
  static uint32_t Byte(uint32_t word) {
    return (word >> (8 * kIndex)) & 255;
  }
  // PRMT: byte i of the result is byte (selector nibble i) of the eight bytes low, high.
  template <uint32_t kSelector>
  static uint32_t Permute(uint32_t low, uint32_t high) {
    const uint64_t bytes = low | static_cast<uint64_t>(high) << 32;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) {
      result |= static_cast<uint32_t>((bytes >> (8 * ((kSelector >> (4 * i)) & 7))) & 255)
                << (8 * i);
    }
    return result;
  }

  static float BitsToFloat(uint32_t bits) { return std::bit_cast<float>(bits); }
  static uint32_t FloatToBits(float value) { return std::bit_cast<uint32_t>(value); }
  static float Add(float a, float b) { return a + b; }
  static float MultiplyAdd(float a, float b, float c) { return std::fma(a, b, c); }
  static float Abs(float a) { return std::fabs(a); }
  static float Max(float a, float b) { return std::fmax(a, b); }
  static float Exp(float a) { return std::exp(a); }
  static int CountBits(uint32_t bits) { return std::popcount(bits); }
  static uint16_t FloatToHalf(float value);
  static float HalfToFloat(uint16_t bits);

 private:
  static void CheckAligned(const void* address, int bytes);
  static void CopyAsync(void* shared, const void* global, int bytes);
  static void WaitForCopies(int pending);

  template <typename T>
  static T Load(const void* from) {
    CheckAligned(from, sizeof(T));
    return *static_cast<const T*>(from);
  }
};

class EmulatedWgmmaDevice : public EmulatedDevice {
 public:
  // Shared memory begins at 0.
  static uint32_t SharedAddressOf(const void* shared);

  static void InitBarrier(uint32_t barrier, int arrivals);
  static void PublishBarriers() {}
  static void Arrive(uint32_t barrier) { ArriveAndExpect(barrier, 0); }
  static void ArriveAndExpect(uint32_t barrier, int bytes);
  static void WaitBarrier(uint32_t barrier, uint32_t parity);
  static void CopyBulk(uint32_t shared, const void* global, int bytes, uint32_t barrier);
  static void ArriveAfterCopies(uint32_t barrier);
  static void FenceForWgmma() {}

  template <int kRegisters>
  static void GiveRegisters() {}
  template <int kRegisters>
  static void TakeRegisters() {}

  static void FenceWgmma() {}
  static void CommitWgmma();
  template <int kPending>
  static void WaitWgmma() {
    WaitForWgmma(kPending);
  }
  template <int kCount>
  static void HoldRegisters(float (&)[kCount]) {}
  template <bool kAdd, int kCount>
  static void WgmmaMultiply(float (&d)[kCount], const uint32_t (&a)[4], uint64_t b) {
    Multiply(kAdd, d, kCount, a, b);
  }

 private:
  static void Multiply(bool add, float* d, int count, const uint32_t (&a)[4], uint64_t b);
  static void WaitForWgmma(int pending);
};

}  // namespace wintserve::kernels::cuda
