// Which KV pool the workers hold, and what has to happen until they hold one that a cache manager
// serves.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "api_server/work_queue/messages.h"
#include "cache_manager/client/cache_client.h"

namespace wintserve {

// A pure state machine of the engine's thread: events in, one action after the other out.
//
//            kOpenPool         OnOpened               kUsePool
//   NO POOL -----------> OPENING ------> ATTACHING -------------> HELD <------------.
//      ^      kAdoptPool                 |  every rank is          | OnLost         | kReconcile
//      |                                 |  ready in it            | kLoseSession   |
//      | every rank   kDetachPool        v OnLost  gone: kPause    v                |
//      `- detached <------------- (DRAINING) <------------ connected: kResumePool   |
//                                                                  | still there    |
//                                                                  `---- kPause ----'
//
// A pool outlives its cache manager as long as workers map it. So a new one is created only after
// every rank has let go of the old one, and a cache manager that comes back is first asked whether
// it still has the old pool, without creating any.
//
// A session that is lost while workers attach may have left some of them without the memory: those
// never become ready. Nothing was computed in that pool, so all let go of it.
//
// Which rank group attaches to the pool is GroupLifecycle's affair: it is told attachable_pool(),
// and groups may come and go while the pool stays. A process that has ended maps nothing. Workers
// that an earlier API server has left behind still map its pool: this one takes it over, if the
// cache manager still has it; also when all of them have gone, so that nobody can name it.
class PoolLifecycle {
 public:
  enum class Action {
    kNone,
    kAdoptPool,    // ask for adopted_pool(); OnOpened or OnPoolGone follows
    kOpenPool,     // ask for a new pool; OnOpened follows
    kUsePool,      // all sequences are computed in pool() from now on: new, or taken over
    kLoseSession,  // pool() goes on without a cache manager
    kResumePool,   // ask for pool() itself; OnOpened or OnPoolGone follows
    kPause,        // make no more plans, until kReconcile, kUsePool or kContinue
    kContinue,     // make plans of pool() again
    kReconcile,    // say what is held of pool(), no plan being in flight; all is as before
    kDetachPool,   // send mapped_pool(rank()) to rank(); OnDetached of it follows, or its end
  };

  explicit PoolLifecycle(uint32_t world_size) : ranks_(world_size) {}

  // Every rank has told the bytes of its blocks.
  void OnWorkersAttached() { workers_attached_ = true; }
  // The rank has attached, and maps that pool; 0: none.
  void OnHello(uint32_t rank, uint64_t mapped_pool_epoch);
  // Its stream broke; what it maps it may still map.
  void OnDisconnected(uint32_t rank) { ranks_[rank].attached = false; }
  // Its process has ended.
  void OnGone(uint32_t rank) { ranks_[rank] = {}; }
  // The ranks were sent attachable_pool().
  void OnPoolSent();
  // All of them have mapped it and are ready.
  void OnPoolAttached() { all_ready_ = true; }
  // False: of another pool, or not asked for; nothing happens.
  bool OnDetached(uint32_t rank, uint64_t pool_epoch);

  void OnConnected() { connected_ = true; }
  // INTERNAL: a pool that was not asked for.
  absl::Status OnOpened(const OpenedPool& pool);
  void OnPoolGone();
  // The session ended.
  void OnLost();

  // To be called after any event until it says kNone. idle: no plan is in flight.
  Action NextAction(bool idle);

  // Of the last action.
  uint32_t rank() const { return rank_; }
  uint64_t mapped_pool(uint32_t rank) const { return ranks_[rank].mapped_pool; }

  // A rank that was told to let go of mapped_pool(rank), and has not answered.
  std::optional<uint32_t> awaited_detach() const;
  // Or was sent it.
  bool every_rank_maps_pool() const;
  // The pool that a rank group may attach to; 0: none now.
  uint64_t attachable_pool() const;
  // REQUIRES: one has been opened.
  const OpenedPool& pool() const;
  bool connected() const { return connected_; }
  // A cache manager serves pool().
  bool has_session() const { return has_session_; }
  // The pool that is held, or that workers map, is asked for; none is created.
  bool resuming() const { return state_ == State::kHeld && resume_asked_; }
  bool adopting() const { return state_ == State::kOpening && may_adopt_; }
  // The pool that the workers map; 0: they map none, and it is whichever the cache manager has.
  // REQUIRES: adopting().
  uint64_t adopted_pool() const { return adopted_pool_; }
  // For people; empty while a pool is held, be there a cache manager or not.
  std::string WaitingFor() const;

 private:
  enum class State { kNoPool, kOpening, kAttaching, kHeld, kDraining, kDetaching };
  struct Rank {
    bool attached = false;
    uint64_t mapped_pool = 0;     // that it maps or was sent; 0: none
    bool told_to_detach = false;  // from it
  };

  Action NextActionWithoutPool();
  Action NextActionWhileHeld(bool idle);
  Action NextDetach(uint64_t kept_pool);
  bool NoneIsMappedBut(uint64_t pool_epoch) const;
  uint64_t OnlyMappedPool() const;

  State state_ = State::kNoPool;
  bool workers_attached_ = false;
  bool connected_ = false;
  bool may_adopt_ = true;       // no pool has been opened yet, nor refused to be adopted
  uint64_t adopted_pool_ = 0;   // that was asked for; 0: any
  bool all_ready_ = false;      // for pool_, once, from kAttaching on
  bool has_session_ = false;    // that serves pool_, from OnOpened to the next loss
  bool loss_is_news_ = false;   // kLoseSession is due
  bool resume_asked_ = false;   // of this connection
  bool reconcile_due_ = false;  // the cache manager still has the pool
  bool paused_ = true;          // before the first pool is in use, too
  std::vector<Rank> ranks_;
  std::optional<OpenedPool> pool_;
  uint32_t rank_ = 0;
};

}  // namespace wintserve
