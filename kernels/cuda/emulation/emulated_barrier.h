// Barriers in shared memory for the emulated instructions that count arrivals and bytes at them.
#pragma once

#include <cstdint>

#include "kernels/cuda/emulation/emulated_threads.h"

namespace wintserve::kernels::cuda::emulation {

// Aborts if none has been made at that address, or its eight bytes have been overwritten.
Barrier& BarrierAt(uint32_t address);

// One more thread has arrived, and the phase has `bytes` more to wait for.
void ArriveAt(uint32_t address, int bytes);
// Wakes those that wait, if all threads and bytes are there.
void EndPhaseIfComplete(Barrier* barrier);

}  // namespace wintserve::kernels::cuda::emulation
