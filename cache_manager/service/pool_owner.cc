#include "cache_manager/service/pool_owner.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <openssl/rand.h>

#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "cache_manager/memory/available_memory.h"
#include "cache_manager/memory/pool_memory.h"
#include "common/check.h"
#include "common/log.h"
#include "common/status_macros.h"

namespace wintserve {
namespace {

// Never 0, which an unset field would name.
uint64_t NewEpoch() {
  uint64_t epoch = 0;
  while (epoch == 0) {
    CHECK(RAND_bytes(reinterpret_cast<unsigned char*>(&epoch), sizeof(epoch)) == 1,
          "the random generator failed");
  }
  return epoch;
}

absl::Status ValidateOpen(const proto::OpenPool& request) {
  if (request.api_epoch() == 0) return absl::InvalidArgumentError("OpenPool: api_epoch is 0");
  constexpr uint32_t kMaxBlocks = std::numeric_limits<int32_t>::max();
  if (request.num_blocks() == 0 || request.num_blocks() > kMaxBlocks) {
    return absl::InvalidArgumentError(fmt::format("OpenPool: num_blocks is {}; allowed: 1 to {}",
                                                  request.num_blocks(), kMaxBlocks));
  }
  const int num_ranks = request.block_bytes_by_rank_size();
  if (num_ranks < 1 || num_ranks > PoolOwner::kMaxRanks) {
    return absl::InvalidArgumentError(
        fmt::format("OpenPool: block_bytes_by_rank has {} entries; allowed: 1 to {}", num_ranks,
                    PoolOwner::kMaxRanks));
  }
  for (int rank = 0; rank < num_ranks; ++rank) {
    if (request.block_bytes_by_rank(rank) == 0) {
      return absl::InvalidArgumentError(
          fmt::format("OpenPool: block_bytes_by_rank[{}] is 0", rank));
    }
  }
  return absl::OkStatus();
}

}  // namespace

proto::CacheReply PoolOwner::Handle(uint64_t session_id, const proto::CacheRequest& request) {
  proto::CacheReply reply;
  absl::Status status;
  {
    MutexLock lock(&mu_);
    status = Dispatch(session_id, request, &reply);
  }
  if (!status.ok()) {
    proto::Refusal* refusal = reply.mutable_refusal();
    refusal->set_status_code(static_cast<uint32_t>(status.code()));
    refusal->set_text(std::string(status.message()));
    LOG_WARNING("session {}: refused: {}", session_id, refusal->text());
  }
  reply.set_seq(request.seq());
  return reply;
}

absl::Status PoolOwner::Dispatch(uint64_t session_id, const proto::CacheRequest& request,
                                 proto::CacheReply* reply) {
  switch (request.request_case()) {
    case proto::CacheRequest::kOpen: {
      ASSIGN_OR_RETURN(*reply->mutable_opened(), Open(session_id, request.open()));
      return absl::OkStatus();
    }
    case proto::CacheRequest::kLease: {
      ASSIGN_OR_RETURN(*reply->mutable_leased(), Lease(session_id, request.lease()));
      return absl::OkStatus();
    }
    case proto::CacheRequest::kReturnBlocks: {
      ASSIGN_OR_RETURN(*reply->mutable_returned(), Return(session_id, request.return_blocks()));
      return absl::OkStatus();
    }
    case proto::CacheRequest::kPing: {
      proto::Pong* pong = reply->mutable_pong();
      if (pool_.has_value()) {
        pong->set_num_free(pool_->blocks.num_free());
        pong->set_num_leased(pool_->blocks.num_leased());
      }
      return absl::OkStatus();
    }
    case proto::CacheRequest::REQUEST_NOT_SET:
      break;
  }
  return absl::UnimplementedError("a request of an unknown kind");
}

absl::StatusOr<proto::PoolOpened> PoolOwner::Open(uint64_t session_id,
                                                  const proto::OpenPool& request) {
  if (pool_.has_value()) {
    return absl::FailedPreconditionError(fmt::format(
        "OpenPool: the session of api_epoch {:#x} has the pool open", pool_->api_epoch));
  }
  RETURN_IF_ERROR(ValidateOpen(request));
  const std::vector<uint64_t> block_bytes_by_rank(request.block_bytes_by_rank().begin(),
                                                  request.block_bytes_by_rank().end());
  ASSIGN_OR_RETURN(const int64_t available_bytes, AvailableMemoryBytes());
  ASSIGN_OR_RETURN(PoolMemory memory,
                   PoolMemory::Create(request.num_blocks(), block_bytes_by_rank, available_bytes));
  pool_.emplace(Pool{session_id, request.api_epoch(), NewEpoch(), BlockPool(request.num_blocks())});
  memory_server_->Publish(pool_->pool_epoch, std::move(memory));
  LOG_INFO("session {}: opened by api_epoch {:#x}", session_id, pool_->api_epoch);
  LOG_INFO("pool {:#x}: created, {} blocks, bytes of a block by rank: {}", pool_->pool_epoch,
           request.num_blocks(), fmt::join(block_bytes_by_rank, ", "));

  proto::PoolOpened opened;
  opened.set_pool_epoch(pool_->pool_epoch);
  opened.set_memory_socket(memory_server_->socket_path());
  opened.set_num_blocks(request.num_blocks());
  return opened;
}

absl::StatusOr<PoolOwner::Pool*> PoolOwner::PoolOf(uint64_t session_id) {
  if (!pool_.has_value() || pool_->session_id != session_id) {
    return absl::FailedPreconditionError("this session has no pool open; OpenPool comes first");
  }
  return &*pool_;
}

absl::StatusOr<proto::BlocksLeased> PoolOwner::Lease(uint64_t session_id,
                                                     const proto::LeaseBlocks& request) {
  ASSIGN_OR_RETURN(Pool* const pool, PoolOf(session_id));
  proto::BlocksLeased reply;
  const auto leased = pool->blocks.Lease(request.count());
  // Running out is no fault of the request: the API server preempts or waits, and asks again.
  if (absl::IsResourceExhausted(leased.status())) return reply;
  RETURN_IF_ERROR(leased.status());
  for (const PoolBlock& block : *leased) {
    proto::Block* added = reply.add_blocks();
    added->set_id(static_cast<uint32_t>(block.id));
    added->set_generation(block.generation);
  }
  return reply;
}

absl::StatusOr<proto::BlocksReturned> PoolOwner::Return(uint64_t session_id,
                                                        const proto::ReturnBlocks& request) {
  ASSIGN_OR_RETURN(Pool* const pool, PoolOf(session_id));
  std::vector<PoolBlock> blocks;
  blocks.reserve(request.blocks_size());
  for (const proto::Block& block : request.blocks()) {
    if (block.id() >= pool->blocks.num_blocks()) {
      return absl::InvalidArgumentError(
          fmt::format("block {} is not in the pool, which has 0 to {}", block.id(),
                      pool->blocks.num_blocks() - 1));
    }
    blocks.push_back({static_cast<int32_t>(block.id()), block.generation()});
  }
  RETURN_IF_ERROR(pool->blocks.Return(blocks));
  proto::BlocksReturned reply;
  reply.set_num_free(pool->blocks.num_free());
  return reply;
}

void PoolOwner::EndSession(uint64_t session_id) {
  MutexLock lock(&mu_);
  if (!PoolOf(session_id).ok()) return;
  memory_server_->Withdraw();
  LOG_INFO("session {}: ended; {} leased blocks returned, pool {:#x} dropped", session_id,
           pool_->blocks.num_leased(), pool_->pool_epoch);
  pool_.reset();
}

}  // namespace wintserve
