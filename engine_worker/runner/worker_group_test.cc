// What a worker does when its group, or its API server, ends before it.
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <map>
#include <thread>

#include "common/check.h"
#include "common/mapped_memory.h"
#include "common/mutex.h"
#include "engine_worker/collectives/shm/shm_collective.h"
#include "engine_worker/runner/worker.h"
#include "tests/fakes/fake_model.h"
#include "tests/fakes/fake_work_queue.h"

namespace wintserve {
namespace {

using std::chrono::milliseconds;
using testing::HasSubstr;
using testing_fakes::FakeModel;
using testing_fakes::FakeWorkQueue;

constexpr uint64_t kPoolEpoch = 4;
constexpr uint32_t kNumBlocks = 8;

// What the launcher and the cache manager lend to the ranks: memory of groups, and of one pool.
class Lender {
 public:
  absl::StatusOr<std::unique_ptr<Collective>> Join(uint64_t group_epoch, int rank) {
    constexpr int64_t kSlotBytes = 4096;
    MutexLock lock(&mutex_);
    std::shared_ptr<MappedMemory>& memory = groups_[group_epoch];
    if (memory == nullptr) memory = NewMemory(ShmGroupMemoryBytes(2, kSlotBytes));
    auto collective = ShmCollective::Create(
        memory,
        {.group_epoch = group_epoch, .rank = rank, .world_size = 2, .slot_bytes = kSlotBytes});
    if (collective.ok()) aborts_[group_epoch] = (*collective)->AbortFunction();
    return collective;
  }

  absl::StatusOr<SharedMemory> FetchPool(const AttachPool& attach, int rank) {
    const int64_t size_bytes =
        int64_t{attach.num_blocks} * FakeModel::kBlockTokens * sizeof(int32_t);
    MutexLock lock(&mutex_);
    ++num_fetches_;
    std::shared_ptr<MappedMemory>& memory = pools_[{attach.pool_epoch, rank}];
    if (memory == nullptr) memory = NewMemory(size_bytes);
    SharedMemory shared = {.size_bytes = size_bytes, .parts = {}};
    shared.parts.push_back({UniqueFd(::dup(memory->fd())), size_bytes});
    return shared;
  }

  // As a stray write into the memory of the group could do, or a network card that gives up.
  void AbortUnasked(uint64_t group_epoch) {
    MutexLock lock(&mutex_);
    aborts_.at(group_epoch)();
  }

  int num_fetches() {
    MutexLock lock(&mutex_);
    return num_fetches_;
  }

 private:
  static std::shared_ptr<MappedMemory> NewMemory(int64_t size_bytes) {
    auto memory = MappedMemory::Create("worker_group_test", size_bytes);
    CHECK(memory.ok(), "{}", memory.status().ToString());
    return std::make_shared<MappedMemory>(*std::move(memory));
  }

  Mutex mutex_;
  std::map<uint64_t, std::shared_ptr<MappedMemory>> groups_ GUARDED_BY(mutex_);
  std::map<std::pair<uint64_t, int>, std::shared_ptr<MappedMemory>> pools_ GUARDED_BY(mutex_);
  std::map<uint64_t, std::function<void()>> aborts_ GUARDED_BY(mutex_);
  int num_fetches_ GUARDED_BY(mutex_) = 0;
};

// A worker of rank `rank` of two, in a thread of its own.
class TestWorker {
 public:
  using AttachAgain = decltype(WorkerLinks::attach_again);

  TestWorker(Lender* lender, int rank, AttachAgain attach_again = nullptr,
             const WorkerOptions& options = {})
      : group_(rank, 2),
        model_(&group_),
        worker_(&model_, &group_, &first_queue_,
                {.join_group =
                     [lender, rank](const ConfigureWorker& configure) {
                       return lender->Join(configure.group_epoch, rank);
                     },
                 .fetch_pool =
                     [lender, rank](const AttachPool& attach) {
                       return lender->FetchPool(attach, rank);
                     },
                 .fetch_host_tier = {},
                 .attach_again = std::move(attach_again)},
                options),
        thread_([this] { status_ = worker_.Run(); }) {}

  ~TestWorker() {
    if (thread_.joinable()) Stop();
  }

  // As a process that ends: its peers hear nothing but that it has left.
  void Stop() {
    worker_.RequestStop(/*patience_ms=*/0);
    End().IgnoreError();
  }

  absl::Status End() {
    thread_.join();
    return status_;
  }

  FakeWorkQueue& queue() { return first_queue_; }
  Worker& worker() { return worker_; }

 private:
  FakeWorkQueue first_queue_;
  RankGroup group_;
  FakeModel model_;
  Worker worker_;
  absl::Status status_;
  std::thread thread_;
};

ConfigureWorker ConfigureOf(uint64_t group_epoch) {
  return {.group_epoch = group_epoch,
          .world_size = 2,
          .max_slots = 2,
          .max_tokens = 64,
          .max_sequence_tokens = 128,
          .sampled_vocab_size = FakeModel::kVocabSize};
}

// The API server of two ranks.
class WorkerGroupTest : public testing::Test {
 protected:
  WorkerGroupTest() {
    for (int rank = 0; rank < 2; ++rank) {
      workers_.push_back(std::make_unique<TestWorker>(&lender_, rank));
    }
  }

  void Push(const ServerEvent& event) {
    for (FakeWorkQueue* queue : Queues()) queue->Push(event);
  }

  // Begins the group of that epoch on the pool.
  void Begin(uint64_t group_epoch) {
    group_epoch_ = group_epoch;
    plan_hash_ = 0;
    std::vector<int> num_ready;
    for (FakeWorkQueue* queue : Queues()) num_ready.push_back(queue->num_ready());
    Push(ConfigureOf(group_epoch));
    Push(AttachPool{.pool_epoch = kPoolEpoch, .memory_socket = "unused", .num_blocks = kNumBlocks});
    for (size_t i = 0; i < num_ready.size(); ++i) {
      FakeWorkQueue* const queue = Queues()[i];
      while (queue->num_ready() == num_ready[i] && queue->faults().empty()) {
        std::this_thread::sleep_for(milliseconds(1));
      }
      for (const FakeWorkQueue::Fault& fault : queue->faults()) CHECK(false, "{}", fault.text);
    }
  }

  ReceivedPlan Number(StepPlan plan) {
    plan.group_epoch = group_epoch_;
    plan.pool_epoch = kPoolEpoch;
    plan.step = ++step_;
    plan.previous_plan_hash = std::exchange(plan_hash_, 1000 + step_);
    return {plan, plan_hash_};
  }

  StepDone Run(const StepPlan& plan) {
    FakeWorkQueue* const queue = Queues()[0];
    const size_t num_done = queue->num_steps() + 1;
    Push(Number(plan));
    return queue->WaitForSteps(num_done).back();
  }

  // The token that rank 0 samples.
  int32_t Execute(const StepPlan& plan) { return Run(plan).sampled.at(0).token; }

  // Slot 0 with `kPrompt` and what has been sampled, from a position that is a part of it.
  StepPlan Resume(const std::vector<int32_t>& tokens, uint32_t position) {
    std::vector<int32_t> sequence = {7, 8, 9};
    sequence.insert(sequence.end(), tokens.begin(), tokens.end());
    const std::vector<int32_t> row(sequence.begin() + position, sequence.end());
    return {.slot_init = {{0, {}, {BlockId{0}}}},  // the block of which warm-ups might be fond
            .rows = {{0, position, static_cast<uint32_t>(row.size()), true, row}}};
  }

  // Four tokens without a fault.
  std::vector<int32_t> Generate() {
    std::vector<int32_t> tokens = {Execute(Resume({}, 0))};
    while (tokens.size() < 4) {
      tokens.push_back(
          Execute({.rows = {{0, static_cast<uint32_t>(2 + tokens.size()), 1, true, {}}}}));
    }
    Run({.slot_release = {0}});
    return tokens;
  }

  // Two of the four tokens, and the other two after `fault`, which has to end in a new group.
  std::vector<int32_t> GenerateOver(const std::function<void()>& fault) {
    std::vector<int32_t> tokens = {Execute(Resume({}, 0))};
    tokens.push_back(Execute({.rows = {{0, 3, 1, true, {}}}}));
    fault();
    // The keys and values of positions 0 to 3 are in the pool; the token of position 4 is not.
    tokens.push_back(Execute(Resume(tokens, 4)));
    tokens.push_back(Execute({.rows = {{0, 5, 1, true, {}}}}));
    return tokens;
  }

  void AbortAll(uint64_t group_epoch) {
    std::vector<size_t> num_aborted;
    for (FakeWorkQueue* queue : Queues()) num_aborted.push_back(queue->num_aborted());
    Push(AbortGroup{group_epoch, "the test says so"});
    for (size_t i = 0; i < num_aborted.size(); ++i) {
      EXPECT_EQ(Queues()[i]->WaitForAborted(num_aborted[i] + 1).back(), group_epoch);
    }
  }

  void ExpectNoFault() {
    for (FakeWorkQueue* queue : Queues()) EXPECT_TRUE(queue->faults().empty());
  }

  std::vector<FakeWorkQueue*> Queues() {
    std::vector<FakeWorkQueue*> queues;
    for (size_t rank = 0; rank < workers_.size(); ++rank) {
      FakeWorkQueue* const next = next_[rank];
      queues.push_back(next != nullptr ? next : &workers_[rank]->queue());
    }
    return queues;
  }

  Lender lender_;
  // Of a rank that has attached to the next API server; the worker owns it.
  std::array<std::atomic<FakeWorkQueue*>, 2> next_ = {};
  std::vector<std::unique_ptr<TestWorker>> workers_;
  uint64_t group_epoch_ = 0;
  uint64_t step_ = 0;
  uint64_t plan_hash_ = 0;
};

TEST_F(WorkerGroupTest, GoesOnInANewGroupOnThePoolThatItStillMaps) {
  Begin(3);
  const std::vector<int32_t> expected = Generate();
  EXPECT_EQ(GenerateOver([&] {
              AbortAll(3);
              Begin(5);
            }),
            expected);
  EXPECT_EQ(lender_.num_fetches(), 2);  // one a rank
  ExpectNoFault();
}

TEST_F(WorkerGroupTest, AnAbortEndsAStepThatWaitsForAPeer) {
  Begin(3);
  const std::vector<int32_t> expected = Generate();
  EXPECT_EQ(GenerateOver([&] {
              // Rank 1 never gets them.
              FakeWorkQueue& queue = workers_[0]->queue();
              queue.Push(Number({.rows = {{0, 4, 1, true, {}}}}));
              queue.Push(Number({.rows = {{0, 5, 1, true, {}}}}));
              queue.WaitForBeats(queue.WaitForBeats(1).size() + 2);
              AbortAll(3);
              Begin(5);
            }),
            expected);
  ExpectNoFault();
}

TEST_F(WorkerGroupTest, ARankThatLeavesIsReplacedAndTheSurvivorHasNoFault) {
  Begin(3);
  const std::vector<int32_t> expected = Generate();
  EXPECT_EQ(GenerateOver([&] {
              workers_[1]->Stop();
              FakeWorkQueue& survivor = workers_[0]->queue();
              survivor.Push(Number({.rows = {{0, 4, 1, true, {}}}}));
              survivor.Push(Number({.rows = {{0, 5, 1, true, {}}}}));
              survivor.Push(AbortGroup{3, "rank 1 is gone"});
              EXPECT_EQ(survivor.WaitForAborted(1), std::vector<uint64_t>{3});
              workers_[1] = std::make_unique<TestWorker>(&lender_, 1);
              Begin(5);
            }),
            expected);
  EXPECT_EQ(lender_.num_fetches(), 3);
  ExpectNoFault();
}

TEST_F(WorkerGroupTest, AStepThatIsLostIsNotReportedAndTheAbortStillAnswered) {
  Begin(3);
  Execute(Resume({}, 0));
  const size_t num_steps = workers_[0]->queue().num_steps();
  workers_[1]->Stop();
  FakeWorkQueue& survivor = workers_[0]->queue();
  survivor.Push(Number({.rows = {{0, 3, 1, true, {}}}}));
  survivor.WaitForBeats(survivor.WaitForBeats(1).size() + 2);
  survivor.Push(AbortGroup{3, "rank 1 is gone"});
  survivor.WaitForAborted(1);
  EXPECT_EQ(survivor.num_steps(), num_steps);
  EXPECT_TRUE(survivor.faults().empty());
}

TEST_F(WorkerGroupTest, AnAbortBeforeTheConfigurationOrOfAnotherGroupIsAnsweredAndEndsNothing) {
  AbortAll(77);
  Begin(3);
  const std::vector<int32_t> expected = Generate();
  EXPECT_EQ(GenerateOver([&] {
              AbortAll(78);
              Run({.slot_release = {0}});
            }),
            expected);
  ExpectNoFault();
}

TEST_F(WorkerGroupTest, AnAbortThatComesWithItsConfigurationLeavesTheGroupUnjoined) {
  // Rank 1 hears nothing, and would be waited for.
  FakeWorkQueue& queue = workers_[0]->queue();
  queue.Push(ConfigureOf(3));
  queue.Push(AttachPool{.pool_epoch = kPoolEpoch, .memory_socket = "", .num_blocks = kNumBlocks});
  queue.Push(AbortGroup{3, "rank 1 is gone"});
  EXPECT_EQ(queue.WaitForAborted(1), std::vector<uint64_t>{3});
  EXPECT_EQ(queue.num_ready(), 0);
  Begin(5);
  Generate();
  ExpectNoFault();
}

TEST_F(WorkerGroupTest, AnAbortEndsAWarmUpThatWaitsForAPeerAndThePoolStaysMapped) {
  FakeWorkQueue& queue = workers_[0]->queue();
  queue.Push(ConfigureOf(3));
  queue.Push(AttachPool{.pool_epoch = kPoolEpoch, .memory_socket = "", .num_blocks = kNumBlocks});
  while (lender_.num_fetches() == 0) std::this_thread::sleep_for(milliseconds(1));
  queue.WaitForBeats(queue.WaitForBeats(1).size() + 1);
  queue.Push(AbortGroup{3, "rank 1 is gone"});
  queue.WaitForAborted(1);
  Begin(5);
  Generate();
  EXPECT_EQ(lender_.num_fetches(), 2);
  ExpectNoFault();
}

TEST_F(WorkerGroupTest, ThePoolCanBeReplacedBetweenTwoGroups) {
  Begin(3);
  const std::vector<int32_t> expected = Generate();
  AbortAll(3);
  Push(DetachPool{kPoolEpoch});
  for (FakeWorkQueue* queue : Queues()) queue->WaitForDetached(1);
  Begin(5);
  EXPECT_EQ(Generate(), expected);
  EXPECT_EQ(lender_.num_fetches(), 4);
  ExpectNoFault();
}

TEST_F(WorkerGroupTest, AReplacementHasDetachedFromAPoolThatItWasNotGiven) {
  Push(DetachPool{kPoolEpoch});
  for (FakeWorkQueue* queue : Queues()) {
    EXPECT_EQ(queue->WaitForDetached(1), std::vector<uint64_t>{kPoolEpoch});
  }
  ExpectNoFault();
}

TEST_F(WorkerGroupTest, APoolOfAnotherSizeThanTheMappedOneIsAFault) {
  Begin(3);
  AbortAll(3);
  Push(ConfigureOf(5));
  Push(AttachPool{.pool_epoch = kPoolEpoch, .memory_socket = "", .num_blocks = kNumBlocks + 1});
  EXPECT_EQ(workers_[0]->End().message(),
            "the pool has 2048 bytes, 9 blocks of 256 bytes need 2304");
}

TEST_F(WorkerGroupTest, AConfigurationBeforeTheAbortOfALostGroupIsAFault) {
  Begin(3);
  workers_[1]->Stop();
  FakeWorkQueue& survivor = workers_[0]->queue();
  survivor.Push(Number(Resume({}, 0)));
  survivor.Push(ConfigureOf(5));
  EXPECT_EQ(workers_[0]->End().message(), "a configuration before the abort of the group");
  EXPECT_FALSE(survivor.faults().at(0).kv_trusted);
}

TEST_F(WorkerGroupTest, HeartbeatsGoOnWhileALostGroupWaitsForItsAbort) {
  Begin(3);
  workers_[1]->Stop();
  FakeWorkQueue& survivor = workers_[0]->queue();
  survivor.Push(Number(Resume({}, 0)));
  survivor.WaitForBeats(survivor.WaitForBeats(1).size() + 3);
  survivor.Push(AbortGroup{3, "rank 1 is gone"});
  survivor.WaitForAborted(1);
}

// Ranks that all live, and yet cannot go on: nobody dies whose end could be told.
TEST_F(WorkerGroupTest, AGroupThatIsOverThoughNobodyHasDiedIsReportedOnceAndItsRanksGoOn) {
  Begin(3);
  Generate();
  lender_.AbortUnasked(3);
  Push(Number(Resume({}, 0)));
  FakeWorkQueue& queue = workers_[0]->queue();
  // 1 s, and a second one in which it would say it again.
  queue.WaitForBeats(queue.WaitForBeats(1).size() + 10);
  const std::vector<FakeWorkQueue::Fault> faults = queue.faults();
  ASSERT_EQ(faults.size(), 1u);
  EXPECT_EQ(faults[0].kind, FaultKind::kCollective);
  EXPECT_THAT(faults[0].text, HasSubstr("the rank group was aborted, or a rank has left it"));
  EXPECT_TRUE(faults[0].kv_trusted);
  AbortAll(3);  // answered as ever
  EXPECT_EQ(queue.faults().size(), 1u);
}

// An API server dies between sending a plan to rank 0 and sending it to rank 1. Rank 0 is inside
// the plan's first all-reduce by then, and the first all-reduce that rank 1 comes to is another
// one's.
TEST_F(WorkerGroupTest, APlanThatHasReachedOneRankOnlyEndsWithItsApiServer) {
  workers_.clear();
  for (int rank = 0; rank < 2; ++rank) {
    workers_.push_back(std::make_unique<TestWorker>(&lender_, rank, [this, rank](auto...) {
      auto queue = std::make_unique<FakeWorkQueue>();
      next_[rank] = queue.get();
      return absl::StatusOr<std::unique_ptr<WorkQueueClient>>(std::move(queue));
    }));
  }
  Begin(3);
  const std::vector<int32_t> expected = Generate();
  EXPECT_EQ(GenerateOver([&] {
              FakeWorkQueue& first = workers_[0]->queue();
              first.Push(Number({.rows = {{0, 4, 1, true, {}}}}));
              first.WaitForBeats(first.WaitForBeats(1).size() + 1);
              for (const auto& worker : workers_) worker->queue().EndStream();
              for (int i = 0; i < 1000 && (next_[0] == nullptr || next_[1] == nullptr); ++i) {
                std::this_thread::sleep_for(milliseconds(10));
              }
              ASSERT_TRUE(next_[0] != nullptr && next_[1] != nullptr) << "a rank still waits";
              Begin(5);
            }),
            expected);
  EXPECT_EQ(lender_.num_fetches(), 2);  // the pool stayed mapped
  ExpectNoFault();
}

TEST(LostGroup, EndsTheWorkerWhenNobodyAbortsIt) {
  Lender lender;
  TestWorker worker(&lender, 0, nullptr, {.orphan_timeout_ms = 300});
  worker.queue().Push(ConfigureOf(3));
  { auto peer = lender.Join(3, 1); }  // comes and goes
  worker.queue().Push(AttachPool{.pool_epoch = 4, .memory_socket = "", .num_blocks = 8});
  const absl::Status status = worker.End();
  EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded) << status;
  EXPECT_THAT(status.message(), HasSubstr("has not aborted it for 300 ms"));
}

// A rank of two whose API server ends, and whose next one is `next_`.
class OrphanTest : public testing::Test {
 protected:
  absl::StatusOr<std::unique_ptr<WorkQueueClient>> AttachAgain(uint64_t mapped_pool_epoch) {
    mapped_pool_epoch_ = mapped_pool_epoch;
    if (++num_attempts_ < 3) return absl::UnavailableError("the API server at x is gone");
    auto queue = std::make_unique<FakeWorkQueue>();
    next_ = queue.get();  // the worker keeps it
    return queue;
  }

  FakeWorkQueue* WaitForNext() {
    while (next_ == nullptr) std::this_thread::sleep_for(milliseconds(1));
    return next_;
  }

  Lender lender_;
  std::atomic<uint64_t> mapped_pool_epoch_ = ~0ull;
  std::atomic<int> num_attempts_ = 0;
  std::atomic<FakeWorkQueue*> next_ = nullptr;
  TestWorker worker_{&lender_, 0, [this](uint64_t mapped_pool_epoch, int64_t) {
                       return AttachAgain(mapped_pool_epoch);
                     }};
};

TEST_F(OrphanTest, LeavesItsGroupAndAttachesWithThePoolThatItMaps) {
  TestWorker peer(&lender_, 1);
  FakeWorkQueue& queue = worker_.queue();
  for (FakeWorkQueue* each : {&queue, &peer.queue()}) {
    each->Push(ConfigureOf(3));
    each->Push(AttachPool{.pool_epoch = kPoolEpoch, .memory_socket = "", .num_blocks = kNumBlocks});
  }
  queue.WaitForReady(1);
  peer.queue().WaitForReady(1);
  // It is waiting for its peer when the server goes.
  queue.Push(ReceivedPlan{{.group_epoch = 3, .pool_epoch = kPoolEpoch, .step = 1}, 9});
  queue.Push(ReceivedPlan{{.group_epoch = 3,
                           .pool_epoch = kPoolEpoch,
                           .step = 2,
                           .previous_plan_hash = 9,
                           .slot_init = {{0, {}, {BlockId{5}}}},
                           .rows = {{0, 0, 1, true, {7}}}},
                          10});
  queue.WaitForSteps(1);
  queue.EndStream();
  FakeWorkQueue* const next = WaitForNext();
  EXPECT_EQ(mapped_pool_epoch_, kPoolEpoch);
  // The peer is in a group that is over, as it hears from its own server.
  peer.queue().Push(AbortGroup{3, "a new API server"});
  peer.queue().WaitForAborted(1);
  next->Push(AbortGroup{3, "a new API server"});
  next->WaitForAborted(1);
  for (FakeWorkQueue* each : {next, &peer.queue()}) {
    each->Push(ConfigureOf(5));
    each->Push(AttachPool{.pool_epoch = kPoolEpoch, .memory_socket = "", .num_blocks = kNumBlocks});
  }
  next->WaitForReady(1);
  EXPECT_EQ(lender_.num_fetches(), 2);
  next->WaitForBeats(1);
  next->Push(ShutdownWorker{});
  EXPECT_TRUE(worker_.End().ok());
  EXPECT_TRUE(next->faults().empty());
}

TEST_F(OrphanTest, WithoutAPoolSaysSo) {
  worker_.queue().EndStream();
  WaitForNext()->Push(ShutdownWorker{});
  EXPECT_TRUE(worker_.End().ok());
  EXPECT_EQ(mapped_pool_epoch_, 0u);
}

TEST_F(OrphanTest, AStopEndsTheSearchForAServer) {
  num_attempts_ = -1'000'000;
  worker_.queue().EndStream();
  while (num_attempts_ < -999'998) std::this_thread::sleep_for(milliseconds(1));
  EXPECT_FALSE(worker_.worker().RequestStop(/*patience_ms=*/60'000));
  EXPECT_TRUE(worker_.End().ok());
}

TEST(Orphan, EndsAfterTheTimeout) {
  Lender lender;
  TestWorker worker(
      &lender, 0,
      [](uint64_t, int64_t) { return absl::UnavailableError("the API server at x is gone"); },
      {.orphan_timeout_ms = 50});
  worker.queue().EndStream();
  const absl::Status status = worker.End();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(status.message(), "the API server at x is gone; no other came within 50 ms");
}

TEST(Orphan, EndsWhenTheNextServerRefusesIt) {
  Lender lender;
  TestWorker worker(&lender, 0,
                    [](uint64_t, int64_t) { return absl::FailedPreconditionError("other build"); },
                    {.orphan_timeout_ms = 50});
  worker.queue().EndStream();
  EXPECT_EQ(worker.End().message(), "other build");
}

// The end of a stream may reach the server after the next one has begun.
TEST(Orphan, AsksAgainWhenTheServerStillHoldsItsLastStream) {
  Lender lender;
  int num_attempts = 0;
  TestWorker worker(&lender, 0,
                    [&](uint64_t, int64_t) -> absl::StatusOr<std::unique_ptr<WorkQueueClient>> {
                      if (++num_attempts < 3) {
                        return absl::FailedPreconditionError("engine worker 0 is attached already");
                      }
                      auto queue = std::make_unique<FakeWorkQueue>();
                      queue->Push(ShutdownWorker{});
                      return queue;
                    });
  worker.queue().EndStream();
  EXPECT_TRUE(worker.End().ok());
  EXPECT_EQ(num_attempts, 3);
}

}  // namespace
}  // namespace wintserve
