// A cache manager inside the test's process: hands out block ids, owns no memory.
#pragma once

#include <cstdint>
#include <memory>
#include <set>
#include <thread>
#include <vector>

#include "absl/status/statusor.h"
#include "api_server/llm/inbox.h"
#include "api_server/llm/llm_factory.h"
#include "cache_manager/client/cache_client.h"
#include "common/mutex.h"

namespace wintserve {

// Outlives the clients that it makes. Thread-safe.
class FakeCache {
 public:
  FakeCache();
  ~FakeCache();

  CacheConnector Connector();

  // Until this is true, Connector's function returns UNAVAILABLE.
  void SetReachable(bool reachable) EXCLUDES(mutex_);
  // Ends the session as a dead cache manager would.
  void Die();
  // Waits until all blocks are free again; false: that took too long.
  bool WaitUntilAllFree() EXCLUDES(mutex_);
  PoolSpec spec() const EXCLUDES(mutex_);

 private:
  class Client;
  struct Call {
    enum Kind { kOpen, kLease, kReturn, kDie, kStop } kind = kStop;
    PoolSpec spec = {};
    uint64_t tag = 0;
    uint32_t count = 0;
    std::vector<PoolBlock> blocks = {};
  };

  void Run();
  void Serve(Call call) EXCLUDES(mutex_);

  Inbox<Call> calls_;
  mutable Mutex mutex_;
  CondVar freed_;
  bool reachable_ GUARDED_BY(mutex_) = true;
  CacheEvents events_ GUARDED_BY(mutex_);
  PoolSpec spec_ GUARDED_BY(mutex_);
  std::vector<PoolBlock> free_ GUARDED_BY(mutex_);
  std::thread thread_;
};

}  // namespace wintserve
