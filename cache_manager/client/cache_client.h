// The API server's end of the cache manager's session.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "cache_manager/core/pool_block.h"

namespace wintserve {

struct PoolSpec {
  uint32_t num_blocks = 0;
  std::vector<uint64_t> block_bytes_by_rank;
  uint64_t kv_layout_digest = 0;
};

struct OpenedPool {
  uint64_t pool_epoch = 0;
  std::string memory_socket;
  uint32_t num_blocks = 0;
};

// Called one at a time, from threads of gRPC: they must not block, nor destroy the client. The
// first one may come before ConnectCacheClient has returned.
struct CacheEvents {
  // The answer to OpenPool. FAILED_PRECONDITION: another session has the pool open.
  // RESOURCE_EXHAUSTED: the pool does not fit into memory. INVALID_ARGUMENT: a bad PoolSpec.
  std::function<void(absl::StatusOr<OpenedPool>)> on_opened;
  // The answer to LeaseBlocks(tag, …): empty when the pool has fewer free blocks than asked for.
  std::function<void(uint64_t tag, std::vector<PoolBlock>)> on_leased;
  // The session ended, and with it the pool_epoch and all leases; nothing more is called.
  // UNAVAILABLE when the cache manager died, hangs (no reply for 3 s) or shut down. Not called
  // after Close().
  std::function<void(absl::Status)> on_closed;
};

// One session with the cache manager. Answers come in the order of the calls.
// Threading: any thread; every call only queues a message.
class CacheClient {
 public:
  // Close(), and waits until the session has ended (at most 2 s if the cache manager hangs). No
  // event is called afterwards.
  virtual ~CacheClient() = default;
  virtual void OpenPool(const PoolSpec& spec) = 0;
  virtual void LeaseBlocks(uint64_t tag, uint32_t count) = 0;
  // A refusal (a stale generation, a block that is not leased) is a bug of the caller: it is logged
  // and none of these blocks is returned.
  virtual void ReturnBlocks(std::vector<PoolBlock> blocks) = 0;
  // Ends the session once the messages queued before have been sent.
  virtual void Close() = 0;
};

// target: a gRPC target such as "unix:/run/…/cache.sock" or "127.0.0.1:8003".
// Waits up to timeout_ms for the first reply. UNAVAILABLE: no cache manager there in that time.
// UNAUTHENTICATED: it refused the token.
absl::StatusOr<std::unique_ptr<CacheClient>> ConnectCacheClient(const std::string& target,
                                                                const std::string& token,
                                                                uint64_t api_epoch,
                                                                CacheEvents events,
                                                                int64_t timeout_ms);

}  // namespace wintserve
