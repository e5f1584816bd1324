#include "kernels/cuda/emulation/emulated_wgmma.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "common/check.h"
#include "kernels/cuda/emulation/emulated_barrier.h"
#include "kernels/cuda/emulation/emulated_threads.h"
#include "kernels/cuda/emulation/operand_values.h"

namespace wintserve::kernels::cuda {
namespace emulation {
namespace {

// The [token][16 k] halves behind a K-major descriptor in the 128-byte swizzle (PTX manual).
std::vector<uint16_t> ReadOperandB(uint64_t descriptor, int num_tokens) {
  CHECK(descriptor >> 62 == 1, "another swizzle than that of 128 bytes");
  const auto start = static_cast<uint32_t>(descriptor & 0x3FFF) << 4;
  const auto stride = static_cast<uint32_t>(descriptor >> 32 & 0x3FFF) << 4;
  std::vector<uint16_t> values(num_tokens * 16);
  for (int token = 0; token < num_tokens; ++token) {
    for (int piece = 0; piece < 2; ++piece) {  // of 16 bytes
      uint32_t address = start + token / 8 * stride + token % 8 * 128 + 16 * piece;
      address ^= (address >> 7 & 7) << 4;
      std::memcpy(&values[token * 16 + 8 * piece], SharedBytes(address, 16), 16);
    }
  }
  return values;
}

// Lane 4g + t holds rows g and g + 8 of tokens 8j + 2t and 8j + 2t + 1.
void Finish(Thread* t, Wgmma* wgmma) {
  const int num_tokens = wgmma->count * 2;
  if (wgmma->b.empty()) wgmma->b = ReadOperandB(wgmma->descriptor, num_tokens);
  double a[2][16];
  for (int quad = 0; quad < 4; ++quad) {
    for (int i = 0; i < 4; ++i) {
      for (int half = 0; half < 2; ++half) {
        a[i % 2][2 * quad + i / 2 * 8 + half] =
            Float16Value(static_cast<uint16_t>(wgmma->a[quad][i] >> (16 * half)));
      }
    }
  }
  HeldSums& held = t->held.at(wgmma->d);
  for (int i = 0; i < wgmma->count; ++i) {
    const int token = i / 4 * 8 + t->index % 4 * 2 + i % 2;
    double sum = wgmma->add ? held.values[i] : 0.0;
    for (int k = 0; k < 16; ++k) sum += a[i / 2 % 2][k] * Float16Value(wgmma->b[token * 16 + k]);
    held.values[i] = static_cast<float>(sum);
  }
  if (--held.num_users > 0) return;
  std::copy(held.values.begin(), held.values.end(), wgmma->d);
  t->held.erase(wgmma->d);
}

}  // namespace
}  // namespace emulation

void ArriveAndExpect(uint32_t barrier, int bytes) { emulation::ArriveAt(barrier, bytes); }

bool IsPhaseOver(uint32_t barrier, uint32_t parity) {
  return emulation::BarrierAt(barrier).parity != parity &&
         emulation::Draw(emulation::block().cluster, 2) == 0;
}

void CopyBulk(uint32_t shared, const void* global, int bytes, uint32_t barrier) {
  CHECK(bytes % 16 == 0, "bytes={}", bytes);
  emulation::Barrier& at = emulation::BarrierAt(barrier);
  emulation::StartCopy(shared, global, bytes, bytes, &at.copies);
  at.copied_bytes += bytes;
  emulation::EndPhaseIfComplete(&at);
}

void ArriveAfterCopies(uint32_t barrier) {
  emulation::Thread& self = emulation::thread();
  emulation::Barrier& at = emulation::BarrierAt(barrier);
  CHECK(self.copy_groups.empty(), "copies are waited for in both ways");
  at.copies.insert(at.copies.end(), self.open_copies.begin(), self.open_copies.end());
  self.open_copies.clear();
  emulation::ArriveAt(barrier, 0);
}

void StartWgmma(bool add, float* d, int count, const uint32_t (&a)[4], uint64_t b) {
  const auto& inputs = emulation::Exchange({"wgmma.mma_async", {a[0], a[1], a[2], a[3]}});
  emulation::Thread& self = emulation::thread();
  emulation::HeldSums& held = self.held[d];
  if (held.num_users++ == 0) {
    held.values.assign(d, d + count);
    std::fill(d, d + count, std::nanf(""));
  }
  emulation::Wgmma wgmma;
  wgmma.add = add;
  wgmma.d = d;
  wgmma.count = count;
  for (int quad = 0; quad < 4; ++quad) {
    std::copy_n(inputs[emulation::lane() / 4 * 4 + quad].words.begin(), 4, wgmma.a[quad].begin());
  }
  wgmma.descriptor = b;
  if (emulation::Draw(self.block->cluster, 2) == 0) wgmma.b = emulation::ReadOperandB(b, count * 2);
  self.open_wgmma.push_back(std::move(wgmma));
}

void CommitWgmma() {
  emulation::Thread& self = emulation::thread();
  self.wgmma_groups.push_back(std::exchange(self.open_wgmma, {}));
}

void WaitForWgmma(int pending) {
  emulation::Thread& self = emulation::thread();
  while (static_cast<int>(self.wgmma_groups.size()) > pending) {
    for (emulation::Wgmma& wgmma : self.wgmma_groups.front()) emulation::Finish(&self, &wgmma);
    self.wgmma_groups.erase(self.wgmma_groups.begin());
  }
}

}  // namespace wintserve::kernels::cuda
