// Keeps a session with the cache manager: makes it, and makes it anew after it was lost.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <thread>

#include "absl/status/status.h"
#include "api_server/llm/llm_factory.h"
#include "cache_manager/client/cache_client.h"
#include "common/mutex.h"

namespace wintserve {

struct CacheLinkOptions {
  CacheConnector connect;
  uint64_t api_epoch = 0;
  CacheEvents events;  // of every session; on_closed comes after on_connected
  // A session is there. From the link's thread.
  std::function<void(std::unique_ptr<CacheClient>)> on_connected;
  // The cache manager refuses us, for good: another token, say. From the link's thread.
  std::function<void(absl::Status)> on_refused;
  // See LlmOptions; told of a session that hangs, and again every 3 s while none can be made anew.
  // From the link's thread.
  std::function<void()> on_hang;
};

// Owns a thread, on which everything that may block is done: connecting, the end of a lost session,
// on_hang. Threading: one thread calls.
class CacheLink {
 public:
  // Begins to connect at once.
  explicit CacheLink(CacheLinkOptions options);
  // Waits for a try that is under way.
  ~CacheLink();

  // The session of `client` is lost: ends it and connects anew. hangs: its cache manager is still
  // there but does not answer.
  void Reconnect(std::unique_ptr<CacheClient> client, bool hangs) EXCLUDES(mutex_);

 private:
  struct Order {
    std::unique_ptr<CacheClient> lost;
    bool hangs = false;
  };

  void Run() EXCLUDES(mutex_);
  // anew: there was a session before. False: stopping.
  bool Connect(bool anew) EXCLUDES(mutex_);
  void TellHang();
  std::optional<Order> NextOrder() EXCLUDES(mutex_);

  const CacheLinkOptions options_;
  Mutex mutex_;
  CondVar changed_;
  std::optional<Order> order_ GUARDED_BY(mutex_) = Order{};  // the first connection
  bool stopping_ GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

}  // namespace wintserve
