#include "cache_manager/service/pool_owner.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <openssl/rand.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <fstream>
#include <limits>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "cache_manager/memory/available_memory.h"
#include "cache_manager/service/cache_wire.h"
#include "common/check.h"
#include "common/log.h"
#include "common/read_file.h"
#include "common/status_macros.h"

namespace wintserve {
namespace {

// What states and index cost beside the tokens; generous, to refuse a pool of absurdly many tiny
// blocks before it exhausts this process.
constexpr double kIndexBytesPerBlock = 512;

// Never 0, which an unset field would name.
uint64_t NewEpoch() {
  uint64_t epoch = 0;
  while (epoch == 0) {
    CHECK(RAND_bytes(reinterpret_cast<unsigned char*>(&epoch), sizeof(epoch)) == 1,
          "the random generator failed");
  }
  return epoch;
}

// REQUIRES: CheckOpenPool has accepted the request, so no sum overflows.
uint32_t NumHostSlots(const proto::OpenPool& request, uint64_t host_bytes) {
  const uint64_t block_bytes = std::accumulate(request.block_bytes_by_rank().begin(),
                                               request.block_bytes_by_rank().end(), uint64_t{0});
  constexpr uint64_t kMaxSlots = std::numeric_limits<int32_t>::max();
  return static_cast<uint32_t>(std::min(host_bytes / block_bytes, kMaxSlots));
}

// The file holds the bytes in decimal. None: no such file, or not a size.
std::optional<uint64_t> ReadResize(const std::string& path) {
  if (path.empty()) return std::nullopt;
  const auto text = ReadFile(path);
  if (absl::IsNotFound(text.status())) return std::nullopt;
  uint64_t host_bytes = 0;
  if (text.ok() && absl::SimpleAtoi(*text, &host_bytes) && host_bytes <= kMaxHostBytes) {
    return host_bytes;
  }
  LOG_WARNING("{}: not a size of a host tier, left aside", path);
  return std::nullopt;
}

absl::Status WriteResize(const std::string& path, uint64_t host_bytes) {
  if (path.empty()) return absl::OkStatus();
  const std::string unfinished = path + ".new";
  errno = 0;
  std::ofstream file(unfinished);
  file << host_bytes;
  file.close();
  if (!file || std::rename(unfinished.c_str(), path.c_str()) != 0) {
    return absl::ErrnoToStatus(errno != 0 ? errno : EIO,
                               fmt::format("Admin: cannot write {}", path));
  }
  return absl::OkStatus();
}

// What the session of this api_epoch opened before must be what it opens now.
absl::Status CheckSameSpec(const proto::OpenPool& opened, const proto::OpenPool& request) {
  const bool same =
      opened.num_blocks() == request.num_blocks() &&
      std::equal(opened.block_bytes_by_rank().begin(), opened.block_bytes_by_rank().end(),
                 request.block_bytes_by_rank().begin(), request.block_bytes_by_rank().end()) &&
      opened.root_seed() == request.root_seed() && opened.host_bytes() == request.host_bytes() &&
      opened.block_size_tokens() == request.block_size_tokens();
  if (same) return absl::OkStatus();
  return absl::FailedPreconditionError(fmt::format(
      "OpenPool: api_epoch {:#x} has opened its pool with other parameters", opened.api_epoch()));
}

}  // namespace

PoolOwner::PoolOwner(MemoryServer* memory_server, std::string resize_path,
                     PoolMemoryMaker make_memory, std::function<Clock::time_point()> now)
    : memory_server_(memory_server),
      resize_path_(std::move(resize_path)),
      make_memory_(std::move(make_memory)),
      now_(std::move(now)),
      resized_host_bytes_(ReadResize(resize_path_)) {}

std::vector<proto::CacheReply> PoolOwner::Handle(uint64_t session_id,
                                                 const proto::CacheRequest& request) {
  std::vector<proto::CacheReply> replies(1);
  MutexLock lock(&mu_);
  const absl::Status status = Dispatch(session_id, request, &replies[0]);
  if (!status.ok()) {
    proto::Refusal* refusal = replies[0].mutable_refusal();
    refusal->set_status_code(static_cast<uint32_t>(status.code()));
    refusal->set_text(std::string(status.message()));
  }
  replies[0].set_seq(request.seq());
  replies[0].set_num_available(NumAvailable(session_id));
  if (status.ok()) {
    if (auto copy_out = TakeCopyOut(session_id)) replies.push_back(*std::move(copy_out));
    TellWatchers();
  }
  return replies;
}

absl::Status PoolOwner::Dispatch(uint64_t session_id, const proto::CacheRequest& request,
                                 proto::CacheReply* reply) {
  switch (request.request_case()) {
    case proto::CacheRequest::REQUEST_NOT_SET:
      return absl::UnimplementedError("a request of an unknown kind");
    case proto::CacheRequest::kPing:
      reply->mutable_done();
      return absl::OkStatus();
    case proto::CacheRequest::kOpen: {
      ASSIGN_OR_RETURN(*reply->mutable_opened(), Open(session_id, request.open()));
      return absl::OkStatus();
    }
    default:
      break;
  }
  ASSIGN_OR_RETURN(Pool* const pool, PoolOf(session_id));
  if (request.has_reconcile()) {
    reply->mutable_done();
    return Reconcile(pool, request.reconcile());
  }
  if (pool->must_reconcile) {
    return absl::FailedPreconditionError("the pool was taken up again; Reconcile comes first");
  }
  return DispatchToPool(pool, request, reply);
}

absl::Status PoolOwner::DispatchToPool(Pool* pool, const proto::CacheRequest& request,
                                       proto::CacheReply* reply) {
  const PoolLimits limits = {pool->spec.num_blocks(), pool->spec.block_size_tokens()};
  switch (request.request_case()) {
    case proto::CacheRequest::kPeek: {
      ASSIGN_OR_RETURN(const std::vector<int32_t> tokens, ReadPrompt(request.peek()));
      Write(pool->cache->Peek(request.peek().salt(), tokens), reply->mutable_peeked());
      return absl::OkStatus();
    }
    case proto::CacheRequest::kMatch:
      return Match(pool, request.match(), reply->mutable_matched());
    case proto::CacheRequest::kLease: {
      RETURN_IF_ERROR(CheckLease(request.lease(), limits));
      ASSIGN_OR_RETURN(const std::vector<PoolBlock> blocks,
                       pool->cache->Lease(request.lease().count()));
      Write(blocks, reply->mutable_leased());
      return absl::OkStatus();
    }
    case proto::CacheRequest::kCommit: {
      ASSIGN_OR_RETURN(const CommitRequest commit, ReadCommit(request.commit(), limits));
      ASSIGN_OR_RETURN(const std::vector<CommittedBlock> committed, pool->cache->Commit(commit));
      Write(committed, reply->mutable_committed());
      return absl::OkStatus();
    }
    case proto::CacheRequest::kRelease: {
      reply->mutable_done();
      ASSIGN_OR_RETURN(const std::vector<uint64_t> entries, ReadRelease(request.release()));
      return pool->cache->Release(entries);
    }
    case proto::CacheRequest::kReturnBlocks: {
      reply->mutable_done();
      ASSIGN_OR_RETURN(const std::vector<PoolBlock> blocks,
                       ReadReturn(request.return_blocks(), limits));
      return pool->cache->Return(blocks);
    }
    case proto::CacheRequest::kCopyDone:
      reply->mutable_done();
      return CopyDone(pool, request.copy_done());
    case proto::CacheRequest::kDistrustSteps: {
      reply->mutable_done();
      ASSIGN_OR_RETURN(const uint64_t first_step, ReadDistrustSteps(request.distrust_steps()));
      const uint64_t num_entries = pool->cache->DistrustSteps(first_step);
      LOG_INFO("session {}: steps from {} on are not trusted: {} entries match no more",
               pool->session_id, first_step, num_entries);
      return absl::OkStatus();
    }
    default:
      CHECK(request.has_fence(), "request_case={}", static_cast<int>(request.request_case()));
      reply->mutable_done();
      pool->cache->Fence();
      return absl::OkStatus();
  }
}

absl::StatusOr<proto::PoolOpened> PoolOwner::Open(uint64_t session_id,
                                                  const proto::OpenPool& request) {
  RETURN_IF_ERROR(CheckOpenPool(request));
  const bool resumed = pool_.has_value();
  if (resumed) {
    if (pool_->session_id == session_id) {
      return absl::FailedPreconditionError("OpenPool: this session has the pool open already");
    }
    if (pool_->spec.api_epoch() != request.api_epoch()) {
      return absl::FailedPreconditionError(fmt::format(
          "OpenPool: the session of api_epoch {:#x} has the pool {}", pool_->spec.api_epoch(),
          pool_->grace_end.has_value() ? "for a few seconds more, should it reconnect" : "open"));
    }
    RETURN_IF_ERROR(CheckSameSpec(pool_->spec, request));
    LOG_INFO("session {}: takes up pool {:#x} from session {}", session_id, pool_->pool_epoch,
             pool_->session_id);
    pool_->session_id = session_id;
    pool_->must_reconcile = true;
    if (!pool_->grace_end.has_value()) pool_->grace_end = now_() + kGrace;
  } else if (request.resume_only()) {
    return absl::NotFoundError(
        fmt::format("OpenPool: no pool of api_epoch {:#x}", request.api_epoch()));
  } else {
    RETURN_IF_ERROR(CreatePool(session_id, request));
  }
  proto::PoolOpened opened;
  opened.set_pool_epoch(pool_->pool_epoch);
  opened.set_memory_socket(memory_server_->socket_path());
  opened.set_num_blocks(request.num_blocks());
  opened.set_num_host_slots(pool_->num_host_slots);
  opened.set_resumed(resumed);
  return opened;
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
  pool.pool_epoch = NewEpoch();
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

absl::Status PoolOwner::Match(Pool* pool, const proto::Match& request, proto::Matched* reply) {
  ASSIGN_OR_RETURN(const std::vector<int32_t> tokens, ReadPrompt(request));
  const MatchResult matched = pool->cache->Match(request.salt(), tokens, request.allow_restore());
  for (const CopyOrder& copy : matched.copies) {
    pool->last_copy_id = std::max(pool->last_copy_id, copy.copy_id);
  }
  Write(matched, reply);
  return absl::OkStatus();
}

absl::Status PoolOwner::CopyDone(Pool* pool, const proto::CopyDone& request) {
  ASSIGN_OR_RETURN(const std::vector<uint64_t> copy_ids, ReadCopyDone(request));
  for (const uint64_t copy_id : copy_ids) {
    if (copy_id > pool->last_copy_id) {
      return absl::FailedPreconditionError(
          fmt::format("CopyDone: no copy {} was ordered", copy_id));
    }
  }
  for (const uint64_t copy_id : copy_ids) {
    pool->write_backs.erase(copy_id);
    // One that is no longer under way was reported before a session broke, or fenced.
    pool->cache->CopyDone(copy_id, request.step()).IgnoreError();
  }
  return absl::OkStatus();
}

absl::Status PoolOwner::Reconcile(Pool* pool, const proto::Reconcile& request) {
  if (!pool->must_reconcile) {
    return absl::FailedPreconditionError(
        "Reconcile: comes once, after an OpenPool whose answer says resumed");
  }
  const PoolLimits limits = {pool->spec.num_blocks(), pool->spec.block_size_tokens()};
  ASSIGN_OR_RETURN(const HeldState held, ReadReconcile(request, limits));
  RETURN_IF_ERROR(pool->cache->Reconcile(held.pins, held.leased));
  pool->lost_write_backs.clear();
  for (auto copy = pool->write_backs.upper_bound(request.last_copy_id());
       copy != pool->write_backs.end(); ++copy) {
    pool->lost_write_backs.push_back(copy->second);
  }
  pool->must_reconcile = false;
  pool->grace_end.reset();
  LOG_INFO("session {}: reconciled, {} pinned entries, {} leased blocks", pool->session_id,
           held.pins.size(), held.leased.size());
  return absl::OkStatus();
}

std::optional<proto::CacheReply> PoolOwner::TakeCopyOut(uint64_t session_id) {
  const auto found = PoolOf(session_id);
  if (!found.ok() || (*found)->must_reconcile || (*found)->num_host_slots == 0) {
    return std::nullopt;
  }
  Pool& pool = **found;
  std::vector<CopyOrder> copies;
  while (!pool.lost_write_backs.empty() && copies.size() < kMaxCopiesPerPush) {
    copies.push_back(pool.lost_write_backs.front());
    pool.lost_write_backs.pop_front();
  }
  if (copies.empty() && pool.write_backs.size() < kMaxWriteBacksUnderWay) {
    copies = pool.cache->TakeCopyOuts(
        std::min(kMaxCopiesPerPush, kMaxWriteBacksUnderWay - pool.write_backs.size()));
  }
  if (copies.empty()) return std::nullopt;
  proto::CacheReply push;
  push.set_num_available(pool.cache->num_available());
  for (const CopyOrder& copy : copies) {
    pool.write_backs.insert_or_assign(copy.copy_id, copy);
    pool.last_copy_id = std::max(pool.last_copy_id, copy.copy_id);
    Write(copy, push.mutable_copy_out()->add_copies());
  }
  return push;
}

absl::StatusOr<PoolOwner::Pool*> PoolOwner::PoolOf(uint64_t session_id) {
  if (!pool_.has_value() || pool_->session_id != session_id) {
    return absl::FailedPreconditionError("this session has no pool open; OpenPool comes first");
  }
  return &*pool_;
}

uint32_t PoolOwner::NumAvailable(uint64_t session_id) {
  const auto pool = PoolOf(session_id);
  return pool.ok() ? (*pool)->cache->num_available() : 0;
}

void PoolOwner::SuspendSession(uint64_t session_id) {
  MutexLock lock(&mu_);
  const auto pool = PoolOf(session_id);
  if (!pool.ok() || (*pool)->grace_end.has_value()) return;
  (*pool)->grace_end = now_() + kGrace;
}

void PoolOwner::EndSession(uint64_t session_id) {
  DroppedPool dropped;  // goes after the lock
  MutexLock lock(&mu_);
  if (PoolOf(session_id).ok()) dropped = DropPool("ended");
}

std::optional<PoolOwner::Clock::time_point> PoolOwner::DropExpired() {
  DroppedPool dropped;  // goes after the lock
  MutexLock lock(&mu_);
  if (!pool_.has_value() || !pool_->grace_end.has_value()) return std::nullopt;
  if (now_() < *pool_->grace_end) return pool_->grace_end;
  dropped = DropPool("broke and was not taken up again");
  return std::nullopt;
}

PoolOwner::DroppedPool PoolOwner::DropPool(const char* why) {
  DroppedPool dropped = {memory_server_->Withdraw(), std::move(pool_->cache)};
  const PrefixCacheStats stats = dropped.cache->stats();
  LOG_INFO("session {}: {}; pool {:#x} dropped: {} blocks leased, {} pinned, {} entries",
           pool_->session_id, why, pool_->pool_epoch, stats.num_leased, stats.num_committed_pinned,
           stats.num_entries);
  pool_.reset();
  return dropped;
}

proto::StatsReply PoolOwner::Stats() {
  proto::StatsReply reply;
  MutexLock lock(&mu_);
  if (!pool_.has_value()) return reply;
  reply.set_pool_epoch(pool_->pool_epoch);
  reply.set_num_blocks(pool_->spec.num_blocks());
  reply.set_num_host_slots(pool_->num_host_slots);
  Write(pool_->cache->stats(), &reply);
  return reply;
}

absl::StatusOr<proto::AdminReply> PoolOwner::Admin(const proto::AdminRequest& request) {
  proto::AdminReply reply;
  MutexLock lock(&mu_);
  switch (request.request_case()) {
    case proto::AdminRequest::kFlushAll:
    case proto::AdminRequest::kFlushSalt: {
      std::optional<std::string> salt;
      if (request.has_flush_salt()) {
        RETURN_IF_ERROR(CheckSalt("Admin.flush_salt", request.flush_salt()));
        salt = request.flush_salt();
      }
      if (pool_.has_value()) reply.set_num_entries(pool_->cache->Flush(salt));
      LOG_INFO("flushed {} entries of {}", reply.num_entries(), salt ? "one salt" : "all salts");
      TellWatchers();
      return reply;
    }
    case proto::AdminRequest::kResizeHostBytes:
      return ResizeHostTier(request.resize_host_bytes());
    case proto::AdminRequest::REQUEST_NOT_SET:
      break;
  }
  return absl::UnimplementedError("Admin: a request of an unknown kind");
}

absl::StatusOr<proto::AdminReply> PoolOwner::ResizeHostTier(uint64_t host_bytes) {
  if (host_bytes > kMaxHostBytes) {
    return absl::InvalidArgumentError(
        fmt::format("Admin: resize_host_bytes is {}; allowed: 0 to {}", host_bytes, kMaxHostBytes));
  }
  RETURN_IF_ERROR(WriteResize(resize_path_, host_bytes));
  resized_host_bytes_ = host_bytes;
  proto::AdminReply reply;
  reply.set_text(
      fmt::format("the next pool gets a host tier of {} bytes if they fit; {}", host_bytes,
                  pool_.has_value() ? "the pool that is open keeps its own" : "no pool is open"));
  LOG_INFO("{}", reply.text());
  return reply;
}

absl::Status PoolOwner::Watch(CacheWatcher* watcher) {
  MutexLock lock(&mu_);
  if (watchers_.size() >= kMaxWatchers) {
    return absl::ResourceExhaustedError(
        fmt::format("Watch: {} streams watch already, and no more may", kMaxWatchers));
  }
  TellWatchers();  // what happened before is not for the new one
  watchers_.push_back(watcher);
  return absl::OkStatus();
}

void PoolOwner::Unwatch(CacheWatcher* watcher) {
  MutexLock lock(&mu_);
  std::erase(watchers_, watcher);
}

void PoolOwner::TellWatchers() {
  if (!pool_.has_value()) return;
  uint64_t lost = 0;
  const std::vector<CacheEvent> events = pool_->cache->TakeEvents(&lost);
  if (watchers_.empty()) return;
  if (lost > 0) {
    for (CacheWatcher* const watcher : watchers_) watcher->OnLostEvents();
    return;
  }
  for (const CacheEvent& event : events) {
    auto message = std::make_shared<proto::CacheEvent>();
    Write(event, pool_->pool_epoch, message.get());
    for (CacheWatcher* const watcher : watchers_) watcher->OnEvent(message);
  }
}

}  // namespace wintserve
