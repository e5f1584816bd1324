#include "kernels/cuda/emulation/emulated_barrier.h"

#include <cstring>

#include "common/check.h"

namespace wintserve::kernels::cuda {
namespace emulation {
namespace {

// What lies where a barrier is, to see when something else is written there.
uint64_t MarkOf(uint32_t address) { return 0x9E3779B97F4A7C15u ^ address; }

}  // namespace

Barrier& BarrierAt(uint32_t address) {
  const auto found = block().barriers.find(address);
  const uint64_t mark = MarkOf(address);
  CHECK(found != block().barriers.end() &&
            std::memcmp(SharedBytes(address, sizeof(mark)), &mark, sizeof(mark)) == 0,
        "block {} thread {}: no barrier at {}", block().index, thread().index, address);
  return found->second;
}

void ArriveAt(uint32_t address, int bytes) {
  Barrier& barrier = BarrierAt(address);
  CHECK(barrier.missing > 0, "block {} thread {} arrives once too often at the barrier at {}",
        block().index, thread().index, address);
  barrier.expected_bytes += bytes;
  --barrier.missing;
  EndPhaseIfComplete(&barrier);
}

void EndPhaseIfComplete(Barrier* barrier) {
  if (barrier->missing > 0 || barrier->copied_bytes != barrier->expected_bytes) return;
  Land(barrier->copies);
  barrier->copies.clear();
  barrier->copied_bytes = 0;
  barrier->expected_bytes = 0;
  barrier->missing = barrier->arrivals;
  barrier->parity ^= 1;
  WakeAll(&barrier->waiting);
}

}  // namespace emulation

void InitBarrier(uint32_t barrier, int arrivals) {
  CHECK(arrivals > 0, "arrivals={}", arrivals);
  const uint64_t mark = emulation::MarkOf(barrier);
  std::memcpy(emulation::SharedBytes(barrier, sizeof(mark)), &mark, sizeof(mark));
  emulation::Barrier& made = emulation::block().barriers[barrier];
  made = {};
  made.arrivals = arrivals;
  made.missing = arrivals;
}

void ArriveAtBarrier(uint32_t barrier) { emulation::ArriveAt(barrier, 0); }

// As on a GPU it cannot tell the end of a phase from that of the one two before it.
void WaitAtBarrier(uint32_t barrier, uint32_t parity) {
  emulation::Barrier& at = emulation::BarrierAt(barrier);
  while (at.parity == parity) emulation::WaitIn(&at.waiting);
}

}  // namespace wintserve::kernels::cuda
