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
//            kOpenPool          kAttachPool             kUsePool
//   NO POOL -----------> OPENING ----------> ATTACHING ----------> HELD <-----------.
//      ^                                     | OnLost               | OnLost         | kReconcile
//      |                                     |                      | kLoseSession   |
//      | every rank   kDetachPool            v     gone: kPause     v                |
//      `- detached <------------- (DRAINING) <-------------- connected: kResumePool  |
//                                                                   | still there    |
//                                                                   `---- kPause ----'
//
// A pool outlives its cache manager as long as workers map it. So a new one is created only after
// every rank has let go of the old one, and a cache manager that comes back is first asked whether
// it still has the old pool, without creating any.
//
// A session that is lost while workers attach may have left some of them without the memory: those
// never become ready. Nothing was computed in that pool, so all let go of it.
class PoolLifecycle {
 public:
  enum class Action {
    kNone,
    kOpenPool,     // ask for a new pool; OnOpened follows
    kAttachPool,   // send pool() to every worker; OnReady of each follows
    kUsePool,      // all sequences are computed in pool() from now on, which is empty
    kLoseSession,  // pool() goes on without a cache manager
    kResumePool,   // ask for pool() itself; OnOpened or OnPoolGone follows
    kPause,        // make no more plans, until kReconcile, kUsePool or kContinue
    kContinue,     // make plans of pool() again
    kReconcile,    // say what is held of pool(), no plan being in flight; all is as before
    kDetachPool,   // send to every worker; OnDetached of each follows
  };

  explicit PoolLifecycle(uint32_t world_size) : ready_(world_size), detached_(world_size) {}

  // Every rank has told the bytes of its blocks.
  void OnWorkersAttached() { workers_attached_ = true; }
  void OnConnected() { connected_ = true; }
  // INTERNAL: a pool that was not asked for.
  absl::Status OnOpened(const OpenedPool& pool);
  void OnPoolGone();
  // INTERNAL: of another pool, or not asked for. A rank may still become ready for a pool that it
  // was told to let go of meanwhile.
  absl::Status OnReady(uint32_t rank, uint64_t pool_epoch);
  absl::Status OnDetached(uint32_t rank, uint64_t pool_epoch);
  // The session ended.
  void OnLost();

  // To be called after any event until it says kNone. idle: no plan is in flight.
  Action NextAction(bool idle);

  // REQUIRES: one has been opened.
  const OpenedPool& pool() const;
  bool connected() const { return connected_; }
  // A pool is asked for again, not created.
  bool resuming() const { return state_ == State::kHeld && resume_asked_; }
  // For people; empty while a pool is held, be there a cache manager or not.
  std::string WaitingFor() const;

 private:
  enum class State { kNoPool, kOpening, kOpened, kAttaching, kHeld, kDraining, kDetaching };

  Action NextActionWhileHeld(bool idle);

  absl::Status Mark(bool expected, const char* what, uint32_t rank, uint64_t pool_epoch,
                    std::vector<bool>* done) const;

  State state_ = State::kNoPool;
  bool workers_attached_ = false;
  bool connected_ = false;
  bool has_session_ = false;    // that serves pool_, from kOpened to the next loss
  bool loss_is_news_ = false;   // kLoseSession is due
  bool resume_asked_ = false;   // of this connection
  bool reconcile_due_ = false;  // the cache manager still has the pool
  bool paused_ = true;          // before the first pool is in use, too
  std::vector<bool> ready_;     // by rank, for pool_
  std::vector<bool> detached_;
  std::optional<OpenedPool> pool_;
};

}  // namespace wintserve
