// That the emulated instructions do what the PTX manual says of them, and that misuse is found.
#include "kernels/cuda/emulation/emulated_device.h"

#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <vector>

#include "kernels/cuda/device_ops.h"
#include "kernels/formats/bf16.h"

namespace wintserve::kernels::cuda {
namespace {

uint32_t Pair(float low, float high) {
  return formats::FloatToBfloat16(low) | uint32_t{formats::FloatToBfloat16(high)} << 16;
}

TEST(EmulatedDevice, MultipliesTheMatricesThatTheFragmentsHold) {
  // Small integers, so that every product and sum is exact.
  float a[16][16], b[16][8], c[16][8];
  std::mt19937 rng(1);
  const auto draw = [&] { return static_cast<float>(static_cast<int>(rng() % 17) - 8); };
  for (auto& row : a) {
    for (float& value : row) value = draw();
  }
  for (auto& row : b) {
    for (float& value : row) value = draw();
  }
  for (auto& row : c) {
    for (float& value : row) value = draw();
  }
  float d[16][8];
  Emulate({}, [&] {
    const int g = ThreadIndex() / 4;
    const int t = ThreadIndex() % 4;
    const uint32_t fragment_a[4] = {
        Pair(a[g][2 * t], a[g][2 * t + 1]), Pair(a[g + 8][2 * t], a[g + 8][2 * t + 1]),
        Pair(a[g][2 * t + 8], a[g][2 * t + 9]), Pair(a[g + 8][2 * t + 8], a[g + 8][2 * t + 9])};
    const uint32_t b0 = Pair(b[2 * t][g], b[2 * t + 1][g]);
    const uint32_t b1 = Pair(b[2 * t + 8][g], b[2 * t + 9][g]);
    float c0 = c[g][2 * t], c1 = c[g][2 * t + 1], c2 = c[g + 8][2 * t], c3 = c[g + 8][2 * t + 1];
    MatrixMultiplyAdd(fragment_a, b0, b1, c0, c1, c2, c3);
    d[g][2 * t] = c0;
    d[g][2 * t + 1] = c1;
    d[g + 8][2 * t] = c2;
    d[g + 8][2 * t + 1] = c3;
  });
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      float expected = c[i][j];
      for (int k = 0; k < 16; ++k) expected += a[i][k] * b[k][j];
      EXPECT_EQ(d[i][j], expected) << i << " " << j;
    }
  }
}

TEST(EmulatedDevice, LoadsFourMatricesAsTheyAreAndTransposed) {
  const auto element = [](int matrix, int row, int column) {
    return static_cast<uint16_t>(matrix * 1000 + row * 10 + column);
  };
  Emulate({.shared_bytes = 512}, [&] {
    const int lane = ThreadIndex();
    // Rows of the four matrices in reverse order, to see that addresses count.
    const auto address = static_cast<uint32_t>(16 * (31 - lane));
    uint32_t row[4];
    for (int i = 0; i < 4; ++i) {
      row[i] = element(lane / 8, lane % 8, 2 * i) | uint32_t{element(lane / 8, lane % 8, 2 * i + 1)}
                                                        << 16;
    }
    StoreShared(address, uint4{row[0], row[1], row[2], row[3]});
    SyncBlock();
    uint32_t plain[4], transposed[4];
    LoadMatrices(address, plain);
    LoadMatricesTransposed(address, transposed);
    for (int i = 0; i < 4; ++i) {
      const int g = lane / 4;
      const int t = lane % 4;
      EXPECT_EQ(plain[i], element(i, g, 2 * t) | uint32_t{element(i, g, 2 * t + 1)} << 16);
      EXPECT_EQ(transposed[i], element(i, 2 * t, g) | uint32_t{element(i, 2 * t + 1, g)} << 16);
    }
  });
}

TEST(EmulatedDevice, LanesExchangeValues) {
  Emulate({.num_blocks = 2, .threads_per_block = 64}, [] {
    const int lane = ThreadIndex() % 32;
    EXPECT_EQ(Shuffle(100 * lane, 5), 500);
    EXPECT_EQ(ShuffleXor(static_cast<float>(lane), 3), static_cast<float>(lane ^ 3));
    EXPECT_EQ(ShuffleUp(lane, 4), lane < 4 ? lane : lane - 4);
    EXPECT_EQ(Ballot(lane % 3 == 0), 0x49249249u);
  });
}

TEST(EmulatedDevice, ACopyIsThereAtOnceOrOnlyWhenWaitedFor) {
  alignas(16) uint32_t from[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  for (const CopyTiming timing : {CopyTiming::kEarly, CopyTiming::kLate}) {
    Emulate({.shared_bytes = 32, .copy_timing = timing}, [&] {
      if (ThreadIndex() != 0) return;
      StoreShared(16, 99u);
      CopyToShared(0, from);
      CommitCopies();
      CopyToShared(16, from + 4, 8);
      CommitCopies();
      WaitForCopies<1>();
      EXPECT_EQ(LoadShared(0), 1u);
      EXPECT_EQ(LoadShared(16), timing == CopyTiming::kEarly ? 5u : 99u);
      WaitForCopies<0>();
      EXPECT_EQ(LoadShared(20), 6u);
      EXPECT_EQ(LoadShared(24), 0u) << "behind what was asked for lie zeros";
    });
  }
}

TEST(EmulatedDevice, BarriersOrderTheThreadsOfABlock) {
  for (uint32_t seed = 0; seed < 4; ++seed) {
    Emulate({.threads_per_block = 64, .shared_bytes = 256, .seed = seed}, [] {
      const int thread = ThreadIndex();
      for (uint32_t round = 0; round < 3; ++round) {
        StoreShared(4 * thread, round + 10 * thread);
        SyncBlock();
        const int other = (thread + 33) % 64;
        EXPECT_EQ(LoadShared(4 * other), round + 10 * other);
        SyncBlock();
      }
    });
  }
}

using EmulatedDeviceDeathTest = testing::Test;

TEST(EmulatedDevice, BlocksOfAClusterMeetAndReachEachOthersMemory) {
  // Every block counts threads in the memory of the next block of its cluster.
  constexpr int kBlocks = 6;
  constexpr int kCluster = 3;
  constexpr int kThreads = 64;
  std::vector<uint32_t> counts(kBlocks, 0);
  for (uint32_t seed = 0; seed < 5; ++seed) {
    Emulate({.num_blocks = kBlocks,
             .blocks_per_cluster = kCluster,
             .threads_per_block = kThreads,
             .shared_bytes = 16,
             .seed = seed},
            [&] {
              auto* const count = reinterpret_cast<uint32_t*>(SharedMemory());
              if (ThreadIndex() == 0) *count = 100 * BlockIndex();
              SyncCluster();
              FetchAndAdd(OfBlock((BlockIndex() + 1) % kCluster, count), 1u);
              SyncCluster();
              if (ThreadIndex() == kThreads - 1) counts[BlockIndex()] = *count;
            });
    for (int block = 0; block < kBlocks; ++block) {
      EXPECT_EQ(counts[block], 100u * block + kThreads) << "block " << block << " seed " << seed;
    }
  }
}

TEST(EmulatedDeviceDeathTest, FindsWhatWouldHangOrCorrupt) {
  EXPECT_DEATH(Emulate({.threads_per_block = 64},
                       [] {
                         if (ThreadIndex() != 40) SyncBlock();
                       }),
               "block 0: 1 of 64 threads ended, 63 stand at a barrier");
  EXPECT_DEATH(Emulate({},
                       [] {
                         if (ThreadIndex() < 16) {
                           Ballot(true);
                         } else {
                           Shuffle(1, 0);
                         }
                       }),
               "lane [0-9]+ is at (vote.ballot|shfl.idx)");
  EXPECT_DEATH(Emulate({.shared_bytes = 64}, [] { StoreShared(64, 1u); }),
               "4 bytes of shared memory at 64 of 64");
  EXPECT_DEATH(Emulate({.shared_bytes = 64}, [] { LoadShared4(8); }),
               "16 bytes of shared memory at 8 of 64");
}

}  // namespace
}  // namespace wintserve::kernels::cuda
