#include "engine_worker/collectives/shm/shm_collective.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <thread>
#include <vector>

#include "common/check.h"
#include "engine_worker/collectives/collective_suite_test_util.h"
#include "engine_worker/collectives/single_rank_collective.h"

namespace wintserve {
namespace {

using testing::HasSubstr;

constexpr int64_t kSlotBytes = 1024;  // 256 floats: the random sizes below need several rounds

std::shared_ptr<MappedMemory> NewMemory(int world_size, int64_t slot_bytes = kSlotBytes) {
  auto memory =
      MappedMemory::Create("shm_collective_test", ShmGroupMemoryBytes(world_size, slot_bytes));
  CHECK(memory.ok(), "{}", memory.status().ToString());
  return std::make_shared<MappedMemory>(*std::move(memory));
}

std::unique_ptr<ShmCollective> Join(const std::shared_ptr<MappedMemory>& memory, int rank,
                                    int world_size) {
  auto collective = ShmCollective::Create(
      memory, {.group_epoch = 7, .rank = rank, .world_size = world_size, .slot_bytes = kSlotBytes});
  CHECK(collective.ok(), "{}", collective.status().ToString());
  return *std::move(collective);
}

// Runs `body` once a rank, each in a thread of its own.
void OnThreads(int world_size, const std::function<void(ShmCollective&)>& body) {
  const auto memory = NewMemory(world_size);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < world_size; ++rank) {
    threads.emplace_back([&, rank] { body(*Join(memory, rank, world_size)); });
  }
  for (std::thread& thread : threads) thread.join();
}

// Operations of host memory are done when they return.
class HostRank final : public TestRank {
 public:
  explicit HostRank(std::unique_ptr<ShmCollective> collective)
      : collective_(std::move(collective)) {}
  Collective& collective() override { return *collective_; }
  absl::Status AllReduceSum(std::vector<float>* data) override {
    return collective_->AllReduceSum(data->data(), std::ssize(*data));
  }
  absl::Status AllGather(const std::vector<float>& in, std::vector<float>* out) override {
    return collective_->AllGather(in.data(), std::ssize(in), out->data());
  }
  absl::Status Broadcast(std::string* data) override {
    return collective_->Broadcast(data->data(), std::ssize(*data));
  }

 private:
  const std::unique_ptr<ShmCollective> collective_;
};

std::unique_ptr<TestRank> JoinAsRank(const std::shared_ptr<MappedMemory>& memory, int rank,
                                     int world_size) {
  return std::make_unique<HostRank>(Join(memory, rank, world_size));
}

CollectiveKind Ranks(int world_size) {
  return {.name = fmt::format("ShmOf{}", world_size),
          .world_size = world_size,
          .slot_bytes = kSlotBytes,
          .join = JoinAsRank};
}

INSTANTIATE_TEST_SUITE_P(Shm, CollectiveSuite, testing::Values(Ranks(2), Ranks(3), Ranks(4)),
                         [](const auto& info) { return info.param.name; });

class ShmCollectiveWorld : public testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Ranks, ShmCollectiveWorld, testing::Values(2, 3, 4),
                         [](const auto& info) { return fmt::format("{}", info.param); });

// Starts one process a rank; rank_main's result is its exit code.
std::vector<pid_t> Fork(int world_size, const std::function<int(int rank)>& rank_main) {
  std::vector<pid_t> children;
  for (int rank = 0; rank < world_size; ++rank) {
    const pid_t child = ::fork();
    CHECK(child >= 0);
    if (child == 0) ::_exit(rank_main(rank));
    children.push_back(child);
  }
  return children;
}

int ExitStatus(pid_t child) {
  int status = 0;
  CHECK(::waitpid(child, &status, 0) == child);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

TEST_P(ShmCollectiveWorld, ProcessesGetTheBitsOfTheRankOrderSum) {
  const int world_size = GetParam();
  const auto memory = NewMemory(world_size);
  for (const pid_t child : Fork(world_size, [&](int rank) {
         return RunMix(*JoinAsRank(memory, rank, world_size), 100, {}).empty() ? 0 : 1;
       })) {
    EXPECT_EQ(ExitStatus(child), 0);
  }
}

TEST(ShmCollective, SurvivorsOfAKilledPeerReturnOnceTheGroupIsAborted) {
  const auto memory = NewMemory(3);
  const auto children = Fork(2, [&](int rank) {
    const auto collective = Join(memory, rank, 3);
    float value = 1;
    while (true) {
      const absl::Status status = collective->AllReduceSum(&value, 1);
      if (!status.ok()) return absl::IsUnavailable(status) ? 0 : 1;
    }
  });
  const auto self = Join(memory, 2, 3);
  float value = 1;
  for (int i = 0; i < 100; ++i) ASSERT_TRUE(self->AllReduceSum(&value, 1).ok());
  ASSERT_EQ(::kill(children[0], SIGKILL), 0);
  EXPECT_EQ(ExitStatus(children[0]), 128 + SIGKILL);
  std::thread supervisor([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    self->Abort();
  });
  absl::Status status;
  for (int i = 0; i < 1000 && status.ok(); ++i) status = self->AllReduceSum(&value, 1);
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
  EXPECT_EQ(ExitStatus(children[1]), 0);
  supervisor.join();
}

// Rank 1 is killed inside an operation, wherever that finds it; rank 0 and a fresh process go on.
TEST(ShmCollective, ASurvivorAndAFreshProcessMeetInTheNextGroup) {
  constexpr int kGroups = 20;
  const auto run_until_the_end = [](ShmCollective& collective) {
    std::vector<float> data(2000);  // several rounds
    absl::Status status;
    while (status.ok()) status = collective.AllReduceSum(data.data(), std::ssize(data));
    return status;
  };
  for (int group = 0; group < kGroups; ++group) {
    SCOPED_TRACE(group);
    const auto memory = NewMemory(2);
    const pid_t child = ::fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      const auto peer = Join(memory, 1, 2);
      (void)run_until_the_end(*peer);
      ::_exit(1);
    }
    const auto survivor = Join(memory, 0, 2);
    std::thread supervisor([&] {
      std::this_thread::sleep_for(std::chrono::microseconds(2000 + 317 * group));
      EXPECT_EQ(::kill(child, SIGKILL), 0);
      EXPECT_EQ(ExitStatus(child), 128 + SIGKILL);
      survivor->Abort();
    });
    EXPECT_EQ(run_until_the_end(*survivor).code(), absl::StatusCode::kUnavailable);
    supervisor.join();
  }
}

// A process that is stopped holds nobody up, and finds its group ended when it goes on.
TEST(ShmCollective, AStoppedPeerHoldsNobodyUpAfterAnAbort) {
  const auto memory = NewMemory(2);
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    const auto peer = Join(memory, 1, 2);
    float value = 1;
    absl::Status status;
    while (status.ok()) status = peer->AllReduceSum(&value, 1);
    ::_exit(absl::IsUnavailable(status) ? 0 : 1);
  }
  const auto self = Join(memory, 0, 2);
  float value = 1;
  for (int i = 0; i < 100; ++i) ASSERT_TRUE(self->AllReduceSum(&value, 1).ok());
  ASSERT_EQ(::kill(child, SIGSTOP), 0);
  std::thread supervisor([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    self->Abort();
  });
  absl::Status status;
  while (status.ok()) status = self->AllReduceSum(&value, 1);
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  supervisor.join();
  ASSERT_EQ(::kill(child, SIGCONT), 0);
  EXPECT_EQ(ExitStatus(child), 0);
}

TEST(ShmCollective, ItsAbortFunctionOutlivesIt) {
  const auto memory = NewMemory(2);
  const auto second = Join(memory, 1, 2);
  std::function<void()> abort;
  {
    auto first = Join(memory, 0, 2);
    abort = first->AbortFunction();
    EXPECT_FALSE(second->is_aborted());
    abort();
    EXPECT_TRUE(second->is_aborted());
  }
  abort();
}

TEST(ShmCollective, DifferentOperationsEndTheGroupWithAnErrorThatNamesTheRanks) {
  OnThreads(2, [](ShmCollective& collective) {
    float value = 1;
    std::vector<float> out(2);
    const absl::Status status = collective.rank() == 0
                                    ? collective.AllReduceSum(&value, 1)
                                    : collective.AllGather(&value, 1, out.data());
    EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
    EXPECT_THAT(status.message(), HasSubstr(fmt::format("rank {} is in", 1 - collective.rank())));
    EXPECT_FALSE(collective.AllReduceSum(&value, 1).ok());
  });
}

TEST(ShmCollective, DifferentSizesEndTheGroup) {
  OnThreads(2, [](ShmCollective& collective) {
    std::vector<float> data(8);
    const absl::Status status = collective.AllReduceSum(data.data(), 4 + collective.rank());
    EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
    EXPECT_THAT(status.message(), HasSubstr("16 bytes"));
    EXPECT_THAT(status.message(), HasSubstr("20 bytes"));
  });
}

TEST(ShmCollective, RefusesMemoryMadeForAnotherNumberOfRanks) {
  const auto collective = ShmCollective::Create(
      NewMemory(2), {.group_epoch = 7, .rank = 0, .world_size = 4, .slot_bytes = kSlotBytes});
  EXPECT_EQ(collective.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(collective.status().message(), HasSubstr("4 ranks with slots of 1024 bytes need"));
}

TEST(ShmCollective, RefusesMemoryOfAnotherEpoch) {
  const auto memory = NewMemory(2);
  const auto first = Join(memory, 0, 2);
  const auto second = ShmCollective::Create(
      memory, {.group_epoch = 8, .rank = 1, .world_size = 2, .slot_bytes = kSlotBytes});
  EXPECT_EQ(second.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(second.status().message(), HasSubstr("epoch 7, not 8"));
}

TEST(ShmCollective, RefusesMemoryThatThisRankUsedBefore) {
  const auto memory = NewMemory(2);
  Join(memory, 1, 2).reset();
  const auto again = ShmCollective::Create(
      memory, {.group_epoch = 7, .rank = 1, .world_size = 2, .slot_bytes = kSlotBytes});
  EXPECT_EQ(again.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(again.status().message(), HasSubstr("already had a rank 1"));
}

TEST(ShmCollective, AnAbortIsSeenByRanksThatOnlyWaitForIt) {
  const auto memory = NewMemory(2);
  const auto first = Join(memory, 0, 2);
  const auto second = Join(memory, 1, 2);
  EXPECT_FALSE(second->WaitForAbort(/*timeout_ms=*/1));
  EXPECT_FALSE(second->is_aborted());
  std::thread aborting([&] { first->Abort(); });
  EXPECT_TRUE(second->WaitForAbort(/*timeout_ms=*/60'000));
  EXPECT_TRUE(second->is_aborted());
  aborting.join();
}

TEST(ShmCollective, ARankThatLeftWaitsForTheOthersToLeave) {
  const auto memory = NewMemory(2);
  const auto first = Join(memory, 0, 2);
  const auto second = Join(memory, 1, 2);
  EXPECT_FALSE(first->Leave(/*timeout_ms=*/1));
  EXPECT_TRUE(second->Leave(/*timeout_ms=*/0));
}

TEST(ShmCollective, ARankThatIsGoneIsNotWaitedFor) {
  const auto memory = NewMemory(3);
  const auto first = Join(memory, 0, 3);
  const auto second = Join(memory, 1, 3);
  std::atomic<bool> is_gone = false;
  std::thread ending([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    EXPECT_FALSE(second->Leave(/*timeout_ms=*/0));
    is_gone = true;
  });
  EXPECT_TRUE(first->Leave(/*timeout_ms=*/60'000, [&](int rank) { return rank == 2 && is_gone; }));
  ending.join();
}

TEST(ShmCollective, ARankThatLeftAndIsGoneDoesNotStandForAnother) {
  const auto memory = NewMemory(3);
  const auto first = Join(memory, 0, 3);
  const auto second = Join(memory, 1, 3);
  EXPECT_FALSE(second->Leave(/*timeout_ms=*/0));
  EXPECT_FALSE(first->Leave(/*timeout_ms=*/20, [](int rank) { return rank == 1; }));
}

TEST(SingleRankCollective, LeavesDataAsItIs) {
  const auto collective = MakeSingleRankCollective();
  std::vector<float> data = {1, 2};
  std::vector<float> out(2);
  EXPECT_TRUE(collective->AllReduceSum(data.data(), 2).ok());
  EXPECT_TRUE(collective->AllGather(data.data(), 2, out.data()).ok());
  EXPECT_TRUE(collective->Broadcast(data.data(), 8).ok());
  EXPECT_THAT(data, testing::ElementsAre(1, 2));
  EXPECT_EQ(out, data);
  EXPECT_EQ(collective->world_size(), 1);
}

}  // namespace
}  // namespace wintserve
