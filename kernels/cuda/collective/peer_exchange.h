// Small collectives of GPUs that write to each other's memory: each rank writes its part where the
// others find it, raises a flag there and waits for theirs. One kernel, and no more traffic than
// that.
//
// Launches only: no allocation, no waiting, and nothing in the arguments changes from one call to
// the next, so that a captured graph replays them. All ranks launch the same operations with the
// same sizes in the same order; each device runs its launches one after another.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>

namespace wintserve::kernels::cuda {

inline constexpr int kMaxPeerRanks = 4;
inline constexpr int kMaxPeerBlocks = 64;

// What a rank writes to at most, for each of the others, in one launch.
inline constexpr int64_t kPeerSlotBytes = int64_t{2} << 20;

// The memory that every rank of a group lends to all: zeroed before the first launch.
//
//   PeerControl; then slots [2 rounds][2 phases][rank][kPeerSlotBytes]
//
// Rounds alternate between two sets of slots. A kernel of round n ends only after every rank has
// begun round n, hence has ended round n - 1: in round n + 1 nobody reads what round n - 1 wrote.
struct PeerControl {
  uint64_t round;    // of the last launch that has ended; the rank's own
  int32_t arrivals;  // blocks of the launch under way that are done; the rank's own
  // The round up to which a rank has written what a block reads, in each of two phases. 64 bits do
  // not wrap around.
  alignas(128) uint64_t written[2][kMaxPeerBlocks][kMaxPeerRanks];
};
inline constexpr int64_t kPeerControlBytes = 8192;
static_assert(sizeof(PeerControl) <= kPeerControlBytes);

constexpr int64_t PeerMemoryBytes(int world_size) {
  return kPeerControlBytes + 4 * world_size * kPeerSlotBytes;
}

struct PeerGroup {
  int rank = 0;
  int world_size = 0;  // 2 … kMaxPeerRanks
  // [rank] PeerMemoryBytes at the addresses of this device.
  std::array<unsigned char*, kMaxPeerRanks> memory = {};
  // Page-locked host memory. Not 0: launches end without waiting for anybody, with any result.
  const uint32_t* abort_word = nullptr;
};

// Loads the kernels, so that no launch has to while another rank waits. Once a device.
void PreparePeerExchange();

// data [count] = the sum over ranks, added in rank order in float32: equal bits on every rank, in
// any launch. REQUIRES: 1 <= count <= kPeerSlotBytes / 4.
void LaunchPeerAllReduce(const PeerGroup& group, float* data, int64_t count, cudaStream_t stream);

// The same sum with each rank adding up its share, which then goes to all: less traffic with more
// than two ranks, one exchange more. REQUIRES: 1 <= count <= world_size * kPeerSlotBytes / 4.
void LaunchPeerTwoShotAllReduce(const PeerGroup& group, float* data, int64_t count,
                                cudaStream_t stream);

// out [world_size, count] = in [count] of all ranks; 4-byte words that nobody calculates with. out
// does not overlap in. REQUIRES: 1 <= count <= kPeerSlotBytes / 4.
void LaunchPeerAllGather(const PeerGroup& group, const float* in, int64_t count, float* out,
                         cudaStream_t stream);

// data [count] of rank 0 on every rank; words as above.
void LaunchPeerBroadcast(const PeerGroup& group, float* data, int64_t count, cudaStream_t stream);

}  // namespace wintserve::kernels::cuda
