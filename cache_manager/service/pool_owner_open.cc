// OpenPool: a new pool, the session's own again, or that of an API server that is gone.
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <openssl/rand.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <string>
#include <utility>

#include "cache_manager/memory/available_memory.h"
#include "cache_manager/service/cache_wire.h"
#include "cache_manager/service/pool_owner.h"
#include "common/check.h"
#include "common/log.h"
#include "common/status_macros.h"

namespace wintserve {
namespace {

// What states and index cost beside the tokens; generous, to refuse a pool of absurdly many tiny
// blocks before it exhausts this process.
constexpr double kIndexBytesPerBlock = 512;

// REQUIRES: CheckOpenPool has accepted the request, so no sum overflows.
uint32_t NumHostSlots(const proto::OpenPool& request, uint64_t host_bytes) {
  const uint64_t block_bytes = std::accumulate(request.block_bytes_by_rank().begin(),
                                               request.block_bytes_by_rank().end(), uint64_t{0});
  constexpr uint64_t kMaxSlots = std::numeric_limits<int32_t>::max();
  return static_cast<uint32_t>(std::min(host_bytes / block_bytes, kMaxSlots));
}

// What of the pool is not as asked for, in words; empty: all is. The seed is bytes, and no text.
std::string DifferenceOf(const proto::OpenPool& opened, const proto::OpenPool& request) {
  const bool adopts = request.adopt_pool_epoch() != 0 || request.adopt_any();
  const bool any_num_blocks = adopts && request.num_blocks() == 0;
  if (!any_num_blocks && opened.num_blocks() != request.num_blocks()) {
    return fmt::format("num_blocks is {}, and {} are asked for", opened.num_blocks(),
                       request.num_blocks());
  }
  if (!std::equal(opened.block_bytes_by_rank().begin(), opened.block_bytes_by_rank().end(),
                  request.block_bytes_by_rank().begin(), request.block_bytes_by_rank().end())) {
    return fmt::format("block_bytes_by_rank is {}, and {} is asked for",
                       fmt::join(opened.block_bytes_by_rank(), ", "),
                       fmt::join(request.block_bytes_by_rank(), ", "));
  }
  if (opened.block_size_tokens() != request.block_size_tokens()) {
    return fmt::format("block_size_tokens is {}, and {} is asked for", opened.block_size_tokens(),
                       request.block_size_tokens());
  }
  if (opened.host_bytes() != request.host_bytes()) {
    return fmt::format("host_bytes is {}, and {} is asked for", opened.host_bytes(),
                       request.host_bytes());
  }
  if (opened.root_seed() != request.root_seed()) {
    return "root_seed is another one: its content is that of another model, or is computed in "
           "another way";
  }
  return "";
}

}  // namespace

uint64_t RandomEpoch() {
  uint64_t epoch = 0;
  while (epoch == 0) {
    CHECK(RAND_bytes(reinterpret_cast<unsigned char*>(&epoch), sizeof(epoch)) == 1,
          "the random generator failed");
  }
  return epoch;
}

absl::StatusOr<proto::PoolOpened> PoolOwner::Open(uint64_t session_id,
                                                  const proto::OpenPool& request) {
  RETURN_IF_ERROR(CheckOpenPool(request));
  const bool is_held = pool_.has_value() && pool_->session_id != kNoSession;
  if (is_held && pool_->session_id == session_id) {
    return absl::FailedPreconditionError("OpenPool: this session has the pool open already");
  }
  bool resumed = false;
  if (request.adopt_pool_epoch() != 0 || request.adopt_any()) {
    RETURN_IF_ERROR(Adopt(session_id, request));
  } else if (is_held && pool_->spec.api_epoch() == request.api_epoch()) {
    RETURN_IF_ERROR(TakeUp(&*pool_, session_id, request));
    resumed = true;
  } else if (is_held) {
    return IsTaken(*pool_);
  } else if (request.resume_only()) {
    return absl::NotFoundError(
        fmt::format("OpenPool: no pool of api_epoch {:#x}", request.api_epoch()));
  } else {
    RETURN_IF_ERROR(CreatePool(session_id, request));
  }
  proto::PoolOpened opened;
  opened.set_pool_epoch(pool_->pool_epoch);
  opened.set_memory_socket(memory_server_->socket_path());
  opened.set_num_blocks(pool_->spec.num_blocks());
  opened.set_num_host_slots(pool_->num_host_slots);
  opened.set_resumed(resumed);
  opened.set_newest_step(pool_->newest_step);
  return opened;
}

absl::Status PoolOwner::IsTaken(const Pool& pool) {
  return absl::FailedPreconditionError(fmt::format(
      "OpenPool: the session of api_epoch {:#x} has the pool {}", pool.spec.api_epoch(),
      pool.grace_end.has_value() ? "for a few seconds more, should it reconnect" : "open"));
}

absl::Status PoolOwner::TakeUp(Pool* pool, uint64_t session_id, const proto::OpenPool& request) {
  if (const std::string difference = DifferenceOf(pool->spec, request); !difference.empty()) {
    return absl::FailedPreconditionError(
        fmt::format("OpenPool: api_epoch {:#x} has opened its pool with other parameters: {}",
                    request.api_epoch(), difference));
  }
  LOG_INFO("session {}: takes up pool {:#x} from session {}", session_id, pool->pool_epoch,
           pool->session_id);
  pool->session_id = session_id;
  pool->has_stream = true;
  pool->must_reconcile = true;
  if (!pool->grace_end.has_value()) pool->grace_end = now_() + kGrace;
  return absl::OkStatus();
}

absl::Status PoolOwner::Adopt(uint64_t session_id, const proto::OpenPool& request) {
  if (request.adopt_any()) {
    if (!pool_.has_value()) return absl::NotFoundError("OpenPool: no pool to adopt");
    if (const std::string difference = DifferenceOf(pool_->spec, request); !difference.empty()) {
      return absl::NotFoundError(fmt::format("OpenPool: no such pool to adopt; of pool {:#x} {}",
                                             pool_->pool_epoch, difference));
    }
  } else if (!pool_.has_value()) {
    return absl::NotFoundError(
        fmt::format("OpenPool: no pool {:#x} to adopt; there is none", request.adopt_pool_epoch()));
  }
  const uint64_t pool_epoch = request.adopt_any() ? pool_->pool_epoch : request.adopt_pool_epoch();
  if (pool_->pool_epoch != pool_epoch) {
    return absl::NotFoundError(fmt::format("OpenPool: no pool {:#x} to adopt; there is pool {:#x}",
                                           pool_epoch, pool_->pool_epoch));
  }
  // While its stream is there it may be alive, and only it knows what it holds. The adopter's own
  // stream of before is not: its answer was lost.
  if (pool_->has_stream && pool_->spec.api_epoch() != request.api_epoch()) {
    return absl::FailedPreconditionError(
        fmt::format("OpenPool: pool {:#x} is not to be adopted: the session of api_epoch {:#x} is "
                    "still connected",
                    pool_epoch, pool_->spec.api_epoch()));
  }
  if (const std::string difference = DifferenceOf(pool_->spec, request); !difference.empty()) {
    return absl::FailedPreconditionError(
        fmt::format("OpenPool: pool {:#x} cannot be adopted: {}", pool_epoch, difference));
  }
  if (pool_->session_id != kNoSession) Orphan(&*pool_, "broke, or was given up");
  const PrefixCacheStats stats = pool_->cache->stats();
  LOG_INFO("session {}: api_epoch {:#x} adopts pool {:#x} of api_epoch {:#x}: {} entries",
           session_id, request.api_epoch(), pool_epoch, pool_->spec.api_epoch(), stats.num_entries);
  LOG_INFO("session {}: until Fence: {} blocks and {} host slots quarantined, {} blocks copied out",
           session_id, stats.num_quarantined, stats.num_host_quarantined, stats.num_copying_out);
  pool_->spec.set_api_epoch(request.api_epoch());
  pool_->session_id = session_id;
  pool_->has_stream = true;
  return absl::OkStatus();
}

absl::Status PoolOwner::CreatePool(uint64_t session_id, const proto::OpenPool& request) {
  const uint64_t host_bytes = resized_host_bytes_.value_or(request.host_bytes());
  uint32_t num_host_slots = NumHostSlots(request, host_bytes);
  absl::StatusOr<std::unique_ptr<PoolMemory>> memory = CreateMemory(request, num_host_slots);
  if (absl::IsResourceExhausted(memory.status()) && host_bytes > request.host_bytes()) {
    // The instance can go on with what it was started with.
    const std::string why(memory.status().message());
    num_host_slots = NumHostSlots(request, request.host_bytes());
    memory = CreateMemory(request, num_host_slots);
    if (memory.ok()) {
      LOG_WARNING("the host tier of {} bytes that an Admin asked for is left aside: {}", host_bytes,
                  why);
    }
  }
  RETURN_IF_ERROR(memory.status());
  Pool pool;
  pool.spec = request;
  pool.session_id = session_id;
  pool.has_stream = true;
  pool.pool_epoch = new_epoch_();
  pool.num_host_slots = num_host_slots;
  pool.cache = std::make_unique<PrefixCache>(
      PrefixCacheConfig{.num_blocks = request.num_blocks(),
                        .num_host_slots = num_host_slots,
                        .block_size_tokens = static_cast<int>(request.block_size_tokens()),
                        .root_seed = request.root_seed()});
  pool_ = std::move(pool);
  memory_server_->Publish(pool_->pool_epoch, *std::move(memory));
  LOG_INFO("session {}: opened by api_epoch {:#x}", session_id, request.api_epoch());
  LOG_INFO("pool {:#x}: created, {} blocks and {} host slots, bytes of a block by rank: {}",
           pool_->pool_epoch, request.num_blocks(), num_host_slots,
           fmt::join(request.block_bytes_by_rank(), ", "));
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<PoolMemory>> PoolOwner::CreateMemory(const proto::OpenPool& request,
                                                                    uint32_t num_host_slots) const {
  ASSIGN_OR_RETURN(const int64_t available_bytes, AvailableMemoryBytes());
  const double index_bytes = (static_cast<double>(request.num_blocks()) + num_host_slots) *
                             (kIndexBytesPerBlock + sizeof(int32_t) * request.block_size_tokens());
  const int64_t left_bytes =
      std::max<int64_t>(0, available_bytes - static_cast<int64_t>(index_bytes));
  return make_memory_({.num_blocks = request.num_blocks(),
                       .block_bytes_by_rank = {request.block_bytes_by_rank().begin(),
                                               request.block_bytes_by_rank().end()},
                       .num_host_slots = num_host_slots},
                      left_bytes);
}

}  // namespace wintserve
