// The instructions of kernels/cuda/wgmma_ops.h on the emulated device. Copies that a barrier counts
// land when its phase ends. The accumulators of a wgmma are NaNs until it is waited for, and its
// operand in shared memory is read, by chance, when it starts or when it is waited for. Registers
// of its A operand are read when it starts.
#pragma once

#include <cstdint>

#include "kernels/cuda/emulation/emulated_device.h"

namespace wintserve::kernels::cuda {

inline void PublishBarriers() {}
void ArriveAndExpect(uint32_t barrier, int bytes);
inline void SpinAtBarrier(uint32_t barrier, uint32_t parity) { WaitAtBarrier(barrier, parity); }
// By chance it says no though the phase is over.
bool IsPhaseOver(uint32_t barrier, uint32_t parity);
void CopyBulk(uint32_t shared, const void* global, int bytes, uint32_t barrier);
void ArriveAfterCopies(uint32_t barrier);
inline void FenceForWgmma() {}

template <int kRegisters>
void GiveRegisters() {}
template <int kRegisters>
void TakeRegisters() {}

inline void FenceWgmma() {}
void CommitWgmma();
void WaitForWgmma(int pending);
template <int kPending>
void WaitWgmma() {
  WaitForWgmma(kPending);
}
template <int kCount>
void HoldRegisters(float (&)[kCount]) {}
void StartWgmma(bool add, float* d, int count, const uint32_t (&a)[4], uint64_t b);
template <bool kAdd = true, int kCount>
void WgmmaMultiply(float (&d)[kCount], const uint32_t (&a)[4], uint64_t b) {
  StartWgmma(kAdd, d, kCount, a, b);
}

}  // namespace wintserve::kernels::cuda
