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

// Both of two ranks have mapped what was sent to them, and are ready.
void BothAreReady(PoolLifecycle* pool, uint64_t epoch) {
  EXPECT_EQ(pool->attachable_pool(), epoch);
  pool->OnPoolSent();
  pool->OnPoolAttached();
}
void BothLetGo(PoolLifecycle* pool, uint64_t epoch) {
  EXPECT_TRUE(pool->OnDetached(0, epoch));
  EXPECT_TRUE(pool->OnDetached(1, epoch));
}
PoolLifecycle WithWorkers(uint64_t mapped0 = 0, uint64_t mapped1 = 0) {
  PoolLifecycle pool(2);
  pool.OnHello(0, mapped0);
  pool.OnHello(1, mapped1);
  pool.OnWorkersAttached();
  return pool;
}
const auto kDetachBoth = ElementsAre(Action::kDetachPool, Action::kDetachPool);

// The cache manager opens the pool that was asked for, both ranks map it.
void OpenAndAttach(PoolLifecycle* pool, const OpenedPool& opened) {
  ASSERT_TRUE(pool->OnOpened(opened).ok());
  EXPECT_THAT(Actions(pool), IsEmpty());
  BothAreReady(pool, opened.pool_epoch);
  EXPECT_THAT(Actions(pool), ElementsAre(Action::kUsePool));
}

// No worker maps a pool, and the cache manager has none: there will be another one.
void ExpectNewPoolIsOpened(PoolLifecycle* pool) {
  EXPECT_THAT(Actions(pool), ElementsAre(Action::kAdoptPool));
  EXPECT_TRUE(pool->adopting());
  EXPECT_EQ(pool->adopted_pool(), 0u);
  pool->OnPoolGone();
  EXPECT_THAT(Actions(pool), ElementsAre(Action::kOpenPool));
  EXPECT_FALSE(pool->adopting());
}

// Two ranks hold pool 1, served.
PoolLifecycle Held() {
  PoolLifecycle pool = WithWorkers();
  pool.OnConnected();
  ExpectNewPoolIsOpened(&pool);
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
  pool.OnHello(0, 0);
  pool.OnHello(1, 0);
  pool.OnWorkersAttached();
  EXPECT_THAT(Actions(&pool), IsEmpty());
  pool.OnConnected();
  ExpectNewPoolIsOpened(&pool);
  EXPECT_EQ(pool.WaitingFor(), "waiting for the cache manager to create the KV pool");
  EXPECT_EQ(pool.attachable_pool(), 0u);
  ASSERT_TRUE(pool.OnOpened(Pool(1)).ok());
  EXPECT_THAT(Actions(&pool), IsEmpty());
  EXPECT_EQ(pool.attachable_pool(), 1u);
  EXPECT_EQ(pool.WaitingFor(), "");
  pool.OnPoolSent();
  EXPECT_THAT(Actions(&pool), IsEmpty());
  pool.OnPoolAttached();
  EXPECT_THAT(Actions(&pool), ElementsAre(Action::kUsePool));
  EXPECT_EQ(pool.attachable_pool(), 1u);
}

// Groups come and go; the pool stays, and is used without more ado.
TEST(PoolLifecycle, ARankThatIsReplacedAttachesToThePoolThatIsHeld) {
  PoolLifecycle pool = Held();
  pool.OnDisconnected(1);
  pool.OnGone(1);
  EXPECT_THAT(Actions(&pool), IsEmpty());
  pool.OnHello(1, 0);
  EXPECT_EQ(pool.attachable_pool(), 1u);
  pool.OnPoolSent();
  pool.OnPoolAttached();
  EXPECT_THAT(Actions(&pool), IsEmpty());
}

TEST(PoolLifecycle, ARankThatDiesBeforeThePoolIsInUseChangesNothing) {
  PoolLifecycle pool = WithWorkers();
  pool.OnConnected();
  ExpectNewPoolIsOpened(&pool);
  pool.OnGone(0);
  ASSERT_TRUE(pool.OnOpened(Pool(1)).ok());
  pool.OnHello(0, 0);
  pool.OnPoolSent();
  pool.OnGone(1);
  EXPECT_THAT(Actions(&pool), IsEmpty());
  pool.OnHello(1, 0);
  BothAreReady(&pool, 1);
  EXPECT_THAT(Actions(&pool), ElementsAre(Action::kUsePool));
}

// A cache manager dies, and a rank with it.
TEST(PoolLifecycle, WhoIsGoneNeedNotLetGoOfTheLostPool) {
  PoolLifecycle pool = Resuming();
  pool.OnPoolGone();
  pool.OnDisconnected(1);
  // Its plans are in flight until the group is lost.
  EXPECT_THAT(Actions(&pool, /*idle=*/false), ElementsAre(Action::kPause));
  EXPECT_THAT(Actions(&pool), ElementsAre(Action::kDetachPool));
  EXPECT_EQ(pool.rank(), 0u);
  EXPECT_TRUE(pool.OnDetached(0, 1));
  EXPECT_THAT(Actions(&pool), IsEmpty());  // it may still map it
  EXPECT_EQ(pool.WaitingFor(), "a KV pool is lost that a worker may still hold");
  pool.OnGone(1);
  EXPECT_THAT(Actions(&pool), ElementsAre(Action::kOpenPool));
  OpenAndAttach(&pool, Pool(2));
}

TEST(PoolLifecycle, WhoDiesInsteadOfLettingGoHasLetGo) {
  PoolLifecycle pool = Resuming();
  pool.OnPoolGone();
  EXPECT_THAT(Actions(&pool),
              ElementsAre(Action::kPause, Action::kDetachPool, Action::kDetachPool));
  EXPECT_TRUE(pool.OnDetached(0, 1));
  pool.OnGone(1);
  EXPECT_THAT(Actions(&pool), ElementsAre(Action::kOpenPool));
}

TEST(PoolLifecycle, SaysWhoHasYetToLetGo) {
  PoolLifecycle pool = Resuming();
  EXPECT_EQ(pool.awaited_detach(), std::nullopt);
  pool.OnPoolGone();
  Actions(&pool);
  EXPECT_EQ(pool.awaited_detach(), 0u);
  EXPECT_TRUE(pool.OnDetached(0, 1));
  EXPECT_EQ(pool.awaited_detach(), 1u);
  pool.OnDisconnected(1);
  EXPECT_EQ(pool.awaited_detach(), std::nullopt) << "nobody can answer";
  pool.OnHello(1, 1);
  EXPECT_EQ(pool.awaited_detach(), std::nullopt) << "it has not been told";
  Actions(&pool);
  EXPECT_EQ(pool.awaited_detach(), 1u);
  pool.OnGone(1);
  EXPECT_EQ(pool.awaited_detach(), std::nullopt);
}

// Its stream broke before it could be told, or could answer; the worker itself lives.
TEST(PoolLifecycle, AWorkerThatComesBackWithTheLostPoolIsToldAgain) {
  PoolLifecycle pool = Resuming();
  pool.OnPoolGone();
  EXPECT_THAT(Actions(&pool),
              ElementsAre(Action::kPause, Action::kDetachPool, Action::kDetachPool));
  EXPECT_TRUE(pool.OnDetached(0, 1));
  pool.OnDisconnected(1);
  pool.OnHello(1, 1);
  EXPECT_THAT(Actions(&pool), ElementsAre(Action::kDetachPool));
  EXPECT_EQ(pool.rank(), 1u);
  EXPECT_TRUE(pool.OnDetached(1, 1));
  EXPECT_THAT(Actions(&pool), ElementsAre(Action::kOpenPool));
}

TEST(PoolLifecycle, AWorkerThatComesBackWithAnotherPoolLetsGoOfItFirst) {
  PoolLifecycle pool = Held();
  pool.OnDisconnected(1);
  pool.OnHello(1, 9);
  EXPECT_EQ(pool.attachable_pool(), 0u);
  EXPECT_THAT(Actions(&pool), ElementsAre(Action::kDetachPool));
  EXPECT_EQ(pool.mapped_pool(1), 9u);
  EXPECT_EQ(pool.WaitingFor(), "engine worker 1 holds a KV pool that is lost");
  EXPECT_FALSE(pool.OnDetached(1, 1));
  EXPECT_TRUE(pool.OnDetached(1, 9));
  EXPECT_EQ(pool.attachable_pool(), 1u);
}

TEST(PoolLifecycle, ThePoolOfAnEarlierApiServerIsTakenOver) {
  PoolLifecycle pool = WithWorkers(7, 7);
  pool.OnConnected();
  EXPECT_THAT(Actions(&pool), ElementsAre(Action::kAdoptPool));
  EXPECT_TRUE(pool.adopting());
  EXPECT_EQ(pool.adopted_pool(), 7u);
  EXPECT_EQ(pool.WaitingFor(), "waiting for the cache manager to hand over the KV pool");
  OpenAndAttach(&pool, Pool(7));
  EXPECT_FALSE(pool.adopting());
  // From then on it is like any other.
  pool.OnLost();
  pool.OnConnected();
  EXPECT_THAT(Actions(&pool), ElementsAre(Action::kLoseSession, Action::kResumePool));
}

TEST(PoolLifecycle, OneWorkerOfAnEarlierApiServerIsEnoughToTakeThePoolOver) {
  PoolLifecycle pool = WithWorkers(0, 7);
  pool.OnConnected();
  EXPECT_THAT(Actions(&pool), ElementsAre(Action::kAdoptPool));
  OpenAndAttach(&pool, Pool(7));
}

TEST(PoolLifecycle, APoolThatCannotBeTakenOverIsReplaced) {
  PoolLifecycle pool = WithWorkers(7, 7);
  pool.OnConnected();
  EXPECT_THAT(Actions(&pool), ElementsAre(Action::kAdoptPool));
  pool.OnPoolGone();
  EXPECT_FALSE(pool.adopting());
  EXPECT_THAT(Actions(&pool), kDetachBoth);
  BothLetGo(&pool, 7);
  EXPECT_THAT(Actions(&pool), ElementsAre(Action::kOpenPool));
  EXPECT_FALSE(pool.adopting());
  OpenAndAttach(&pool, Pool(8));
}

TEST(PoolLifecycle, ALossBeforeThePoolIsHandedOverAsksAgain) {
  PoolLifecycle pool = WithWorkers(7, 7);
  pool.OnConnected();
  EXPECT_THAT(Actions(&pool), ElementsAre(Action::kAdoptPool));
  pool.OnLost();
  EXPECT_THAT(Actions(&pool), IsEmpty());
  pool.OnConnected();
  EXPECT_THAT(Actions(&pool), ElementsAre(Action::kAdoptPool));
}

TEST(PoolLifecycle, WorkersThatHoldDifferentPoolsLetGoOfThem) {
  PoolLifecycle pool = WithWorkers(7, 8);
  EXPECT_THAT(Actions(&pool), kDetachBoth);
  pool.OnConnected();
  EXPECT_THAT(Actions(&pool), IsEmpty());
  EXPECT_TRUE(pool.OnDetached(0, 7));
  EXPECT_TRUE(pool.OnDetached(1, 8));
  ExpectNewPoolIsOpened(&pool);
}

// Whoever has not come back may still write to what its group was computing in.
TEST(PoolLifecycle, APoolIsNotTakenOverBeforeEveryRankIsThere) {
  PoolLifecycle pool(2);
  pool.OnHello(0, 7);
  pool.OnConnected();
  EXPECT_THAT(Actions(&pool), IsEmpty());
  pool.OnHello(1, 0);
  pool.OnWorkersAttached();
  EXPECT_THAT(Actions(&pool), ElementsAre(Action::kAdoptPool));
}

// Nobody is left to name the pool, which lives in the cache manager all the same.
TEST(PoolLifecycle, ThePoolOfAnEarlierApiServerIsTakenOverThoughItsWorkersHaveAllGone) {
  PoolLifecycle pool = WithWorkers(0, 0);
  pool.OnConnected();
  EXPECT_THAT(Actions(&pool), ElementsAre(Action::kAdoptPool));
  EXPECT_EQ(pool.adopted_pool(), 0u);
  ASSERT_TRUE(pool.OnOpened(Pool(7)).ok());
  EXPECT_FALSE(pool.every_rank_maps_pool());
  EXPECT_THAT(Actions(&pool), IsEmpty());
  BothAreReady(&pool, 7);
  EXPECT_THAT(Actions(&pool), ElementsAre(Action::kUsePool));
}

TEST(PoolLifecycle, RefusesAnotherPoolThanIsToBeTakenOver) {
  PoolLifecycle pool = WithWorkers(7, 7);
  pool.OnConnected();
  Actions(&pool);
  EXPECT_THAT(std::string(pool.OnOpened(Pool(8)).message()),
              HasSubstr("opened pool 0000000000000008, to be taken over was 0000000000000007"));
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

// The old pool's memory lives as long as a worker maps it, so a new one has to wait for that.
TEST(PoolLifecycle, ANewPoolIsCreatedOnlyAfterEveryRankHasLetGoOfTheOldOne) {
  PoolLifecycle pool = Resuming();
  pool.OnPoolGone();
  EXPECT_THAT(Actions(&pool, /*idle=*/false), ElementsAre(Action::kPause));
  EXPECT_THAT(Actions(&pool, /*idle=*/true), kDetachBoth);
  ASSERT_TRUE(pool.OnDetached(1, 1));
  EXPECT_THAT(Actions(&pool), IsEmpty());
  ASSERT_TRUE(pool.OnDetached(0, 1));
  EXPECT_THAT(Actions(&pool), ElementsAre(Action::kOpenPool));
  OpenAndAttach(&pool, Pool(2));
  EXPECT_EQ(pool.pool().pool_epoch, 2u);
}

TEST(PoolLifecycle, ALossBeforeTheAnswerAsksAgain) {
  PoolLifecycle pool = WithWorkers();
  pool.OnConnected();
  ExpectNewPoolIsOpened(&pool);
  pool.OnLost();
  EXPECT_THAT(Actions(&pool), IsEmpty());
  pool.OnConnected();
  EXPECT_THAT(Actions(&pool), ElementsAre(Action::kOpenPool));
  // The first request had arrived after all.
  OpenAndAttach(&pool, Pool(1, /*resumed=*/true));
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
  PoolLifecycle pool = WithWorkers();
  pool.OnConnected();
  Actions(&pool);
  EXPECT_TRUE(pool.OnOpened(Pool(1)).ok());
  EXPECT_THAT(Actions(&pool), IsEmpty());
  pool.OnPoolSent();
  return pool;
}

TEST(PoolLifecycle, ALossWhileWorkersAttachForTheFirstTimeReplacesThePool) {
  PoolLifecycle pool = Attaching();
  pool.OnLost();
  EXPECT_EQ(pool.attachable_pool(), 0u);
  EXPECT_THAT(Actions(&pool), kDetachBoth);  // and no kPause: there is no plan
  EXPECT_EQ(pool.WaitingFor(), "engine worker 0 holds a KV pool that is lost");
  ASSERT_TRUE(pool.OnDetached(0, 1));
  EXPECT_EQ(pool.WaitingFor(), "engine worker 1 holds a KV pool that is lost");
  ASSERT_TRUE(pool.OnDetached(1, 1));
  EXPECT_THAT(Actions(&pool), IsEmpty());
  EXPECT_EQ(pool.WaitingFor(), "waiting for the cache manager");
  pool.OnConnected();
  EXPECT_THAT(Actions(&pool), ElementsAre(Action::kOpenPool));
  OpenAndAttach(&pool, Pool(2));
}

TEST(PoolLifecycle, ALossBeforeAnyWorkerWasSentThePoolOpensAnotherOne) {
  PoolLifecycle pool = WithWorkers();
  pool.OnConnected();
  Actions(&pool);
  ASSERT_TRUE(pool.OnOpened(Pool(1)).ok());
  pool.OnLost();
  pool.OnConnected();
  EXPECT_THAT(Actions(&pool), ElementsAre(Action::kOpenPool));
}

TEST(PoolLifecycle, ALossWhileWorkersAttachToANewPoolReplacesItToo) {
  PoolLifecycle pool = Resuming();
  pool.OnPoolGone();
  EXPECT_THAT(Actions(&pool),
              ElementsAre(Action::kPause, Action::kDetachPool, Action::kDetachPool));
  BothLetGo(&pool, 1);
  EXPECT_THAT(Actions(&pool), ElementsAre(Action::kOpenPool));
  ASSERT_TRUE(pool.OnOpened(Pool(2)).ok());
  EXPECT_THAT(Actions(&pool), IsEmpty());
  pool.OnPoolSent();
  pool.OnLost();
  EXPECT_THAT(Actions(&pool), kDetachBoth);  // still paused
  BothLetGo(&pool, 2);
  pool.OnConnected();
  EXPECT_THAT(Actions(&pool), ElementsAre(Action::kOpenPool));
}

// The stream broke, but the cache manager lives: within the grace it still has the pool.
TEST(PoolLifecycle, APoolThatOutlivesALossWhileWorkersAttachIsAttachedOnceMore) {
  PoolLifecycle pool = Attaching();
  pool.OnLost();
  pool.OnConnected();
  EXPECT_THAT(Actions(&pool), kDetachBoth);
  BothLetGo(&pool, 1);
  EXPECT_THAT(Actions(&pool), ElementsAre(Action::kOpenPool));
  OpenAndAttach(&pool, Pool(1, /*resumed=*/true));
}

TEST(PoolLifecycle, ALossWhileTheOldPoolIsGivenUpChangesNothingButTheWait) {
  PoolLifecycle pool = Resuming();
  pool.OnPoolGone();
  EXPECT_THAT(Actions(&pool),
              ElementsAre(Action::kPause, Action::kDetachPool, Action::kDetachPool));
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
  pool = Held();
  EXPECT_FALSE(pool.OnDetached(0, 1));
  pool = Resuming();
  EXPECT_THAT(std::string(pool.OnOpened(Pool(7, true)).message()),
              HasSubstr("resumed pool 0000000000000007, asked for was 0000000000000001"));
  pool.OnPoolGone();
  Actions(&pool);
  EXPECT_FALSE(pool.OnDetached(0, 2));
  EXPECT_TRUE(pool.OnDetached(0, 1));
  EXPECT_FALSE(pool.OnDetached(0, 1));
}

}  // namespace
}  // namespace wintserve
