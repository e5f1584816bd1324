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
  // With resume_only: also take up the pool of this pool_epoch, whose API server is gone. 0: no.
  //  - num_blocks 0 means as many as it has; everything else has to be as it was opened with.
  //  - What had been committed stays matchable. All pins are gone; blocks that were leased or
  //    restored into, and host slots that were being filled, are nobody's until Fence, which is due
  //    once every worker of the old API server has left its group or has been reaped.
  //  - Nothing is to be reconciled: OpenedPool.resumed is false, its pool_epoch is this one.
  //  - The old session need not have outlived its 5 s: it ends with the adoption, unless it is
  //    another API server's that is still connected. If the answer is lost, asking again is right.
  uint64_t adopt_pool_epoch = 0;
  // Instead: whichever pool there is, for one whose workers have all gone with their API server.
  // NOT_FOUND when there is none that is laid out as asked for.
  bool adopt_any = false;
};

struct OpenedPool {
  uint64_t pool_epoch = 0;
  std::string memory_socket;
  uint32_t num_blocks = 0;
  uint32_t num_host_slots = 0;
  // This api_epoch's own pool was still there; Reconcile has to follow. False of an adopted pool.
  bool resumed = false;
  // The newest step that a Commit or CopyDone of this pool has named; 0: none. Whoever adopts it
  // counts on from there, and can tell what DistrustSteps is to name when it does not know how the
  // workers of before have ended.
  uint64_t newest_step = 0;
};

// Called one at a time, from threads of gRPC: they must not block, nor destroy the client. The
// first one may come before ConnectCacheClient has returned. `tag` is the call's own. One that is
// null is skipped.
struct CacheEvents {
  // The answer to OpenPool. NOT_FOUND: see resume_only; or there is no pool of adopt_pool_epoch
  // (any more). FAILED_PRECONDITION: another session has the pool open, for an adopter a matter of
  // time if that is the dead one (its end is noticed within 3 s); or the pool is laid out
  // otherwise, and the text says in what. RESOURCE_EXHAUSTED: the pool does not fit into memory.
  // INVALID_ARGUMENT: a bad PoolSpec.
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
  // case the same api_epoch reconnects; the pool itself waits for whoever adopts it, or opens
  // another one in its place. A refused Reconcile ends the session with the reason; the 5 s are
  // then those that began when the session before broke. Not called after Close().
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
  // step: the newest that ran one of these copies, or a later one; 0: unknown, as CommitRequest's.
  virtual void CopyDone(std::vector<uint64_t> copy_ids, uint64_t step) = 0;
  // All that the session still holds, after an OpenedPool that says resumed. last_copy_id: the
  // greatest copy_id that has come from this pool, 0 when those copies are forgotten; write-backs
  // after it come again.
  virtual void Reconcile(std::vector<PinCount> pins, std::vector<PoolBlock> leased,
                         uint64_t last_copy_id) = 0;
  // Every worker has dropped the pool's old mappings, or drained what it had been sent.
  virtual void Fence() = 0;
  // What the steps from first_step (> 0) on have written is wrong: entries committed by them, or
  // restored by them, match no more, with all that is below them; host copies made by them are
  // dropped. What is under way or of an unknown step counts as newest. Pins, leases and copies
  // under way stay the session's: Release, ReturnBlocks and CopyDone are due as ever. Saying it
  // again is no error.
  virtual void DistrustSteps(uint64_t first_step) = 0;
  // Ends the session once the messages queued before have been sent. Its pins are dropped, what it
  // had leased is quarantined; the pool waits for whoever adopts it, or opens another one.
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
