// What the cache manager does for a session, whatever carries the messages.
#pragma once

#include <cstdint>
#include <optional>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "cache_manager/core/block_pool.h"
#include "cache_manager/memory/memory_server.h"
#include "common/mutex.h"
#include "proto/cache.pb.h"

namespace wintserve {

// Owns the KV pool: the states of its blocks here, its bytes in the memory server.
//
// One session at a time has the pool: OpenPool creates it under a new pool_epoch, and the end of
// that session returns every lease, withdraws the memory and ends the epoch. A request that is
// malformed or comes at the wrong time gets a Refusal and changes nothing. Threading: any thread.
// One mutex guards all state, and nothing waits while it is held.
class PoolOwner {
 public:
  // Beyond one host's largest rank group a request is malformed.
  static constexpr int kMaxRanks = 4;

  // REQUIRES: memory_server outlives this object.
  explicit PoolOwner(MemoryServer* memory_server) : memory_server_(memory_server) {}

  // The reply to `request`, which came on the stream with this id. Ids are never used again.
  proto::CacheReply Handle(uint64_t session_id, const proto::CacheRequest& request) EXCLUDES(mu_);

  // The stream with this id has ended. Has no effect the second time.
  void EndSession(uint64_t session_id) EXCLUDES(mu_);

 private:
  struct Pool {
    uint64_t session_id;
    uint64_t api_epoch;
    uint64_t pool_epoch;
    BlockPool blocks;
  };

  absl::Status Dispatch(uint64_t session_id, const proto::CacheRequest& request,
                        proto::CacheReply* reply) REQUIRES(mu_);
  absl::StatusOr<proto::PoolOpened> Open(uint64_t session_id, const proto::OpenPool& request)
      REQUIRES(mu_);
  absl::StatusOr<proto::BlocksLeased> Lease(uint64_t session_id, const proto::LeaseBlocks& request)
      REQUIRES(mu_);
  absl::StatusOr<proto::BlocksReturned> Return(uint64_t session_id,
                                               const proto::ReturnBlocks& request) REQUIRES(mu_);
  // The pool, if this session opened it.
  absl::StatusOr<Pool*> PoolOf(uint64_t session_id) REQUIRES(mu_);

  MemoryServer* const memory_server_;
  Mutex mu_;
  std::optional<Pool> pool_ GUARDED_BY(mu_);
};

}  // namespace wintserve
