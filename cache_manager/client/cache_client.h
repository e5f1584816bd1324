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

// Called from the client's own thread; must not block.
struct CacheEvents {
  std::function<void(absl::StatusOr<OpenedPool>)> on_opened;
  // The answer to LeaseBlocks(tag, …): empty when the pool has fewer free blocks than asked for.
  std::function<void(uint64_t tag, std::vector<PoolBlock>)> on_leased;
  // The session ended; nothing more is called. Not called for a Close() of our own.
  std::function<void(absl::Status)> on_closed;
};

// Threading: any thread; every call only queues a message.
class CacheClient {
 public:
  virtual ~CacheClient() = default;
  virtual void OpenPool(const PoolSpec& spec) = 0;
  virtual void LeaseBlocks(uint64_t tag, uint32_t count) = 0;
  virtual void ReturnBlocks(std::vector<PoolBlock> blocks) = 0;
  virtual void Close() = 0;
};

// target: a gRPC target such as "unix:/run/…/cache.sock". Waits up to timeout_ms for the
// connection.
absl::StatusOr<std::unique_ptr<CacheClient>> ConnectCacheClient(const std::string& target,
                                                                const std::string& token,
                                                                uint64_t api_epoch,
                                                                CacheEvents events,
                                                                int64_t timeout_ms);

}  // namespace wintserve
