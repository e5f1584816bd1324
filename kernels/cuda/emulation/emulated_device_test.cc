// That the emulated instructions do what the PTX manual says of them, and that misuse is found.
#include "kernels/cuda/emulation/emulated_device.h"

#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <vector>

#include "kernels/cuda/device_ops.h"
#include "kernels/formats/bf16.h"
#include "kernels/plan/float16.h"

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
      EXPECT_EQ(LoadShared(16), timing == CopyTiming::kEarly ? 5u : 0xFFFFFFFFu);
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

TEST(EmulatedDevice, MultipliesBinary16FragmentsAsMatrices) {
  std::mt19937 rng(1);
  std::vector<float> a(16 * 16), b(16 * 8), c(16 * 8), d(16 * 8);
  for (auto* values : {&a, &b, &c}) {
    for (float& value : *values) value = static_cast<float>(static_cast<int>(rng() % 64) - 32);
  }
  const auto pair = [](float low, float high) {
    return plan::FloatToFloat16(low) | static_cast<uint32_t>(plan::FloatToFloat16(high)) << 16;
  };
  Emulate({.threads_per_block = 32, .shared_bytes = 16, .seed = 1}, [&] {
    const int g = ThreadIndex() / 4;
    const int k = ThreadIndex() % 4 * 2;
    const uint32_t fragment_a[4] = {pair(a[g * 16 + k], a[g * 16 + k + 1]),
                                    pair(a[(g + 8) * 16 + k], a[(g + 8) * 16 + k + 1]),
                                    pair(a[g * 16 + k + 8], a[g * 16 + k + 9]),
                                    pair(a[(g + 8) * 16 + k + 8], a[(g + 8) * 16 + k + 9])};
    const uint32_t fragment_b[2] = {pair(b[k * 8 + g], b[(k + 1) * 8 + g]),
                                    pair(b[(k + 8) * 8 + g], b[(k + 9) * 8 + g])};
    float sums[4] = {c[g * 8 + k], c[g * 8 + k + 1], c[(g + 8) * 8 + k], c[(g + 8) * 8 + k + 1]};
    MatrixMultiplyAddHalves(fragment_a, fragment_b, sums, sums);
    d[g * 8 + k] = sums[0];
    d[g * 8 + k + 1] = sums[1];
    d[(g + 8) * 8 + k] = sums[2];
    d[(g + 8) * 8 + k + 1] = sums[3];
  });
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      float expected = c[row * 8 + column];
      for (int k = 0; k < 16; ++k) expected += a[row * 16 + k] * b[k * 8 + column];
      EXPECT_EQ(d[row * 8 + column], expected);
    }
  }
}

TEST(EmulatedDevice, BringsCopiesOnlyWhenTheyAreWaitedFor) {
  alignas(16) const uint32_t source[4] = {1, 2, 3, 4};
  Emulate({.threads_per_block = 32, .shared_bytes = 512, .seed = 1}, [&] {
    unsigned char* const shared = SharedMemory();
    auto* own = reinterpret_cast<uint32_t*>(shared + ThreadIndex() * 16);
    own[0] = 7;
    CopyToShared(SharedAddressOf(own), source);
    CommitCopies();
    EXPECT_EQ(own[0], 0xFFFFFFFFu);
    WaitForCopies<1>();
    EXPECT_EQ(own[0], 0xFFFFFFFFu);
    WaitForCopies<0>();
    EXPECT_EQ(own[3], 4u);
  });
}

TEST(EmulatedDevice, AMissingBarrierShowsInSomeOrderAndAPresentOneNever) {
  int num_wrong = 0;
  for (uint32_t seed = 0; seed < 20; ++seed) {
    for (const bool barrier : {false, true}) {
      bool wrong = false;
      Emulate({.threads_per_block = 64, .shared_bytes = 256, .seed = seed}, [&] {
        unsigned char* const shared = SharedMemory();
        auto* values = reinterpret_cast<int32_t*>(shared);
        values[ThreadIndex()] = ThreadIndex();
        if (barrier) SyncBlock();
        wrong |= values[63 - ThreadIndex()] != 63 - ThreadIndex();
      });
      if (barrier) {
        EXPECT_FALSE(wrong);
      }
      num_wrong += wrong ? 1 : 0;
    }
  }
  EXPECT_EQ(num_wrong, 20);
}

TEST(EmulatedDevice, ABarrierInMemoryCompletesWithEachCountOfArrivals) {
  constexpr int kRounds = 5;
  int arrived = 0;
  Emulate({.threads_per_block = 64, .shared_bytes = 16, .seed = 1}, [&] {
    const uint32_t barrier = SharedBase();
    const int thread = ThreadIndex();
    if (thread == 0) InitBarrier(barrier, 63);
    SyncBlock();
    for (int round = 0; round < kRounds; ++round) {
      if (thread != 0) {
        ++arrived;
        ArriveAtBarrier(barrier);
      }
      WaitAtBarrier(barrier, round % 2);
      EXPECT_EQ(arrived, 63 * (round + 1));
      SyncBlock();
    }
  });
}

using EmulatedDeviceDeathTest = testing::Test;

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
  EXPECT_DEATH(Emulate({.shared_bytes = 64}, [] { LoadAligned<uint4>(SharedMemory() + 8); }),
               "is not aligned to 16");
  EXPECT_DEATH(Emulate({.shared_bytes = 64},
                       [] {
                         if (ThreadIndex() == 0) InitBarrier(8, 32);
                         SyncBlock();
                         StoreShared(8, 1u);
                         ArriveAtBarrier(8);
                       }),
               "no barrier at 8");
  EXPECT_DEATH(Emulate({.shared_bytes = 64},
                       [] {
                         if (ThreadIndex() == 0) InitBarrier(8, 33);
                         SyncBlock();
                         ArriveAtBarrier(8);
                         WaitAtBarrier(8, 0);
                       }),
               "0 of 32 threads ended, .* at barriers in shared memory");
}

}  // namespace
}  // namespace wintserve::kernels::cuda
