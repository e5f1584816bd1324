// Ranks as threads of this process and as processes, one GPU each.
#include "engine_worker/collectives/nccl/nccl_collective.h"

#include <gmock/gmock.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <barrier>
#include <cstdlib>

#include "common/log.h"
#include "engine_worker/collectives/nccl/nccl_test_util.h"

namespace wintserve {
namespace {

using std::chrono::steady_clock;

constexpr auto kAbortTime = std::chrono::seconds(2);
// A rank that is alive may write to this one's memory, and is waited for that long.
constexpr auto kLeaveTime = std::chrono::seconds(1);

// Four ranks add up in rank order only through the peers' memory.
INSTANTIATE_TEST_SUITE_P(Nccl, CollectiveSuite,
                         testing::Values(Gpus("Nccl", 2, 0), Gpus("Peers", 2, NcclGroup::kMeasured),
                                         Gpus("Peers", 4, NcclGroup::kMeasured)),
                         [](const auto& info) { return info.param.name; });

class NcclCollectiveTest : public testing::Test {
 protected:
  void SetUp() override {
    const std::string reason = ReasonToSkip(2);
    if (!reason.empty()) GTEST_SKIP() << reason;
  }
  static std::shared_ptr<MappedMemory> NewMemory() { return NewGroupMemory(Gpus("", 2, 0)); }
  static void OnTwo(int64_t max_peer_bytes, const std::function<void(CudaRank&)>& body) {
    const auto memory = NewMemory();
    std::barrier<> done(2);  // none leaves the group before
    const auto run = [&](int self) {
      CudaRank rank(memory, self, 2, max_peer_bytes);
      body(rank);
      done.arrive_and_wait();
    };
    std::thread other([&] { run(1); });
    run(0);
    other.join();
  }
};

// As a captured decoding step is: many small sums, a gather, a broadcast.
void CaptureStep(CudaRank& rank, int64_t count, cudaGraphExec_t* replay) {
  cudaGraph_t graph = nullptr;
  CUDA_CALL(cudaStreamBeginCapture, rank.stream(), cudaStreamCaptureModeThreadLocal);
  for (int i = 0; i < 8; ++i) {
    ASSERT_TRUE(rank.collective().AllReduceSum(rank.data(), count).ok());
  }
  ASSERT_TRUE(rank.collective().AllReduceSum(rank.data() + count, 700'000).ok());
  ASSERT_TRUE(rank.collective().Broadcast(rank.data() + count + 700'000, 64).ok());
  CUDA_CALL(cudaStreamEndCapture, rank.stream(), &graph);
  CUDA_CALL(cudaGraphInstantiate, replay, graph, 0ull);
  CUDA_CALL(cudaGraphDestroy, graph);
}

TEST_F(NcclCollectiveTest, GraphsReplayWhatTheyCaptured) {
  for (const int64_t max_peer_bytes : {int64_t{0}, NcclGroup::kMeasured}) {
    OnTwo(max_peer_bytes, [](CudaRank& rank) {
      constexpr int64_t kCount = 5000;
      constexpr int64_t kTotal = kCount + 700'000 + 16;
      cudaGraphExec_t replay = nullptr;
      CaptureStep(rank, kCount, &replay);
      for (uint32_t seed = 0; seed < 20; ++seed) {
        std::vector<float> data = RankData(rank.collective().rank(), kTotal, seed);
        std::vector<float> expected = RankOrderSum(2, kTotal, seed);
        for (int64_t i = 0; i < kCount; ++i) expected[i] *= 128;  // seven doublings
        const std::vector<float> root = RankData(0, kTotal, seed);
        std::copy(root.end() - 16, root.end(), expected.end() - 16);
        rank.Upload(data.data(), kTotal * sizeof(float));
        CUDA_CALL(cudaGraphLaunch, replay, rank.stream());
        ASSERT_TRUE(rank.Download(rank.data(), kTotal * sizeof(float), data.data()).ok());
        ASSERT_TRUE(SameBits(data, expected)) << "replay " << seed;
      }
      CUDA_CALL(cudaGraphExecDestroy, replay);
    });
  }
}

TEST_F(NcclCollectiveTest, AnAbortEndsAGraphWhosePeerNeverReplaysIt) {
  for (const int64_t max_peer_bytes : {int64_t{0}, NcclGroup::kMeasured}) {
    OnTwo(max_peer_bytes, [](CudaRank& rank) {
      cudaGraphExec_t replay = nullptr;
      CaptureStep(rank, 5000, &replay);
      if (rank.collective().rank() == 0) {
        CUDA_CALL(cudaGraphLaunch, replay, rank.stream());
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
        EXPECT_EQ(cudaStreamQuery(rank.stream()), cudaErrorNotReady);
        const auto begin = steady_clock::now();
        rank.collective().Abort();
        EXPECT_EQ(rank.Finish().code(), absl::StatusCode::kUnavailable);
        EXPECT_LT(steady_clock::now() - begin, kAbortTime);
      }
      CUDA_CALL(cudaGraphExecDestroy, replay);
    });
  }
}

// Allreduces of rank 1, until it is killed or the group ends. Started by the test below.
constexpr char kGroupFd[] = "WINTSERVE_TEST_GROUP_FD";

TEST(NcclPeerProcess, DISABLED_RunsUntilItIsKilled) {
  const char* const fd = std::getenv(kGroupFd);
  ASSERT_NE(fd, nullptr);
  auto memory = std::make_shared<MappedMemory>(Must(MappedMemory::FromFd(
      UniqueFd(std::atoi(fd)), ShmGroupMemoryBytes(2, kNcclControlSlotBytes))));
  CudaRank rank(memory, 1, 2, NcclGroup::kMeasured);
  ASSERT_EQ(RunMix(rank, 20, {1, 5000, 262144, 1 << 20}), "");
  std::vector<float> data(5000, 1.0f);
  while (rank.AllReduceSum(&data).ok()) {
  }
}

pid_t StartPeer(const MappedMemory& memory) {
  const int fd = ::dup(memory.fd());  // without close-on-exec
  const pid_t child = ::fork();
  if (child == 0) {
    ::setenv(kGroupFd, fmt::format("{}", fd).c_str(), 1);
    ::execl("/proc/self/exe", "peer", "--gtest_filter=*DISABLED_RunsUntilItIsKilled",
            "--gtest_also_run_disabled_tests", "--gtest_brief=1", nullptr);
    ::_exit(127);
  }
  ::close(fd);
  return child;
}

TEST_F(NcclCollectiveTest, OutlivesAKilledPeerAndJoinsAnotherGroup) {
  InitLog("survivor", "debug");  // the phases of each abort
  for (int incarnation = 0; incarnation < 2; ++incarnation) {
    const auto memory = NewMemory();
    const pid_t peer = StartPeer(*memory);
    auto owned_rank = std::make_unique<CudaRank>(memory, 0, 2, NcclGroup::kMeasured);
    CudaRank& rank = *owned_rank;
    ASSERT_EQ(RunMix(rank, 20, {1, 5000, 262144, 1 << 20}), "");
    std::vector<float> data(5000, 1.0f);
    for (int i = 0; i < 50; ++i) ASSERT_TRUE(rank.AllReduceSum(&data).ok());
    ASSERT_EQ(::kill(peer, SIGKILL), 0);
    ASSERT_EQ(::waitpid(peer, nullptr, 0), peer);
    // As steps in flight: put on the stream before anybody knows.
    for (int i = 0; i < 100; ++i) {
      if (!rank.collective().AllReduceSum(rank.data(), i % 2 == 0 ? 5000 : 1 << 20).ok()) break;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    EXPECT_EQ(cudaStreamQuery(rank.stream()), cudaErrorNotReady);
    const auto begin = steady_clock::now();
    rank.collective().Abort();
    const absl::Status status = rank.Finish();
    EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
    EXPECT_LT(steady_clock::now() - begin, kAbortTime);
    const auto free = steady_clock::now();
    owned_rank.reset();
    const auto left = steady_clock::now();
    EXPECT_LT(left - begin, kLeaveTime) << "a rank that is dead was waited for";
    const auto ms = [](steady_clock::duration time) {
      return std::chrono::duration_cast<std::chrono::milliseconds>(time).count();
    };
    fmt::print("NOTE the survivor of a killed peer is free {} ms after the abort, has left {} ms\n",
               ms(free - begin), ms(left - begin));
  }
}

TEST_F(NcclCollectiveTest, TakesNoMoreMemoryThanItIsGiven) {
  const auto memory = NewMemory();
  std::thread other([&] { CudaRank rank(memory, 1, 2, NcclGroup::kMeasured); });
  {
    Must(kernels::cuda::UseDevice(0));
    const Stream stream = Must(kernels::cuda::CreateStream());
    auto control = Must(ShmCollective::Create(
        memory,
        {.group_epoch = 7, .rank = 0, .world_size = 2, .slot_bytes = kNcclControlSlotBytes}));
    const int64_t before = Must(kernels::cuda::QueryDeviceMemory()).free;
    const auto collective =
        Must(NcclCollective::Create(std::move(control), {.stream = stream.get()}));
    const int64_t taken = before - Must(kernels::cuda::QueryDeviceMemory()).free;
    fmt::print("NOTE a rank of two takes {} MiB\n", taken >> 20);
    EXPECT_LE(taken, NcclGroupMemoryBytes(2));
  }
  other.join();
}

}  // namespace
}  // namespace wintserve
