// The LLM when its cache manager dies, hangs, or comes back.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <thread>

#include "api_server/llm/llm_test_util.h"

namespace wintserve {
namespace {

class CacheLossTest : public LlmTest {
 protected:
  CacheLossTest() { options_.num_blocks_override = 32; }
  ~CacheLossTest() override {
    EXPECT_THAT(cache_.refusals(), testing::IsEmpty());
    EXPECT_TRUE(cache_.CheckInvariants().ok()) << cache_.CheckInvariants();
  }
  FakeWorkerOptions SlowWorker(uint32_t rank = 0) {
    FakeWorkerOptions worker = WorkerOptions(rank);
    worker.step_delay = std::chrono::milliseconds(1);
    return worker;
  }
};

// Every rank lets go of the lost pool, then a new one is created and everything is computed
// again; what was streamed before stands.
TEST_F(CacheLossTest, StreamsGoOnWithTheRightTextWhenTheCacheManagerDies) {
  for (const uint32_t world_size : {1u, 2u}) {
    SCOPED_TRACE(world_size);
    options_.world_size = static_cast<int>(world_size);
    registry_ = std::make_shared<prometheus::Registry>();
    Create();
    for (uint32_t rank = 0; rank < world_size; ++rank) AddWorker(SlowWorker(rank));
    ASSERT_TRUE(WaitUntilReady());
    std::vector<std::unique_ptr<Updates>> all;
    for (int i = 0; i < 6; ++i) {  // more than slots
      all.push_back(std::make_unique<Updates>());
      Submit(Request(std::string(70 + i, 'x'), 120), all[i].get());
    }
    ASSERT_TRUE(all[0]->WaitForTokens(20));
    cache_.Die();
    for (int i = 0; i < 6; ++i) {
      ASSERT_TRUE(all[i]->WaitFinished());
      EXPECT_TRUE(all[i]->last().error.ok()) << all[i]->last().error;
      EXPECT_EQ(all[i]->choice(0).text, Letters(70 + i, 120));
    }
    EXPECT_TRUE(cache_.WaitUntilAllAvailable());
    EXPECT_EQ(Metric("wintserve:kv_pool_replacements_total"), "1");
    llm_.reset();
    workers_.clear();
  }
  EXPECT_EQ(fatal_, "");
}

// The lost pool's memory lives as long as any rank maps it. Its plans in flight end, every rank
// is told to let go, and only when the last one has done so is there another pool; then each plan
// is of that one (a worker faults on a plan of another pool, and on a pool before it has let go).
TEST_F(CacheLossTest, NoPoolIsCreatedWhileARankMapsTheLostOne) {
  options_.world_size = 2;
  Create();
  AddWorker(SlowWorker(0));
  FakeWorkerOptions slow = SlowWorker(1);
  std::atomic<bool> is_told = false;
  std::atomic<bool> may_let_go = false;
  const auto wait_for = [](const std::atomic<bool>& flag) {
    for (int i = 0; i < 1000 && !flag; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    return flag.load();
  };
  slow.before_detach = [&] {
    is_told = true;
    wait_for(may_let_go);
  };
  AddWorker(slow);
  ASSERT_TRUE(WaitUntilReady());
  Updates updates;
  Submit(Request(std::string(70, 'x'), 120), &updates);
  ASSERT_TRUE(updates.WaitForTokens(20));
  cache_.Die();
  ASSERT_TRUE(wait_for(is_told));
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  EXPECT_EQ(cache_.num_pools(), 1u) << "a second one beside the memory that rank 1 maps";
  may_let_go = true;
  ASSERT_TRUE(updates.WaitFinished());
  EXPECT_TRUE(updates.last().error.ok()) << updates.last().error;
  EXPECT_EQ(updates.choice(0).text, Letters(70, 120));
  EXPECT_EQ(cache_.num_pools(), 2u);
  EXPECT_EQ(fatal_, "");
}

TEST_F(CacheLossTest, DecodingGoesOnWhileThereIsNoCacheManager) {
  StartServing(SlowWorker());
  Updates updates;
  Submit(Request(std::string(70, 'x'), 120), &updates);
  ASSERT_TRUE(updates.WaitForTokens(5));
  cache_.SetReachable(false);
  cache_.Die();
  // The lease covers the next plans: the block that it computes in lasts to position 128.
  ASSERT_TRUE(updates.WaitForTokens(55));
  EXPECT_TRUE(llm_->Readiness().ready);
  cache_.SetReachable(true);
  ASSERT_TRUE(updates.WaitFinished());
  EXPECT_EQ(updates.choice(0).text, Letters(70, 120));
}

// The session comes back within its grace, with everything that was held.
TEST_F(CacheLossTest, ASessionThatComesBackInTimeKeepsThePool) {
  StartServing(SlowWorker());
  Updates updates;
  Submit(Request(std::string(130, 'x'), 60), &updates);
  ASSERT_TRUE(updates.WaitForTokens(10));
  cache_.DropSession();
  ASSERT_TRUE(updates.WaitFinished());
  EXPECT_EQ(updates.choice(0).text, Letters(130, 60));
  Updates again;
  Submit(Request(std::string(130, 'x'), 60), &again);
  ASSERT_TRUE(again.WaitFinished());
  EXPECT_EQ(again.choice(0).text, Letters(130, 60));
  EXPECT_EQ(again.last().num_cached_tokens, 128);
  EXPECT_EQ(Metric("wintserve:cache_sessions_lost_total"), "1");
  EXPECT_EQ(Metric("wintserve:kv_pool_replacements_total"), "0");
  EXPECT_TRUE(cache_.WaitUntilAllAvailable());
}

TEST_F(CacheLossTest, ManyLossesOfBothKindsLoseNothing) {
  StartServing(SlowWorker());
  std::vector<std::unique_ptr<Updates>> all;
  for (int i = 0; i < 8; ++i) {
    all.push_back(std::make_unique<Updates>());
    Submit(Request(std::string(65 + 10 * i, 'x'), 60), all[i].get());
  }
  for (int i = 0; i < 8; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10 * i));
    if (i % 2 == 0) cache_.DropSession();
    if (i % 2 == 1) cache_.Die();
  }
  for (int i = 0; i < 8; ++i) {
    ASSERT_TRUE(all[i]->WaitFinished());
    EXPECT_TRUE(all[i]->last().error.ok()) << all[i]->last().error;
    EXPECT_EQ(all[i]->choice(0).text, Letters(65 + 10 * i, 60));
  }
  EXPECT_TRUE(cache_.WaitUntilAllAvailable());
}

// The cache manager dies after it has opened the pool and before a rank has mapped it: at the first
// start, and whenever the pool is replaced.
TEST_F(CacheLossTest, ALossBeforeEveryRankHasMappedThePoolReplacesIt) {
  options_.world_size = 2;
  Create();
  std::atomic<int> num_attached = 0;
  AddWorker(SlowWorker(0));
  FakeWorkerOptions late = SlowWorker(1);
  late.can_map = [&](const AttachPool&) {
    if (++num_attached % 2 == 0) return true;
    cache_.Die();
    return false;
  };
  AddWorker(late);
  ASSERT_TRUE(WaitUntilReady());
  EXPECT_EQ(num_attached, 2);
  Updates updates;
  Submit(Request(std::string(70, 'x'), 60), &updates);
  ASSERT_TRUE(updates.WaitForTokens(10));
  cache_.Die();
  ASSERT_TRUE(updates.WaitFinished());
  EXPECT_EQ(updates.choice(0).text, Letters(70, 60));
  EXPECT_EQ(num_attached, 4);
  EXPECT_EQ(Metric("wintserve:kv_pool_replacements_total"), "1");
  EXPECT_TRUE(cache_.WaitUntilAllAvailable());
  EXPECT_EQ(fatal_, "");
}

// A pool is taken over of which a rank has died unseen, and then lost. Of the next one nothing is
// wrong, nor is it after the session with it broke.
TEST_F(CacheLossTest, WhatWasWrongInALostPoolIsNotSaidOfTheNextOne) {
  options_.world_size = 2;
  Create();
  AddWorker(SlowWorker(0));
  AddWorker(SlowWorker(1));
  ASSERT_TRUE(WaitUntilReady());
  llm_.reset();
  for (auto& worker : workers_) worker->WaitForShutdown();
  workers_.clear();
  registry_ = std::make_shared<prometheus::Registry>();
  Create();
  constexpr uint64_t kLostPool = 99;
  FakeWorkerOptions survivor = SlowWorker(0);
  survivor.hello.mapped_pool_epoch = kLostPool;
  AddWorker(survivor);
  FakeWorkerOptions replacement = SlowWorker(1);
  replacement.can_map = [](const AttachPool& attach) { return attach.pool_epoch != kLostPool; };
  AddWorker(replacement);
  ASSERT_TRUE(WaitForReason("engine worker 1 is warming up"));
  cache_.Die();
  ASSERT_TRUE(WaitUntilReady()) << llm_->Readiness().reason;
  EXPECT_EQ(cache_.num_pools(), 2u);
  Updates updates;
  Submit(Request(std::string(130, 'x'), 60), &updates);
  ASSERT_TRUE(updates.WaitForTokens(10));
  cache_.DropSession();
  ASSERT_TRUE(updates.WaitFinished());
  Updates again;
  Submit(Request(std::string(130, 'x'), 5), &again);
  ASSERT_TRUE(again.WaitFinished());
  EXPECT_EQ(again.last().num_cached_tokens, 128);
  EXPECT_TRUE(cache_.WaitUntilAllAvailable());
}

TEST_F(CacheLossTest, APoolWithAHostTierInPlaceOfOneWithoutIsRestoredFrom) {
  StartServing(SlowWorker());
  const auto use_each_twice = [this] {
    for (int i = 0; i < 40; ++i) {
      Updates updates;
      Submit(Request(std::string(130, static_cast<char>('a' + i / 2)), 2), &updates);
      ASSERT_TRUE(updates.WaitFinished());
      EXPECT_TRUE(updates.last().error.ok()) << updates.last().error;
    }
  };
  use_each_twice();
  use_each_twice();
  EXPECT_EQ(Metric("fastdeploy:prefix_cpu_cache_token_num_total"), "0");
  cache_.ResizeHostTier(64 * 4096);
  cache_.Die();
  use_each_twice();
  use_each_twice();
  EXPECT_NE(Metric("fastdeploy:prefix_cpu_cache_token_num_total"), "0");
  EXPECT_TRUE(cache_.WaitUntilAllAvailable());
}

TEST_F(CacheLossTest, AnIdleEngineServesTheNextRequestFromANewPool) {
  StartServing();
  Updates first;
  Submit(Request(std::string(130, 'x'), 5), &first);
  ASSERT_TRUE(first.WaitFinished());
  cache_.Die();
  Updates second;
  Submit(Request(std::string(130, 'x'), 5), &second);
  ASSERT_TRUE(second.WaitFinished());
  EXPECT_EQ(second.choice(0).text, Letters(130, 5));
}

TEST_F(LlmTest, ACacheManagerThatRefusesTheNextSessionStopsTheEngine) {
  auto refuse = std::make_shared<std::atomic<bool>>(false);
  auto llm = CreateLlmWith(
      options_, std::make_unique<FakeTokenizer>(), registry_,
      [connect = cache_.Connector(), refuse](
          uint64_t epoch, CacheEvents events) -> absl::StatusOr<std::unique_ptr<CacheClient>> {
        if (refuse->load()) return absl::UnauthenticatedError("another instance's token");
        return connect(epoch, std::move(events));
      },
      [](const auto&) { return 0; });
  ASSERT_TRUE(llm.ok()) << llm.status();
  llm_ = *std::move(llm);
  AddWorker(WorkerOptions());
  ASSERT_TRUE(WaitUntilReady());
  refuse->store(true);
  cache_.Die();
  EXPECT_EQ(WaitForFatal(), "no session with the cache manager: another instance's token");
}

}  // namespace
}  // namespace wintserve
