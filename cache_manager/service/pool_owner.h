// What the cache manager does for its clients, whatever carries the messages.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "cache_manager/core/prefix_cache.h"
#include "cache_manager/memory/host_pool_memory.h"
#include "cache_manager/memory/memory_server.h"
#include "cache_manager/memory/pool_memory.h"
#include "common/mutex.h"
#include "proto/cache.pb.h"

namespace wintserve {

// Gets the cache's events (service Watch). Called with the PoolOwner's lock held: must not block,
// nor call back.
class CacheWatcher {
 public:
  virtual ~CacheWatcher() = default;
  virtual void OnEvent(std::shared_ptr<const proto::CacheEvent> event) = 0;
  virtual void OnLostEvents() = 0;  // some never come: what was seen is incomplete
};

// Of the system's secure random generator; never 0, which an unset field would name.
uint64_t RandomEpoch();

// Owns the KV pool: the states and the index of its blocks here, its bytes in the memory server.
//
//   no pool --OpenPool--> open --stream breaks--> grace (5 s) --ends--> orphan
//                          |  ^                     |  |                 |  |
//                          |  `---- Reconcile ------'  |                 |  | OpenPool that adopts
//                          it
//                  session |   OpenPool of the same    `-----> open <----'--'
//                    ends  |   api_epoch ("resumed")     OpenPool that adopts it
//                          `--> orphan
//
// One session at a time has the pool. The same api_epoch may take it up on another stream, even
// before the old one is known to be broken; the grace goes on until Reconcile is done. When the
// session is over, its pins are gone, what it had leased is quarantined, and the pool waits for as
// long as this process lives: for the API server of another api_epoch that adopts it by its
// pool_epoch, during the grace too if the stream is known to be broken or its own; or for one that
// opens another pool, and drops it with its memory. A request that is malformed or comes at the
// wrong time gets a Refusal and changes nothing. Threading: any thread. One mutex guards all state,
// and nothing waits while it is held, nor is memory unmapped.
class PoolOwner {
 public:
  using Clock = std::chrono::steady_clock;
  static constexpr std::chrono::seconds kGrace{5};
  static constexpr size_t kMaxWatchers = 16;

  // resize_path: a file in which the host tier's size that an Admin has asked for outlives this
  // process; it is read here. Empty: none. make_memory: of each pool; called with the lock held.
  // Others than the default `now` and `new_epoch`, which names a pool and must never return 0, are
  // for tests. REQUIRES: memory_server outlives this object.
  explicit PoolOwner(MemoryServer* memory_server, std::string resize_path = "",
                     PoolMemoryMaker make_memory = &HostPoolMemory::Create,
                     std::function<Clock::time_point()> now = &Clock::now,
                     std::function<uint64_t()> new_epoch = &RandomEpoch);

  // The id of a new stream; never used again.
  uint64_t NewSession() { return ++last_session_id_; }

  // The reply to `request`, which came on the stream with this id, and after it, where write-backs
  // are due, a CopyOut of at most kMaxCopiesPerPush.
  std::vector<proto::CacheReply> Handle(uint64_t session_id, const proto::CacheRequest& request)
      EXCLUDES(mu_);

  // The stream with this id broke: the grace begins. Whoever has the timer calls
  // EndExpiredSession.
  void SuspendSession(uint64_t session_id) EXCLUDES(mu_);
  // The client has ended the session. Has no effect the second time.
  void EndSession(uint64_t session_id) EXCLUDES(mu_);
  // Ends the session once its grace has ended. Returns when to call again, if a grace goes on.
  std::optional<Clock::time_point> EndExpiredSession() EXCLUDES(mu_);

  proto::StatsReply Stats() EXCLUDES(mu_);
  absl::StatusOr<proto::AdminReply> Admin(const proto::AdminRequest& request) EXCLUDES(mu_);

  // From now on the watcher gets every event, of later pools too. RESOURCE_EXHAUSTED: there are
  // kMaxWatchers. REQUIRES: it lives until Unwatch has returned.
  absl::Status Watch(CacheWatcher* watcher) EXCLUDES(mu_);
  void Unwatch(CacheWatcher* watcher) EXCLUDES(mu_);

  // Those of the pool's PrefixCache, if there is a pool. For tests, linear in the pool's size.
  absl::Status CheckInvariants() EXCLUDES(mu_);

 private:
  static constexpr uint64_t kNoSession = 0;

  struct Pool {
    proto::OpenPool spec;  // its api_epoch is that of the session that has it, or had it
    uint64_t session_id = kNoSession;  // none: an orphan
    bool has_stream = false;           // the session's is not known to be broken
    uint64_t pool_epoch = 0;
    uint32_t num_host_slots = 0;
    std::unique_ptr<PrefixCache> cache;
    uint64_t last_copy_id = 0;                   // that was ordered
    uint64_t last_copy_id_of_others = 0;         // from sessions that are over
    std::map<uint64_t, CopyOrder> write_backs;   // under way, by copy_id
    std::deque<CopyOrder> lost_write_backs;      // of them, to be ordered again
    uint64_t newest_step = 0;                    // that was named
    bool must_reconcile = false;                 // before anything else
    std::optional<Clock::time_point> grace_end;  // none: open, or an orphan
  };

  absl::Status Dispatch(uint64_t session_id, const proto::CacheRequest& request,
                        proto::CacheReply* reply) REQUIRES(mu_);
  absl::Status DispatchToPool(Pool* pool, const proto::CacheRequest& request,
                              proto::CacheReply* reply) REQUIRES(mu_);
  absl::StatusOr<proto::PoolOpened> Open(uint64_t session_id, const proto::OpenPool& request)
      REQUIRES(mu_);
  static absl::Status IsTaken(const Pool& pool);
  absl::Status TakeUp(Pool* pool, uint64_t session_id, const proto::OpenPool& request)
      REQUIRES(mu_);
  // NOT_FOUND: no pool of that epoch. FAILED_PRECONDITION: its session's stream is there, or it is
  // laid out otherwise.
  absl::Status Adopt(uint64_t session_id, const proto::OpenPool& request) REQUIRES(mu_);
  absl::Status CreatePool(uint64_t session_id, const proto::OpenPool& request) REQUIRES(mu_);
  // RESOURCE_EXHAUSTED: it does not fit into the memory that is available, its index included.
  absl::StatusOr<std::unique_ptr<PoolMemory>> CreateMemory(const proto::OpenPool& request,
                                                           uint32_t num_host_slots) const;
  absl::StatusOr<proto::AdminReply> ResizeHostTier(uint64_t host_bytes) REQUIRES(mu_);
  absl::Status Match(Pool* pool, const proto::Match& request, proto::Matched* reply) REQUIRES(mu_);
  absl::Status CopyDone(Pool* pool, const proto::CopyDone& request) REQUIRES(mu_);
  absl::Status Reconcile(Pool* pool, const proto::Reconcile& request) REQUIRES(mu_);
  // Write-backs that have become due, if any.
  std::optional<proto::CacheReply> TakeCopyOut(uint64_t session_id) REQUIRES(mu_);
  // The pool, if this session opened it.
  absl::StatusOr<Pool*> PoolOf(uint64_t session_id) REQUIRES(mu_);
  uint32_t NumAvailable(uint64_t session_id) REQUIRES(mu_);
  void TellWatchers() REQUIRES(mu_);
  // Ends the pool's session, for the reason that the log is told.
  void Orphan(Pool* pool, const char* why) REQUIRES(mu_);
  // Drops an orphan that such a request would replace, before the new pool asks for memory.
  void MakeRoomFor(const proto::OpenPool& request) EXCLUDES(mu_);

  MemoryServer* const memory_server_;
  const std::string resize_path_;
  const PoolMemoryMaker make_memory_;
  const std::function<Clock::time_point()> now_;
  const std::function<uint64_t()> new_epoch_;
  std::atomic<uint64_t> last_session_id_ = 0;
  Mutex mu_;
  std::optional<Pool> pool_ GUARDED_BY(mu_);
  std::vector<CacheWatcher*> watchers_ GUARDED_BY(mu_);
  // What an Admin has asked for, of every pool from the next on; none: nothing.
  std::optional<uint64_t> resized_host_bytes_ GUARDED_BY(mu_);
};

}  // namespace wintserve
