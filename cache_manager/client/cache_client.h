// The API server's end of the cache manager's session.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "cache_manager/core/cache_messages.h"
#include "cache_manager/core/pool_block.h"
#include "common/transport/tls_files.h"

namespace wintserve {

struct PoolSpec {
  uint32_t num_blocks = 0;
  std::vector<uint64_t> block_bytes_by_rank;
  std::string root_seed;    // see PrefixCacheConfig
  uint64_t host_bytes = 0;  // host tier over all ranks; 0: none
  int block_size_tokens = 64;
  // Take up this api_epoch's own pool again, never create one: NOT_FOUND when it is gone.
  bool resume_only = false;
};

struct OpenedPool {
  uint64_t pool_epoch = 0;
  std::string memory_socket;
  uint32_t num_blocks = 0;
  uint32_t num_host_slots = 0;
  bool resumed = false;  // this api_epoch's own pool was still there; Reconcile has to follow
};

// Called one at a time, from threads of gRPC: they must not block, nor destroy the client. The
// first one may come before ConnectCacheClient has returned. `tag` is the call's own. One that is
// null is skipped.
struct CacheEvents {
  // The answer to OpenPool. NOT_FOUND: see resume_only. FAILED_PRECONDITION: another session has
  // the pool open. RESOURCE_EXHAUSTED: the pool does not fit into memory. INVALID_ARGUMENT: a bad
  // PoolSpec.
  std::function<void(absl::StatusOr<OpenedPool>)> on_opened;
  std::function<void(uint64_t tag, PeekResult)> on_peeked;
  std::function<void(uint64_t tag, MatchResult)> on_matched;
  std::function<void(uint64_t tag, std::vector<PoolBlock>)> on_leased;  // empty: none is available
  std::function<void(uint64_t tag, std::vector<CommittedBlock>)> on_committed;
  std::function<void(std::vector<CopyOrder>)> on_copy_out;  // unasked: write-backs to run
  // With every reply, before its own event: blocks that a lease could get.
  std::function<void(uint32_t num_available)> on_available;
  // The session ended; nothing more is called. UNAVAILABLE when the cache manager died or shut
  // down, DEADLINE_EXCEEDED when it hangs (no reply for 3 s). Pins and leases last 5 s longer, in
  // case the same api_epoch reconnects. A refused Reconcile ends the session with the reason; the
  // pool then goes with the 5 s that began when the session before broke. Not called after Close().
  std::function<void(absl::Status)> on_closed;
};

// One session with the cache manager. Answers come in the order of the calls.
// Threading: any thread; every call only queues a message. A refusal of a call without an answer of
// its own (a stale generation, an entry that is not pinned) is a bug of the caller: it is logged
// and nothing happened. A refused Match or Lease is answered as empty, a refused Commit as entries
// of 0.
class CacheClient {
 public:
  // Close(), and waits until the session has ended (at most 2 s if the cache manager hangs). No
  // event is called afterwards.
  virtual ~CacheClient() = default;
  virtual void OpenPool(const PoolSpec& spec) = 0;
  virtual void Peek(uint64_t tag, const std::string& salt, std::span<const int32_t> tokens) = 0;
  virtual void Match(uint64_t tag, const std::string& salt, std::span<const int32_t> tokens,
                     bool allow_restore) = 0;
  virtual void LeaseBlocks(uint64_t tag, uint32_t count) = 0;
  virtual void Commit(uint64_t tag, CommitRequest request) = 0;
  virtual void Release(std::vector<uint64_t> entries) = 0;
  virtual void ReturnBlocks(std::vector<PoolBlock> blocks) = 0;
  virtual void CopyDone(std::vector<uint64_t> copy_ids) = 0;
  // All that the session still holds, after an OpenedPool that says resumed. last_copy_id: the
  // greatest copy_id that has come from this pool, 0 when those copies are forgotten; write-backs
  // after it come again.
  virtual void Reconcile(std::vector<PinCount> pins, std::vector<PoolBlock> leased,
                         uint64_t last_copy_id) = 0;
  // Every worker has dropped the pool's old mappings, or drained what it had been sent.
  virtual void Fence() = 0;
  // Ends the session once the messages queued before have been sent.
  virtual void Close() = 0;
};

// Drops what is cached, of one salt or all, over a connection of its own; the session goes on.
// Blocks for up to timeout_ms. Returns the number of entries that match no more.
absl::StatusOr<uint64_t> FlushPrefixCache(const std::string& target, const std::string& token,
                                          const std::optional<std::string>& salt,
                                          int64_t timeout_ms, const TlsIdentity& tls = {});

// target: a gRPC target such as "unix:/run/…/cache.sock" or "127.0.0.1:8003"; only the latter uses
// `tls`, and then the cache manager's certificate has to name that host.
// Waits up to timeout_ms for the first reply. UNAVAILABLE: no cache manager there in that time.
// UNAUTHENTICATED: it refused the token.
absl::StatusOr<std::unique_ptr<CacheClient>> ConnectCacheClient(
    const std::string& target, const std::string& token, uint64_t api_epoch, CacheEvents events,
    int64_t timeout_ms, const TlsIdentity& tls = {});

}  // namespace wintserve
