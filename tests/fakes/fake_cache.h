// A cache manager inside the test's process: the real PrefixCache behind CacheClient, without
// gRPC and without memory.
#pragma once

#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "cache_manager/client/cache_client.h"
#include "cache_manager/core/prefix_cache.h"
#include "common/mutex.h"

namespace wintserve {

// Behaves as the service does: one session has the pool, the same api_epoch may take it up again,
// another one adopts it after that, a request out of order is refused, write-backs are pushed after
// a request. Answers come from a thread of its own. Outlives the clients that it makes.
// Thread-safe, but no method may be called from an event.
class FakeCache {
 public:
  // The type of CacheConnector (api_server/llm/llm_factory.h).
  using ConnectFunction = std::function<absl::StatusOr<std::unique_ptr<CacheClient>>(
      uint64_t api_epoch, CacheEvents events)>;

  FakeCache();
  ~FakeCache();
  FakeCache(const FakeCache&) = delete;
  FakeCache& operator=(const FakeCache&) = delete;

  ConnectFunction Connector();

  // While false, Connector's function returns UNAVAILABLE.
  void SetReachable(bool reachable) EXCLUDES(mutex_);
  // Each request is served this long after it was sent.
  void SetDelay(std::chrono::microseconds delay) EXCLUDES(mutex_);
  // While true, no request is served.
  void Hold(bool held) EXCLUDES(mutex_);

  // The session breaks (on_closed: UNAVAILABLE), requests that were not served are lost, the pool
  // waits for the same api_epoch.
  void DropSession() EXCLUDES(mutex_);
  // As DropSession, but the pool is lost: the process died.
  void Die() EXCLUDES(mutex_);
  // What an administrator's flush does. Returns the number of entries that match no more.
  uint64_t Flush(const std::optional<std::string>& salt) EXCLUDES(mutex_);

  // What an administrator's resize does: the host tier of every pool from the next one on.
  void ResizeHostTier(uint64_t host_bytes) EXCLUDES(mutex_);

  // Waits until no block is leased, pinned or being copied; false: that took more than 10 s.
  bool WaitUntilAllAvailable() EXCLUDES(mutex_);
  // Of the last pool, though its session may be over; default values before the first.
  PoolSpec spec() const EXCLUDES(mutex_);
  PrefixCacheStats stats() const EXCLUDES(mutex_);
  // Created so far.
  uint64_t num_pools() const EXCLUDES(mutex_);
  // The first invariant of the last pool that does not hold.
  absl::Status CheckInvariants() const EXCLUDES(mutex_);
  // Texts of all requests refused so far that were a bug of the caller. A good test finds none.
  std::vector<std::string> refusals() const EXCLUDES(mutex_);

 private:
  static constexpr uint64_t kFirstPoolEpoch = 99;
  class Client;
  using Clock = std::chrono::steady_clock;

  struct Session {
    uint64_t api_epoch = 0;
    CacheEvents events;
    bool closing = false;  // Close() was called: no event any more, but what was sent is served
    bool ended = false;    // nothing is served any more
  };
  struct Pool {
    PoolSpec spec;
    uint32_t num_host_slots = 0;
    uint64_t api_epoch = 0;
    uint64_t pool_epoch = 0;
    std::unique_ptr<PrefixCache> cache;
    const Session* session = nullptr;  // null: broken, or over
    bool resumable = true;             // false: the session is over, or the process died
    bool adoptable = true;             // false: the process died
    bool must_reconcile = false;
    uint64_t newest_step = 0;
    std::map<uint64_t, CopyOrder> write_backs;  // under way, by copy_id
    size_t num_lost_write_backs = 0;            // the last ones of them, to be ordered again
  };
  struct Request {
    std::shared_ptr<Session> session;
    Clock::time_point due;
    std::function<void()> serve;  // runs with mutex_ held
  };

  void Run() EXCLUDES(mutex_);
  void Send(std::shared_ptr<Session> session, std::function<void()> serve) EXCLUDES(mutex_);
  // The pool, if this session may use it now; null, and a refusal noted, if not.
  PrefixCache* CacheOf(const Session& session, const char* request) REQUIRES(mutex_);
  void Check(const absl::Status& status, const char* request) REQUIRES(mutex_);
  void Open(const Session& session, const PoolSpec& spec) REQUIRES(mutex_);
  absl::StatusOr<OpenedPool> TryOpen(const Session& session, const PoolSpec& spec) REQUIRES(mutex_);
  absl::StatusOr<OpenedPool> Adopt(const Session& session, const PoolSpec& spec) REQUIRES(mutex_);
  void EndSessionOfPool() REQUIRES(mutex_);
  void TellAvailable(const Session& session) REQUIRES(mutex_);
  void PushCopyOuts(const Session& session) REQUIRES(mutex_);
  void EndSession(Session* session) REQUIRES(mutex_);
  void BreakSession(const char* reason, bool resumable) REQUIRES(mutex_);

  mutable Mutex mutex_;
  CondVar changed_;
  bool stopping_ GUARDED_BY(mutex_) = false;
  bool reachable_ GUARDED_BY(mutex_) = true;
  bool held_ GUARDED_BY(mutex_) = false;
  std::chrono::microseconds delay_ GUARDED_BY(mutex_) = {};
  std::deque<Request> requests_ GUARDED_BY(mutex_);
  std::vector<std::shared_ptr<Session>> sessions_ GUARDED_BY(mutex_);  // that have not ended
  Pool pool_ GUARDED_BY(mutex_);
  std::optional<uint64_t> resized_host_bytes_ GUARDED_BY(mutex_);
  uint64_t last_pool_epoch_ GUARDED_BY(mutex_) = kFirstPoolEpoch - 1;
  std::vector<std::string> refusals_ GUARDED_BY(mutex_);
  std::thread thread_;
};

}  // namespace wintserve
