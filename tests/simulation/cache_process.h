// The cache manager's process and the session with it: the real PrefixCache behind a connection
// that is slow, breaks, is taken up again within the grace, or ends with the process.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "api_server/scheduler/scheduler.h"
#include "cache_manager/core/prefix_cache.h"
#include "tests/simulation/config.h"
#include "tests/simulation/event_queue.h"
#include "tests/simulation/random.h"
#include "tests/simulation/report.h"

namespace wintserve::simulation {

struct FenceRequest {};
struct DistrustRequest {
  uint64_t first_step = 0;
};
// HeldBlocks is the Reconcile of a session that was taken up again.
using CacheRequest = std::variant<CacheCommand, HeldBlocks, FenceRequest, DistrustRequest>;

struct Peeked {
  uint64_t tag = 0;
  PeekResult result;
};
struct Matched {
  uint64_t tag = 0;
  MatchResult result;
};
struct Leased {
  uint64_t tag = 0;
  std::vector<PoolBlock> blocks;
};
struct Committed {
  uint64_t tag = 0;
  std::vector<CommittedBlock> blocks;
};
struct CopyOut {
  std::vector<CopyOrder> copies;
};
struct Distrusted {};
struct Done {};
using CacheReply = std::variant<Done, Peeked, Matched, Leased, Committed, CopyOut, Distrusted>;

class CacheProcess {
 public:
  struct Events {
    std::function<void(const CacheReply& reply, uint32_t num_available)> on_reply;
    std::function<void()> on_lost;
    // The same pool; a Reconcile has to be the first request.
    std::function<void()> on_resumed;
    // Connected again, but the pool is gone: OpenPool, once no plan of the old one can run.
    std::function<void()> on_pool_gone;
    std::function<void(int num_blocks)> on_pool_opened;
    // As ordered by Adopt. A Fence has to be the first request.
    std::function<void(uint32_t num_available)> on_adopted;
  };

  // With a pool open and connected.
  CacheProcess(const SimulationConfig& config, EventQueue* clock, Report* report, Events events);

  // Lost without a trace while the connection is broken, as the caller may not know yet.
  void Send(CacheRequest request);
  // Answered by on_pool_opened.
  void OpenPool();

  // The API server has died, and with it the session. False: there is none, nothing happens.
  bool LoseServer();
  // Another one takes over the pool. Answered by on_adopted. REQUIRES: LoseServer was the last
  // thing that happened to the connection.
  void Adopt();

  // Faults. One that comes while the connection is down already has no effect.
  void BreakSession();
  void Die();
  // The operator's.
  void Flush(const std::optional<std::string>& salt);

  bool connected() const { return connected_; }
  // Adds the totals of the pool that is open; those of pools that ended are in the report.
  void AddTotals(Counters* counters) const;
  // Null between the end of one pool and the start of the next.
  const PrefixCache* pool() const { return pool_ ? &*pool_ : nullptr; }

 private:
  void CreatePool();
  void DropPool();
  void LoseConnection(bool process_died);
  void Reconnect();
  void Handle(const CacheRequest& request);
  CacheReply Answer(const CacheCommand& command);
  void Reply(CacheReply reply);
  void FinishCopy(uint64_t copy_id, uint64_t step);
  void CheckDone(const char* request, const absl::Status& status);
  void CheckPool(const char* after);
  int64_t LatencyUs();

  const SimulationConfig& config_;
  EventQueue& clock_;
  Report& report_;
  const Events events_;
  Random random_;

  std::optional<PrefixCache> pool_;
  std::map<uint64_t, CopyOrder> write_backs_;  // ordered, not reported as done
  bool grace_over_ = false;
  bool connected_ = true;
  uint64_t connection_ = 1;  // what was sent over an earlier one is lost
  OrderedDelay to_process_;
  OrderedDelay from_process_;
  int num_pools_ = 0;
};

}  // namespace wintserve::simulation
