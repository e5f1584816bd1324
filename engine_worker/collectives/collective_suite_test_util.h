// What every implementation of Collective is held to: collective_suite_test.cc, which is linked to
// the test of each, instantiated there over its kinds.
#pragma once

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "common/check.h"
#include "common/mapped_memory.h"
#include "engine_worker/collectives/shm/shm_collective.h"

namespace wintserve {

// One rank, with operations on host memory that are done when they return.
class TestRank {
 public:
  virtual ~TestRank() = default;
  virtual Collective& collective() = 0;
  virtual absl::Status AllReduceSum(std::vector<float>* data) = 0;
  virtual absl::Status AllGather(const std::vector<float>& in, std::vector<float>* out) = 0;
  virtual absl::Status Broadcast(std::string* data) = 0;
};

struct CollectiveKind {
  std::string name;
  int world_size = 2;
  int64_t slot_bytes = 0;            // of the memory in which the ranks meet
  std::vector<int64_t> counts = {};  // of floats, that the mix of operations takes
  int num_operations = 100;
  int num_groups = 200;  // that a test may make
  // A rank on the calling thread. Where ranks wait for each other, returns when all have come.
  std::function<std::unique_ptr<TestRank>(const std::shared_ptr<MappedMemory>&, int rank,
                                          int world_size)>
      join;
  // Why this machine cannot run it; empty if it can.
  std::function<std::string()> reason_to_skip = [] { return std::string(); };
};

inline std::shared_ptr<MappedMemory> NewGroupMemory(const CollectiveKind& kind) {
  auto memory = MappedMemory::Create("collective_test",
                                     ShmGroupMemoryBytes(kind.world_size, kind.slot_bytes));
  CHECK(memory.ok(), "{}", memory.status().ToString());
  return std::make_shared<MappedMemory>(*std::move(memory));
}

class CollectiveSuite : public testing::TestWithParam<CollectiveKind> {
 protected:
  void SetUp() override {
    const std::string reason = GetParam().reason_to_skip();
    if (!reason.empty()) GTEST_SKIP() << reason;
  }

  // Runs `body` once a rank, each in a thread of its own.
  static void OnThreads(const std::function<void(TestRank&)>& body) {
    const CollectiveKind& kind = GetParam();
    const auto memory = NewGroupMemory(kind);
    std::vector<std::thread> threads;
    for (int rank = 0; rank < kind.world_size; ++rank) {
      threads.emplace_back([&, rank] { body(*kind.join(memory, rank, kind.world_size)); });
    }
    for (std::thread& thread : threads) thread.join();
  }
};

// Values whose sum depends on the order of the additions.
inline std::vector<float> RankData(int rank, int64_t count, uint32_t seed) {
  std::minstd_rand random(seed * 31 + rank + 1);
  std::vector<float> data(count);
  for (float& value : data) {
    const auto bits = static_cast<uint32_t>(random());
    value = std::ldexp(static_cast<float>(static_cast<int32_t>(bits % 0x1FFFFFF) - 0xFFFFFF),
                       static_cast<int>(bits >> 7) % 24 - 24);
  }
  return data;
}

inline std::vector<float> RankOrderSum(int world_size, int64_t count, uint32_t seed) {
  std::vector<float> sum = RankData(0, count, seed);
  for (int rank = 1; rank < world_size; ++rank) {
    const std::vector<float> part = RankData(rank, count, seed);
    for (int64_t i = 0; i < count; ++i) sum[i] += part[i];
  }
  return sum;
}

inline bool SameBits(const std::vector<float>& a, const std::vector<float>& b) {
  const auto same = [](float x, float y) {
    return std::bit_cast<uint32_t>(x) == std::bit_cast<uint32_t>(y);
  };
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), same);
}

// A mix of all operations, with pauses of up to max_pause_us that differ between ranks. Returns the
// first difference. `counts`: of floats; empty: from nothing to 999.
inline std::string RunMix(TestRank& rank, int num_operations, const std::vector<int64_t>& counts,
                          int max_pause_us = 0) {
  const int world_size = rank.collective().world_size();
  const int self = rank.collective().rank();
  std::mt19937 sizes(world_size);
  std::mt19937 pauses(std::random_device{}());
  const auto pause = [&] {
    if (max_pause_us == 0) return;
    std::this_thread::sleep_for(std::chrono::microseconds(pauses() % max_pause_us));
  };
  for (int i = 0; i < num_operations; ++i) {
    const uint32_t draw = sizes();
    const int64_t count = counts.empty() ? draw % 1000 : counts[draw % counts.size()];
    const uint32_t seed = sizes();
    std::vector<float> data = RankData(self, count, seed);

    std::vector<float> gathered(count * world_size, -1.0f);
    pause();
    absl::Status status = rank.AllGather(data, &gathered);
    if (!status.ok()) return fmt::format("AllGather {}: {}", i, status.ToString());
    for (int peer = 0; peer < world_size; ++peer) {
      const std::vector<float> part(gathered.begin() + peer * count,
                                    gathered.begin() + (peer + 1) * count);
      if (!SameBits(part, RankData(peer, count, seed))) {
        return fmt::format("AllGather {} of {} floats: other values of rank {}", i, count, peer);
      }
    }
    std::string text(count, static_cast<char>('a' + self));
    pause();
    status = rank.Broadcast(&text);
    if (!status.ok()) return fmt::format("Broadcast {}: {}", i, status.ToString());
    if (text != std::string(count, 'a')) return fmt::format("Broadcast {} of {} bytes", i, count);

    pause();
    status = rank.AllReduceSum(&data);
    if (!status.ok()) return fmt::format("AllReduceSum {}: {}", i, status.ToString());
    if (!SameBits(data, RankOrderSum(world_size, count, seed))) {
      return fmt::format("AllReduceSum {}: not the rank-order sum of {} floats", i, count);
    }
  }
  return "";
}

}  // namespace wintserve
