#include "api_server/llm/pool_lifecycle.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace wintserve {
namespace {

using Action = PoolLifecycle::Action;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

OpenedPool Pool(uint64_t epoch, bool resumed = false) {
  return {.pool_epoch = epoch, .memory_socket = "m", .num_blocks = 8, .resumed = resumed};
}

std::vector<Action> Actions(PoolLifecycle* pool, bool idle = true) {
  std::vector<Action> actions;
  for (;;) {
    const Action action = pool->NextAction(idle);
    if (action == Action::kNone) return actions;
    actions.push_back(action);
  }
}

// Both of two ranks answer, for the pool of that epoch.
void BothAreReady(PoolLifecycle* pool, uint64_t epoch) {
  EXPECT_TRUE(pool->OnReady(0, epoch).ok());
  EXPECT_TRUE(pool->OnReady(1, epoch).ok());
}
void BothLetGo(PoolLifecycle* pool, uint64_t epoch) {
  EXPECT_TRUE(pool->OnDetached(0, epoch).ok());
  EXPECT_TRUE(pool->OnDetached(1, epoch).ok());
}

// The cache manager opens the pool that was asked for, both ranks map it.
void OpenAndAttach(PoolLifecycle* pool, const OpenedPool& opened) {
  ASSERT_TRUE(pool->OnOpened(opened).ok());
  EXPECT_THAT(Actions(pool), ElementsAre(Action::kAttachPool));
  BothAreReady(pool, opened.pool_epoch);
  EXPECT_THAT(Actions(pool), ElementsAre(Action::kUsePool));
}

// Two ranks hold pool 1, served.
PoolLifecycle Held() {
  PoolLifecycle pool(2);
  pool.OnWorkersAttached();
  pool.OnConnected();
  EXPECT_THAT(Actions(&pool), ElementsAre(Action::kOpenPool));
  OpenAndAttach(&pool, Pool(1));
  return pool;
}

// They go on with it; a cache manager that came back is asked whether it still has it.
PoolLifecycle Resuming() {
  PoolLifecycle pool = Held();
  pool.OnLost();
  pool.OnConnected();
  EXPECT_THAT(Actions(&pool), ElementsAre(Action::kLoseSession, Action::kResumePool));
  return pool;
}

TEST(PoolLifecycle, AtTheStartAPoolIsOpenedAndAttachedOnceAllAreThere) {
  PoolLifecycle pool(2);
  EXPECT_EQ(pool.WaitingFor(), "waiting for the cache manager");
  pool.OnWorkersAttached();
  EXPECT_THAT(Actions(&pool), IsEmpty());
  pool.OnConnected();
  EXPECT_THAT(Actions(&pool), ElementsAre(Action::kOpenPool));
  EXPECT_EQ(pool.WaitingFor(), "waiting for the cache manager to create the KV pool");
  ASSERT_TRUE(pool.OnOpened(Pool(1)).ok());
  EXPECT_THAT(Actions(&pool), ElementsAre(Action::kAttachPool));
  EXPECT_EQ(pool.WaitingFor(), "engine worker 0 is warming up");
  ASSERT_TRUE(pool.OnReady(0, 1).ok());
  EXPECT_THAT(Actions(&pool), IsEmpty());
  EXPECT_EQ(pool.WaitingFor(), "engine worker 1 is warming up");
  ASSERT_TRUE(pool.OnReady(1, 1).ok());
  EXPECT_THAT(Actions(&pool), ElementsAre(Action::kUsePool));
  EXPECT_EQ(pool.WaitingFor(), "");
}

TEST(PoolLifecycle, APoolThatIsStillThereIsReconciledAndNothingElseHappens) {
  PoolLifecycle pool = Held();
  pool.OnLost();
  EXPECT_THAT(Actions(&pool), ElementsAre(Action::kLoseSession));
  EXPECT_EQ(pool.WaitingFor(), "");  // decoding goes on
  pool.OnConnected();
  EXPECT_THAT(Actions(&pool), ElementsAre(Action::kResumePool));
  ASSERT_TRUE(pool.OnOpened(Pool(1, /*resumed=*/true)).ok());
  EXPECT_THAT(Actions(&pool, /*idle=*/false), ElementsAre(Action::kPause));
  EXPECT_THAT(Actions(&pool, /*idle=*/true), ElementsAre(Action::kReconcile));
  EXPECT_THAT(Actions(&pool), IsEmpty());
  // And once more.
  pool.OnLost();
  pool.OnConnected();
  EXPECT_THAT(Actions(&pool), ElementsAre(Action::kLoseSession, Action::kResumePool));
}

// A7: the old pool's memory lives as long as a worker maps it, so a new one has to wait for that.
TEST(PoolLifecycle, ANewPoolIsCreatedOnlyAfterEveryRankHasLetGoOfTheOldOne) {
  PoolLifecycle pool = Resuming();
  pool.OnPoolGone();
  EXPECT_THAT(Actions(&pool, /*idle=*/false), ElementsAre(Action::kPause));
  EXPECT_THAT(Actions(&pool, /*idle=*/true), ElementsAre(Action::kDetachPool));
  ASSERT_TRUE(pool.OnDetached(1, 1).ok());
  EXPECT_THAT(Actions(&pool), IsEmpty());
  ASSERT_TRUE(pool.OnDetached(0, 1).ok());
  EXPECT_THAT(Actions(&pool), ElementsAre(Action::kOpenPool));
  OpenAndAttach(&pool, Pool(2));
  EXPECT_EQ(pool.pool().pool_epoch, 2u);
}

TEST(PoolLifecycle, ALossBeforeTheAnswerAsksAgain) {
  PoolLifecycle pool(1);
  pool.OnWorkersAttached();
  pool.OnConnected();
  EXPECT_THAT(Actions(&pool), ElementsAre(Action::kOpenPool));
  pool.OnLost();
  EXPECT_THAT(Actions(&pool), IsEmpty());
  pool.OnConnected();
  EXPECT_THAT(Actions(&pool), ElementsAre(Action::kOpenPool));
  // The first request had arrived after all.
  ASSERT_TRUE(pool.OnOpened(Pool(1, /*resumed=*/true)).ok());
  EXPECT_THAT(Actions(&pool), ElementsAre(Action::kAttachPool));
}

TEST(PoolLifecycle, ALossWhileAskingForThePoolAsksAgain) {
  PoolLifecycle pool = Resuming();
  pool.OnLost();
  EXPECT_THAT(Actions(&pool), IsEmpty());
  pool.OnConnected();
  EXPECT_THAT(Actions(&pool), ElementsAre(Action::kResumePool));
}

TEST(PoolLifecycle, ALossBetweenTheAnswerAndReconcileAsksAgain) {
  PoolLifecycle pool = Resuming();
  ASSERT_TRUE(pool.OnOpened(Pool(1, /*resumed=*/true)).ok());
  EXPECT_THAT(Actions(&pool, /*idle=*/false), ElementsAre(Action::kPause));
  pool.OnLost();
  EXPECT_THAT(Actions(&pool), ElementsAre(Action::kContinue));
  pool.OnConnected();
  EXPECT_THAT(Actions(&pool), ElementsAre(Action::kResumePool));
  ASSERT_TRUE(pool.OnOpened(Pool(1, /*resumed=*/true)).ok());
  EXPECT_THAT(Actions(&pool), ElementsAre(Action::kPause, Action::kReconcile));
}

// At the first start, two ranks were told to map pool 1.
PoolLifecycle Attaching() {
  PoolLifecycle pool(2);
  pool.OnWorkersAttached();
  pool.OnConnected();
  Actions(&pool);
  EXPECT_TRUE(pool.OnOpened(Pool(1)).ok());
  EXPECT_THAT(Actions(&pool), ElementsAre(Action::kAttachPool));
  return pool;
}

TEST(PoolLifecycle, ALossWhileWorkersAttachForTheFirstTimeReplacesThePool) {
  PoolLifecycle pool = Attaching();
  pool.OnLost();
  EXPECT_THAT(Actions(&pool), ElementsAre(Action::kDetachPool));  // and no kPause: there is no plan
  EXPECT_EQ(pool.WaitingFor(), "engine worker 0 holds a KV pool that is lost");
  ASSERT_TRUE(pool.OnDetached(0, 1).ok());
  EXPECT_EQ(pool.WaitingFor(), "engine worker 1 holds a KV pool that is lost");
  ASSERT_TRUE(pool.OnDetached(1, 1).ok());
  EXPECT_THAT(Actions(&pool), IsEmpty());
  EXPECT_EQ(pool.WaitingFor(), "waiting for the cache manager");
  pool.OnConnected();
  EXPECT_THAT(Actions(&pool), ElementsAre(Action::kOpenPool));
  OpenAndAttach(&pool, Pool(2));
}

TEST(PoolLifecycle, ALossWhileWorkersAttachToANewPoolReplacesItToo) {
  PoolLifecycle pool = Resuming();
  pool.OnPoolGone();
  EXPECT_THAT(Actions(&pool), ElementsAre(Action::kPause, Action::kDetachPool));
  BothLetGo(&pool, 1);
  EXPECT_THAT(Actions(&pool), ElementsAre(Action::kOpenPool));
  ASSERT_TRUE(pool.OnOpened(Pool(2)).ok());
  EXPECT_THAT(Actions(&pool), ElementsAre(Action::kAttachPool));
  pool.OnLost();
  EXPECT_THAT(Actions(&pool), ElementsAre(Action::kDetachPool));  // still paused
  BothLetGo(&pool, 2);
  pool.OnConnected();
  EXPECT_THAT(Actions(&pool), ElementsAre(Action::kOpenPool));
}

TEST(PoolLifecycle, ARankMayBecomeReadyForALostPoolBeforeItLetsGoOfIt) {
  PoolLifecycle pool = Attaching();
  ASSERT_TRUE(pool.OnReady(0, 1).ok());
  pool.OnLost();
  EXPECT_THAT(Actions(&pool), ElementsAre(Action::kDetachPool));
  EXPECT_FALSE(pool.OnReady(0, 1).ok());
  EXPECT_TRUE(pool.OnReady(1, 1).ok());
  BothLetGo(&pool, 1);
  EXPECT_THAT(std::string(pool.OnReady(1, 1).message()),
              HasSubstr("engine worker 1 is ready for pool 0000000000000001"));
}

// The loss and the answers of ranks may come together, before any action is asked for.
TEST(PoolLifecycle, ARankMayBecomeReadyBetweenTheLossAndTheOrderToLetGo) {
  PoolLifecycle pool = Attaching();
  pool.OnLost();
  EXPECT_TRUE(pool.OnReady(0, 1).ok());
  EXPECT_FALSE(pool.OnReady(0, 1).ok());
  EXPECT_THAT(Actions(&pool), ElementsAre(Action::kDetachPool));
  EXPECT_TRUE(pool.OnReady(1, 1).ok());
  BothLetGo(&pool, 1);
  pool.OnConnected();
  EXPECT_THAT(Actions(&pool), ElementsAre(Action::kOpenPool));
}

// The stream broke, but the cache manager lives: within the grace it still has the pool.
TEST(PoolLifecycle, APoolThatOutlivesALossWhileWorkersAttachIsAttachedOnceMore) {
  PoolLifecycle pool = Attaching();
  pool.OnLost();
  pool.OnConnected();
  EXPECT_THAT(Actions(&pool), ElementsAre(Action::kDetachPool));
  BothLetGo(&pool, 1);
  EXPECT_THAT(Actions(&pool), ElementsAre(Action::kOpenPool));
  OpenAndAttach(&pool, Pool(1, /*resumed=*/true));
}

TEST(PoolLifecycle, ALossWhileTheOldPoolIsGivenUpChangesNothingButTheWait) {
  PoolLifecycle pool = Resuming();
  pool.OnPoolGone();
  EXPECT_THAT(Actions(&pool), ElementsAre(Action::kPause, Action::kDetachPool));
  pool.OnLost();
  BothLetGo(&pool, 1);
  EXPECT_THAT(Actions(&pool), IsEmpty());
  pool.OnConnected();
  EXPECT_THAT(Actions(&pool), ElementsAre(Action::kOpenPool));
}

TEST(PoolLifecycle, RefusesWhatWasNotAskedFor) {
  PoolLifecycle pool(2);
  EXPECT_THAT(std::string(pool.OnOpened(Pool(1)).message()),
              HasSubstr("opened pool 0000000000000001, which was not asked for"));
  EXPECT_FALSE(pool.OnReady(0, 1).ok());
  pool = Held();
  EXPECT_THAT(std::string(pool.OnReady(1, 1).message()),
              HasSubstr("engine worker 1 is ready for pool 0000000000000001"));
  EXPECT_FALSE(pool.OnDetached(0, 1).ok());
  pool = Resuming();
  EXPECT_THAT(std::string(pool.OnOpened(Pool(7, true)).message()),
              HasSubstr("resumed pool 0000000000000007, asked for was 0000000000000001"));
  pool.OnPoolGone();
  Actions(&pool);
  EXPECT_FALSE(pool.OnDetached(0, 2).ok());
  ASSERT_TRUE(pool.OnDetached(0, 1).ok());
  EXPECT_THAT(std::string(pool.OnDetached(0, 1).message()),
              HasSubstr("engine worker 0 has let go of pool 0000000000000001"));
}

}  // namespace
}  // namespace wintserve
