#include "kernels/cuda/emulation/emulated_device.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <utility>

#include "common/check.h"
#include "kernels/cuda/emulation/emulated_threads.h"
#include "kernels/cuda/emulation/operand_values.h"
#include "kernels/formats/bf16.h"
#include "kernels/plan/float16.h"
#include "kernels/plan/half.h"

namespace wintserve::kernels::cuda {

using emulation::block;
using emulation::Exchange;
using emulation::kLanes;
using emulation::lane;
using emulation::LaneInput;
using emulation::SharedBytes;
using emulation::thread;
using emulation::WarpInputs;

namespace {

std::array<uint32_t, 10> Halves(uint64_t value) {
  return {static_cast<uint32_t>(value), static_cast<uint32_t>(value >> 32)};
}
uint64_t Whole(const LaneInput& input) { return uint64_t{input.words[1]} << 32 | input.words[0]; }

uint16_t HalfOf(uint32_t pair, int half) { return static_cast<uint16_t>(pair >> (16 * half)); }
float Bfloat16(uint32_t pair, int half) { return formats::Bfloat16ToFloat(HalfOf(pair, half)); }

uint16_t SharedElement(uint32_t row_address, int element) {
  uint16_t value;
  std::memcpy(&value, SharedBytes(row_address, 16) + 2 * element, sizeof(value));
  return value;
}

// The fragments of the PTX manual: lane 4g + t holds A rows g and g + 8, k 2t, 2t + 1, 2t + 8 and
// 2t + 9 in words 0 to 3; B the same k of column g in words 4 and 5; C rows g and g + 8 of columns
// 2t and 2t + 1 in words 6 to 9, which become the sums.
template <double (*kValueOf)(uint16_t bits)>
void MultiplyFragments(WarpInputs* lanes) {
  double a[16][16];
  double b[16][8];
  for (int l = 0; l < kLanes; ++l) {
    const auto& words = (*lanes)[l].words;
    const int g = l / 4;
    const int t = l % 4;
    for (int i = 0; i < 4; ++i) {
      for (int half = 0; half < 2; ++half) {
        a[g + i % 2 * 8][2 * t + i / 2 * 8 + half] = kValueOf(HalfOf(words[i], half));
        if (i < 2) b[2 * t + i * 8 + half][g] = kValueOf(HalfOf(words[4 + i], half));
      }
    }
  }
  for (int l = 0; l < kLanes; ++l) {
    for (int i = 0; i < 4; ++i) {
      const int row = l / 4 + i / 2 * 8;
      const int column = l % 4 * 2 + i % 2;
      uint32_t& word = (*lanes)[l].words[6 + i];
      double sum = BitsToFloat(word);
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      word = FloatToBits(static_cast<float>(sum));
    }
  }
}

}  // namespace

int ThreadIndex() { return thread().index; }
int BlockIndex() { return block().index; }
int NumBlocks() { return block().launch->num_blocks; }

void SyncBlock() {
  emulation::Block& b = block();
  if (b.at_barrier.size() + 1 < b.threads.size()) {
    emulation::WaitIn(&b.at_barrier);
  } else {
    emulation::WakeAll(&b.at_barrier);
  }
}

void SyncWarp() { Exchange({"bar.warp.sync", {}}); }

void SyncCluster() {
  emulation::Cluster& cluster = *block().cluster;
  if (cluster.at_barrier.size() + 1 < cluster.blocks.size() * block().threads.size()) {
    emulation::WaitIn(&cluster.at_barrier);
  } else {
    emulation::WakeAll(&cluster.at_barrier);
  }
}

int32_t Shuffle(int32_t value, int source_lane) {
  const auto& inputs = Exchange({"shfl.idx", {static_cast<uint32_t>(value)}});
  return static_cast<int32_t>(inputs[source_lane % kLanes].words[0]);
}
float Shuffle(float value, int source_lane) {
  return BitsToFloat(Exchange({"shfl.idx", {FloatToBits(value)}})[source_lane % kLanes].words[0]);
}
int32_t ShuffleUp(int32_t value, int distance) {
  const auto& inputs = Exchange({"shfl.up", {static_cast<uint32_t>(value)}});
  return lane() < distance ? value : static_cast<int32_t>(inputs[lane() - distance].words[0]);
}
uint64_t ShuffleUp(uint64_t value, int distance) {
  const auto& inputs = Exchange({"shfl.up.64", Halves(value)});
  return lane() < distance ? value : Whole(inputs[lane() - distance]);
}
float ShuffleXor(float value, int mask) {
  return BitsToFloat(Exchange({"shfl.bfly", {FloatToBits(value)}})[lane() ^ mask].words[0]);
}
int32_t ShuffleXor(int32_t value, int mask) {
  const auto& inputs = Exchange({"shfl.bfly", {static_cast<uint32_t>(value)}});
  return static_cast<int32_t>(inputs[lane() ^ mask].words[0]);
}
uint64_t ShuffleXor(uint64_t value, int mask) {
  return Whole(Exchange({"shfl.bfly.64", Halves(value)})[lane() ^ mask]);
}
uint32_t Ballot(bool predicate) {
  const auto& inputs = Exchange({"vote.ballot", {predicate ? 1u : 0u}});
  uint32_t votes = 0;
  for (int l = 0; l < kLanes; ++l) votes |= inputs[l].words[0] << l;
  return votes;
}

bool IsSameInWarp(int value) {
  const auto& inputs = Exchange({"match.all", {static_cast<uint32_t>(value)}});
  return std::all_of(inputs.begin(), inputs.end(), [&](const LaneInput& input) {
    return input.words[0] == static_cast<uint32_t>(value);
  });
}

uint32_t SharedBase() { return 0; }
unsigned char* SharedMemory() { return block().shared.data(); }
uint32_t SharedAddressOf(const void* shared) {
  const auto* const base = SharedMemory();
  const auto* const at = static_cast<const unsigned char*>(shared);
  CHECK(at >= base && at <= base + block().shared.size(),
        "block {} thread {}: {} is not in shared memory", block().index, thread().index, shared);
  return static_cast<uint32_t>(at - base);
}
void* SharedOfBlock(int block_of_cluster, const void* object) {
  auto& blocks = block().cluster->blocks;
  const auto offset = static_cast<const unsigned char*>(object) - block().shared.data();
  CHECK(block_of_cluster >= 0 && block_of_cluster < std::ssize(blocks) && offset >= 0 &&
            offset < std::ssize(block().shared),
        "byte {} of the shared memory of block {} of the cluster", offset, block_of_cluster);
  return blocks[block_of_cluster].shared.data() + offset;
}
void StoreShared(uint32_t address, uint32_t value) {
  std::memcpy(SharedBytes(address, 4), &value, 4);
}
void StoreShared(uint32_t address, uint2 value) { std::memcpy(SharedBytes(address, 8), &value, 8); }
void StoreShared(uint32_t address, uint4 value) {
  std::memcpy(SharedBytes(address, 16), &value, 16);
}
uint32_t LoadShared(uint32_t address) {
  uint32_t value;
  std::memcpy(&value, SharedBytes(address, 4), 4);
  return value;
}
uint4 LoadShared4(uint32_t address) {
  uint4 value;
  std::memcpy(&value, SharedBytes(address, 16), 16);
  return value;
}

void LoadMatrices(uint32_t row_address, uint32_t (&matrices)[4]) {
  const auto& inputs = Exchange({"ldmatrix", {row_address}});
  for (int i = 0; i < 4; ++i) {
    const uint32_t row = inputs[8 * i + lane() / 4].words[0];
    const int first = 2 * (lane() % 4);
    matrices[i] = SharedElement(row, first) | uint32_t{SharedElement(row, first + 1)} << 16;
  }
}

void LoadMatricesTransposed(uint32_t row_address, uint32_t (&matrices)[4]) {
  const auto& inputs = Exchange({"ldmatrix.trans", {row_address}});
  for (int i = 0; i < 4; ++i) {
    const int row = 8 * i + 2 * (lane() % 4);
    matrices[i] = SharedElement(inputs[row].words[0], lane() / 4) |
                  uint32_t{SharedElement(inputs[row + 1].words[0], lane() / 4)} << 16;
  }
}

void MatrixMultiplyAdd(const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float& c0, float& c1,
                       float& c2, float& c3) {
  const auto& sums = Exchange({"mma.bf16",
                               {a[0], a[1], a[2], a[3], b0, b1, FloatToBits(c0), FloatToBits(c1),
                                FloatToBits(c2), FloatToBits(c3)}},
                              MultiplyFragments<emulation::Bfloat16Value>)[lane()]
                         .words;
  c0 = BitsToFloat(sums[6]);
  c1 = BitsToFloat(sums[7]);
  c2 = BitsToFloat(sums[8]);
  c3 = BitsToFloat(sums[9]);
}

void MatrixMultiplyAddHalves(const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4],
                             float (&sum)[4]) {
  const auto& sums = Exchange({"mma.f16",
                               {a[0], a[1], a[2], a[3], b[0], b[1], FloatToBits(c[0]),
                                FloatToBits(c[1]), FloatToBits(c[2]), FloatToBits(c[3])}},
                              MultiplyFragments<emulation::Float16Value>)[lane()]
                         .words;
  for (int i = 0; i < 4; ++i) sum[i] = BitsToFloat(sums[6 + i]);
}

void CopyToShared(uint32_t address, const void* from, int num_bytes) {
  emulation::StartCopy(address, from, num_bytes, 16, &thread().open_copies);
}
void CopyToSharedIf(bool condition, uint32_t address, const void* from) {
  if (condition) CopyToShared(address, from);
}
void CopyWordToShared(uint32_t address, const void* from) {
  emulation::StartCopy(address, from, 4, 4, &thread().open_copies);
}

void CommitCopies() {
  emulation::Thread& self = thread();
  self.copy_groups.push_back(std::exchange(self.open_copies, {}));
}

void WaitForCopiesUntil(int pending) {
  auto& groups = thread().copy_groups;
  while (static_cast<int>(groups.size()) > pending) {
    emulation::Land(groups.front());
    groups.erase(groups.begin());
  }
}

void CheckAligned(const void* address, int bytes) {
  CHECK(reinterpret_cast<uintptr_t>(address) % bytes == 0,
        "block {} thread {}: {} is not aligned to {}", block().index, thread().index, address,
        bytes);
}

float Add(float a, float b) { return a + b; }
float Subtract(float a, float b) { return a - b; }
float Multiply(float a, float b) { return a * b; }
float MultiplyAdd(float a, float b, float c) { return std::fma(a, b, c); }
float Divide(float a, float b) { return a / b; }
float Exp2(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;  // subnormal results are flushed
}

uint32_t PackBfloat16(float low, float high) {
  return formats::FloatToBfloat16(low) | uint32_t{formats::FloatToBfloat16(high)} << 16;
}
float LowBfloat16(uint32_t pair) { return Bfloat16(pair, 0); }
float HighBfloat16(uint32_t pair) { return Bfloat16(pair, 1); }
uint32_t AddBfloat16Pairs(uint32_t a, uint32_t b) {
  return PackBfloat16(Bfloat16(a, 0) + Bfloat16(b, 0), Bfloat16(a, 1) + Bfloat16(b, 1));
}
uint16_t FloatToHalf(float value) { return plan::FloatToFloat16(value); }
float HalfToFloat(uint16_t bits) { return plan::Float16ToFloat(bits); }
float2 UnpackHalves(uint32_t pair) {
  return {plan::HalfToFloat(static_cast<uint16_t>(pair)),
          plan::HalfToFloat(static_cast<uint16_t>(pair >> 16))};
}

void FenceDevice() {}
int32_t FetchAndAdd(int32_t* counter, int32_t value) {
  const int32_t before = *counter;
  *counter += value;
  return before;
}
uint32_t FetchAndAdd(uint32_t* counter, uint32_t value) {
  const uint32_t before = *counter;
  *counter += value;
  return before;
}
uint32_t FetchAndOr(uint32_t* word, uint32_t bits) {
  const uint32_t before = *word;
  *word |= bits;
  return before;
}

}  // namespace wintserve::kernels::cuda
