// Ranks as threads of this process, on as many GPUs as there are: on one, all ranks share it.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <barrier>
#include <bit>
#include <chrono>
#include <cmath>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "common/check.h"
#include "kernels/cuda/collective/peer_exchange.h"
#include "kernels/cuda/collective/peer_memory.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/device.h"

namespace wintserve::kernels::cuda {
namespace {

constexpr int64_t kSlotFloats = kPeerSlotBytes / static_cast<int64_t>(sizeof(float));
// Of one operation: enough for the largest, with room to be misaligned.
constexpr int64_t kMaxFloats = kMaxPeerRanks * kSlotFloats + 4;

template <typename T>
T Must(absl::StatusOr<T> value) {
  CHECK(value.ok(), "{}", value.status().ToString());
  return *std::move(value);
}

// Everything is allocated before the first operation: freeing waits for the device, and that for
// ranks that share it.
struct Rank {
  int rank = 0;
  Stream stream;
  DeviceBuffer in;
  DeviceBuffer out;  // of a gather
  PinnedBuffer host;
  std::unique_ptr<PeerMemory> peers;

  const PeerGroup& group() const { return peers->group(); }
  void Upload(const std::vector<float>& data, int64_t offset = 0) const {
    std::copy(data.begin(), data.end(), host.data<float>());
    CUDA_CALL(cudaMemcpyAsync, in.data<float>() + offset, host.data(), data.size() * sizeof(float),
              cudaMemcpyHostToDevice, stream.get());
  }
  std::vector<float> Download(const float* from, int64_t count) const {
    CUDA_CALL(cudaMemcpyAsync, host.data(), from, count * sizeof(float), cudaMemcpyDeviceToHost,
              stream.get());
    CUDA_CALL(cudaStreamSynchronize, stream.get());
    return {host.data<float>(), host.data<float>() + count};
  }
};

void OnRanks(int world_size, const std::function<void(Rank&)>& body) {
  const int num_devices = NumVisibleDevices();
  CHECK(num_devices > 0);
  std::vector<PeerHandle> handles(world_size);
  std::barrier<> barrier(world_size);
  std::vector<std::thread> threads;
  for (int r = 0; r < world_size; ++r) {
    threads.emplace_back([&, r] {
      Must(UseDevice(r % num_devices));
      Rank rank;
      rank.rank = r;
      rank.stream = Must(CreateStream());
      rank.in = Must(DeviceBuffer::Allocate(kMaxFloats * sizeof(float)));
      rank.out = Must(DeviceBuffer::Allocate(kMaxFloats * sizeof(float)));
      rank.host = Must(PinnedBuffer::Allocate(kMaxFloats * sizeof(float)));
      rank.peers = Must(PeerMemory::Create(r, world_size));
      handles[r] = rank.peers->handle();
      barrier.arrive_and_wait();
      const absl::Status opened = rank.peers->Open(handles);
      CHECK(opened.ok(), "{}", opened.ToString());
      barrier.arrive_and_wait();
      body(rank);
      CUDA_CALL(cudaStreamSynchronize, rank.stream.get());
      barrier.arrive_and_wait();
    });
  }
  for (std::thread& thread : threads) thread.join();
}

std::vector<float> RankData(int rank, int64_t count, uint32_t seed) {
  std::minstd_rand random(seed * 31 + rank + 1);
  std::vector<float> data(count);
  for (float& value : data) {
    const auto bits = static_cast<uint32_t>(random());
    value = std::ldexp(static_cast<float>(static_cast<int32_t>(bits % 0x1FFFFFF) - 0xFFFFFF),
                       static_cast<int>(bits >> 7) % 24 - 24);
  }
  return data;
}

std::vector<float> RankOrderSum(int world_size, int64_t count, uint32_t seed) {
  std::vector<float> sum = RankData(0, count, seed);
  for (int rank = 1; rank < world_size; ++rank) {
    const std::vector<float> part = RankData(rank, count, seed);
    for (int64_t i = 0; i < count; ++i) sum[i] += part[i];
  }
  return sum;
}

// The first place where the bits differ, or nothing.
std::string Difference(const std::vector<float>& got, const std::vector<float>& expected) {
  CHECK(got.size() == expected.size());
  for (size_t i = 0; i < got.size(); ++i) {
    if (std::bit_cast<uint32_t>(got[i]) == std::bit_cast<uint32_t>(expected[i])) continue;
    return fmt::format("at {} of {}: {} instead of {}", i, got.size(), got[i], expected[i]);
  }
  return "";
}

class PeerExchange : public testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Ranks, PeerExchange, testing::Values(2, 3, 4),
                         [](const auto& info) { return fmt::format("{}", info.param); });

const std::vector<int64_t> kCounts = {
    1, 2, 3, 4, 5, 255, 256, 1021, 4096, 8191, 65536, 99991, 131072, kSlotFloats - 1, kSlotFloats};

TEST_P(PeerExchange, AllReducesAreTheRankOrderSumToTheBit) {
  OnRanks(GetParam(), [](Rank& rank) {
    for (const int64_t count : kCounts) {
      for (const int64_t offset : {0, 1}) {  // misaligned for vectors
        const auto seed = static_cast<uint32_t>(count + offset);
        rank.Upload(RankData(rank.rank, count, seed), offset);
        float* data = rank.in.data<float>() + offset;
        LaunchPeerAllReduce(rank.group(), data, count, rank.stream.get());
        EXPECT_EQ(Difference(rank.Download(data, count), RankOrderSum(GetParam(), count, seed)), "")
            << "rank " << rank.rank << ", " << count << " floats from " << offset;
      }
    }
  });
}

TEST_P(PeerExchange, TwoShotAllReducesAreTheSame) {
  OnRanks(GetParam(), [](Rank& rank) {
    std::vector<int64_t> counts = kCounts;
    counts.push_back(GetParam() * kSlotFloats);
    counts.push_back(GetParam() * kSlotFloats - 1);
    for (const int64_t count : counts) {
      for (const int64_t offset : {0, 1}) {
        const auto seed = static_cast<uint32_t>(count + offset);
        rank.Upload(RankData(rank.rank, count, seed), offset);
        float* data = rank.in.data<float>() + offset;
        LaunchPeerTwoShotAllReduce(rank.group(), data, count, rank.stream.get());
        EXPECT_EQ(Difference(rank.Download(data, count), RankOrderSum(GetParam(), count, seed)), "")
            << "rank " << rank.rank << ", " << count << " floats from " << offset;
      }
    }
  });
}

TEST_P(PeerExchange, GathersAndBroadcastsMoveEveryWord) {
  OnRanks(GetParam(), [](Rank& rank) {
    for (const int64_t count : kCounts) {
      const auto seed = static_cast<uint32_t>(count);
      rank.Upload(RankData(rank.rank, count, seed));
      LaunchPeerAllGather(rank.group(), rank.in.data<float>(), count, rank.out.data<float>(),
                          rank.stream.get());
      std::vector<float> expected;
      for (int r = 0; r < GetParam(); ++r) {
        const std::vector<float> part = RankData(r, count, seed);
        expected.insert(expected.end(), part.begin(), part.end());
      }
      EXPECT_EQ(Difference(rank.Download(rank.out.data<float>(), GetParam() * count), expected), "")
          << "gather, rank " << rank.rank << ", " << count << " floats";
      LaunchPeerBroadcast(rank.group(), rank.in.data<float>(), count, rank.stream.get());
      EXPECT_EQ(Difference(rank.Download(rank.in.data<float>(), count), RankData(0, count, seed)),
                "")
          << "broadcast, rank " << rank.rank << ", " << count << " floats";
    }
  });
}

// Launches run ahead of the device here: what is not safe between rounds shows.
TEST_P(PeerExchange, AThousandRoundsOfAllSizesInARow) {
  OnRanks(GetParam(), [](Rank& rank) {
    constexpr int kRounds = 1000;
    constexpr int64_t kCount = 40'000;
    std::mt19937 sizes(1);  // the same on every rank
    std::mt19937 pauses(std::random_device{}());
    // Values that stay integers: sum after sum grows by the number of ranks.
    std::vector<float> data(kCount);
    for (int64_t i = 0; i < kCount; ++i) data[i] = static_cast<float>(i % 7 + rank.rank);
    std::vector<std::vector<float>> all(GetParam(), std::vector<float>(kCount));
    for (int r = 0; r < GetParam(); ++r) {
      for (int64_t i = 0; i < kCount; ++i) all[r][i] = static_cast<float>(i % 7 + r);
    }
    rank.Upload(data);
    float* device = rank.in.data<float>();
    for (int round = 0; round < kRounds; ++round) {
      const int64_t count = 1 + static_cast<int64_t>(sizes() % kCount);
      const bool two_shot = sizes() % 2 == 0;
      (two_shot ? LaunchPeerTwoShotAllReduce : LaunchPeerAllReduce)(rank.group(), device, count,
                                                                    rank.stream.get());
      for (int64_t i = 0; i < count; ++i) {
        float sum = all[0][i];
        for (int r = 1; r < GetParam(); ++r) sum += all[r][i];
        for (int r = 0; r < GetParam(); ++r) all[r][i] = sum;
      }
      if (round % 20 == 19) {  // before they are no longer exact
        ASSERT_EQ(Difference(rank.Download(device, kCount), all[rank.rank]), "")
            << "rank " << rank.rank << " after round " << round;
        for (int r = 0; r < GetParam(); ++r) {
          for (int64_t i = 0; i < kCount; ++i) all[r][i] = static_cast<float>(i % 7 + r);
        }
        rank.Upload(data);
      }
      if (pauses() % 16 == 0) {
        std::this_thread::sleep_for(std::chrono::microseconds(pauses() % 500));
      }
    }
  });
}

TEST_P(PeerExchange, ACapturedGraphReplays) {
  OnRanks(GetParam(), [](Rank& rank) {
    constexpr int64_t kCount = 8192;
    float* data = rank.in.data<float>();
    cudaStream_t stream = rank.stream.get();
    cudaGraph_t graph = nullptr;
    CUDA_CALL(cudaStreamBeginCapture, stream, cudaStreamCaptureModeThreadLocal);
    LaunchPeerAllReduce(rank.group(), data, kCount, stream);
    LaunchPeerTwoShotAllReduce(rank.group(), data + kCount, 3 * kCount, stream);
    LaunchPeerAllReduce(rank.group(), data + 4 * kCount, 3, stream);
    LaunchPeerBroadcast(rank.group(), data + 5 * kCount, 17, stream);
    CUDA_CALL(cudaStreamEndCapture, stream, &graph);
    cudaGraphExec_t replay = nullptr;
    CUDA_CALL(cudaGraphInstantiate, &replay, graph, 0ull);
    for (uint32_t seed = 0; seed < 50; ++seed) {
      rank.Upload(RankData(rank.rank, 5 * kCount + 17, seed));
      CUDA_CALL(cudaGraphLaunch, replay, stream);
      std::vector<float> expected = RankData(rank.rank, 5 * kCount + 17, seed);
      const std::vector<float> sum = RankOrderSum(GetParam(), 5 * kCount + 17, seed);
      std::copy_n(sum.begin(), 4 * kCount + 3, expected.begin());
      const std::vector<float> root = RankData(0, 5 * kCount + 17, seed);
      std::copy(root.end() - 17, root.end(), expected.end() - 17);
      ASSERT_EQ(Difference(rank.Download(data, 5 * kCount + 17), expected), "")
          << "rank " << rank.rank << ", replay " << seed;
    }
    CUDA_CALL(cudaGraphExecDestroy, replay);
    CUDA_CALL(cudaGraphDestroy, graph);
  });
}

TEST_P(PeerExchange, AnAbortEndsLaunchesWhosePeersNeverCome) {
  OnRanks(GetParam(), [](Rank& rank) {
    if (rank.rank == 0) return;
    for (int i = 0; i < 20; ++i) {
      LaunchPeerAllReduce(rank.group(), rank.in.data<float>(), kSlotFloats, rank.stream.get());
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    EXPECT_EQ(cudaStreamQuery(rank.stream.get()), cudaErrorNotReady);
    const auto begin = std::chrono::steady_clock::now();
    rank.peers->Abort();
    EXPECT_EQ(cudaStreamSynchronize(rank.stream.get()), cudaSuccess);
    EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(1));
  });
}

}  // namespace
}  // namespace wintserve::kernels::cuda
