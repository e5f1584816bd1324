#include "cache_manager/service/pool_owner.h"

#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "cache_manager/service/cache_wire.h"
#include "common/check.h"
#include "common/log.h"
#include "common/read_file.h"
#include "common/status_macros.h"

namespace wintserve {
namespace {

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

}  // namespace

PoolOwner::PoolOwner(MemoryServer* memory_server, std::string resize_path,
                     PoolMemoryMaker make_memory, std::function<Clock::time_point()> now,
                     std::function<uint64_t()> new_epoch)
    : memory_server_(memory_server),
      resize_path_(std::move(resize_path)),
      make_memory_(std::move(make_memory)),
      now_(std::move(now)),
      new_epoch_(std::move(new_epoch)),
      resized_host_bytes_(ReadResize(resize_path_)) {}

std::vector<proto::CacheReply> PoolOwner::Handle(uint64_t session_id,
                                                 const proto::CacheRequest& request) {
  std::vector<proto::CacheReply> replies(1);
  if (request.has_open()) MakeRoomFor(request.open());
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
      pool->newest_step = std::max(pool->newest_step, commit.step);
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
    if (copy_id <= pool->last_copy_id_of_others) {
      return absl::FailedPreconditionError(fmt::format(
          "CopyDone: copy {} was ordered from a session that is over; Fence ends it", copy_id));
    }
  }
  for (const uint64_t copy_id : copy_ids) {
    pool->write_backs.erase(copy_id);
    // One that is no longer under way was reported before a session broke, or fenced.
    pool->cache->CopyDone(copy_id, request.step()).IgnoreError();
  }
  pool->newest_step = std::max(pool->newest_step, request.step());
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
  if (!pool.ok()) return;
  (*pool)->has_stream = false;
  if (!(*pool)->grace_end.has_value()) (*pool)->grace_end = now_() + kGrace;
}

void PoolOwner::EndSession(uint64_t session_id) {
  MutexLock lock(&mu_);
  if (const auto pool = PoolOf(session_id); pool.ok()) Orphan(*pool, "ended");
}

std::optional<PoolOwner::Clock::time_point> PoolOwner::EndExpiredSession() {
  MutexLock lock(&mu_);
  if (!pool_.has_value() || !pool_->grace_end.has_value()) return std::nullopt;
  if (now_() < *pool_->grace_end) return pool_->grace_end;
  Orphan(&*pool_, "broke and was not taken up again");
  return std::nullopt;
}

void PoolOwner::Orphan(Pool* pool, const char* why) {
  const PrefixCacheStats stats = pool->cache->stats();
  LOG_INFO("session {}: {}; pool {:#x} waits for another one: {} blocks were leased, {} pinned",
           pool->session_id, why, pool->pool_epoch, stats.num_leased, stats.num_committed_pinned);
  pool->cache->EndSession();
  pool->session_id = kNoSession;
  pool->has_stream = false;
  pool->must_reconcile = false;
  pool->grace_end.reset();
  pool->last_copy_id_of_others = pool->last_copy_id;
  pool->write_backs.clear();
  pool->lost_write_backs.clear();
}

void PoolOwner::MakeRoomFor(const proto::OpenPool& request) {
  // What is left of a pool. Freeing it takes long, so that is done without the lock.
  std::shared_ptr<const void> memory;
  std::unique_ptr<PrefixCache> cache;
  MutexLock lock(&mu_);
  if (!pool_.has_value() || pool_->session_id != kNoSession) return;
  if (request.resume_only() || !CheckOpenPool(request).ok()) return;
  LOG_INFO("pool {:#x}: nobody has adopted it; it makes room for another one: {} entries dropped",
           pool_->pool_epoch, pool_->cache->stats().num_entries);
  memory = memory_server_->Withdraw();
  cache = std::move(pool_->cache);
  pool_.reset();
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

absl::Status PoolOwner::CheckInvariants() {
  MutexLock lock(&mu_);
  return pool_.has_value() ? pool_->cache->CheckInvariants() : absl::OkStatus();
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
