#include "api_server/llm/pool_lifecycle.h"

#include <fmt/core.h>

#include <algorithm>
#include <utility>

#include "common/check.h"

namespace wintserve {
absl::Status PoolLifecycle::OnOpened(const OpenedPool& pool) {
  if (resuming()) {
    if (pool.pool_epoch != pool_->pool_epoch) {
      return absl::InternalError(
          fmt::format("the cache manager resumed pool {:016x}, asked for was {:016x}",
                      pool.pool_epoch, pool_->pool_epoch));
    }
    reconcile_due_ = true;
    return absl::OkStatus();
  }
  if (state_ != State::kOpening) {
    return absl::InternalError(fmt::format(
        "the cache manager opened pool {:016x}, which was not asked for", pool.pool_epoch));
  }
  if (may_adopt_ && adopted_pool_ != 0 && pool.pool_epoch != adopted_pool_) {
    return absl::InternalError(
        fmt::format("the cache manager opened pool {:016x}, to be taken over was {:016x}",
                    pool.pool_epoch, adopted_pool_));
  }
  pool_ = pool;
  has_session_ = true;
  may_adopt_ = all_ready_ = false;
  state_ = State::kAttaching;
  return absl::OkStatus();
}

void PoolLifecycle::OnPoolGone() {
  CHECK(resuming() || adopting(), "state={}", static_cast<int>(state_));
  state_ = adopting() ? State::kNoPool : State::kDraining;
  resume_asked_ = may_adopt_ = false;
}

void PoolLifecycle::OnHello(uint32_t rank, uint64_t mapped_pool_epoch) {
  ranks_[rank] = {.attached = true, .mapped_pool = mapped_pool_epoch};
}

void PoolLifecycle::OnPoolSent() {
  for (Rank& rank : ranks_) rank.mapped_pool = pool_->pool_epoch;
}

bool PoolLifecycle::OnDetached(uint32_t rank, uint64_t pool_epoch) {
  Rank& r = ranks_[rank];
  if (!r.told_to_detach || r.mapped_pool != pool_epoch) return false;
  r.told_to_detach = false;
  r.mapped_pool = 0;
  return true;
}

void PoolLifecycle::OnLost() {
  connected_ = false;
  resume_asked_ = reconcile_due_ = false;
  if (!std::exchange(has_session_, false)) {
    // The request may or may not have arrived: it is made again.
    if (state_ == State::kOpening) state_ = State::kNoPool;
  } else if (state_ == State::kAttaching) {
    state_ = State::kDraining;
  } else {
    loss_is_news_ = true;
  }
}

PoolLifecycle::Action PoolLifecycle::NextAction(bool idle) {
  switch (state_) {
    case State::kNoPool:
      return NextActionWithoutPool();
    case State::kOpening:
      return Action::kNone;
    case State::kAttaching:
      if (!all_ready_) return NextDetach(pool_->pool_epoch);
      state_ = State::kHeld;
      paused_ = false;
      return Action::kUsePool;
    case State::kHeld:
      return NextActionWhileHeld(idle);
    case State::kDraining:
      if (!std::exchange(paused_, true)) return Action::kPause;
      if (!idle) return Action::kNone;
      state_ = State::kDetaching;
      return NextAction(idle);
    case State::kDetaching:
      if (const Action detach = NextDetach(0); detach != Action::kNone) return detach;
      if (!NoneIsMappedBut(0)) return Action::kNone;
      state_ = State::kNoPool;
      return NextAction(idle);
  }
  return Action::kNone;
}

PoolLifecycle::Action PoolLifecycle::NextActionWithoutPool() {
  if (!workers_attached_) return Action::kNone;
  adopted_pool_ = may_adopt_ ? OnlyMappedPool() : 0;
  if (adopted_pool_ == 0) {
    if (const Action detach = NextDetach(0); detach != Action::kNone) return detach;
    if (!NoneIsMappedBut(0)) return Action::kNone;
  }
  if (!connected_) return Action::kNone;
  state_ = State::kOpening;
  return may_adopt_ ? Action::kAdoptPool : Action::kOpenPool;
}

PoolLifecycle::Action PoolLifecycle::NextActionWhileHeld(bool idle) {
  // Of one that comes back with a pool of before.
  if (const Action detach = NextDetach(pool_->pool_epoch); detach != Action::kNone) return detach;
  if (std::exchange(loss_is_news_, false)) return Action::kLoseSession;
  if (has_session_) return Action::kNone;
  if (!connected_) return std::exchange(paused_, false) ? Action::kContinue : Action::kNone;
  if (!std::exchange(resume_asked_, true)) return Action::kResumePool;
  if (!reconcile_due_) return Action::kNone;
  if (!std::exchange(paused_, true)) return Action::kPause;
  if (!idle) return Action::kNone;
  has_session_ = true;
  resume_asked_ = reconcile_due_ = paused_ = false;
  return Action::kReconcile;
}

PoolLifecycle::Action PoolLifecycle::NextDetach(uint64_t kept_pool) {
  for (uint32_t rank = 0; rank < ranks_.size(); ++rank) {
    Rank& r = ranks_[rank];
    if (!r.attached || r.mapped_pool == 0 || r.mapped_pool == kept_pool) continue;
    if (std::exchange(r.told_to_detach, true)) continue;
    rank_ = rank;
    return Action::kDetachPool;
  }
  return Action::kNone;
}

std::optional<uint32_t> PoolLifecycle::awaited_detach() const {
  for (uint32_t rank = 0; rank < ranks_.size(); ++rank) {
    if (ranks_[rank].attached && ranks_[rank].told_to_detach) return rank;
  }
  return std::nullopt;
}

bool PoolLifecycle::NoneIsMappedBut(uint64_t pool_epoch) const {
  return std::all_of(ranks_.begin(), ranks_.end(), [pool_epoch](const Rank& rank) {
    return rank.mapped_pool == 0 || rank.mapped_pool == pool_epoch;
  });
}

uint64_t PoolLifecycle::OnlyMappedPool() const {
  uint64_t pool_epoch = 0;
  for (const Rank& rank : ranks_) pool_epoch = std::max(pool_epoch, rank.mapped_pool);
  return NoneIsMappedBut(pool_epoch) ? pool_epoch : 0;
}

bool PoolLifecycle::every_rank_maps_pool() const {
  return std::all_of(ranks_.begin(), ranks_.end(), [this](const Rank& rank) {
    return pool_.has_value() && rank.mapped_pool == pool_->pool_epoch;
  });
}

uint64_t PoolLifecycle::attachable_pool() const {
  if (state_ != State::kAttaching && state_ != State::kHeld) return 0;
  return NoneIsMappedBut(pool_->pool_epoch) ? pool_->pool_epoch : 0;
}

const OpenedPool& PoolLifecycle::pool() const {
  CHECK(pool_.has_value());
  return *pool_;
}

std::string PoolLifecycle::WaitingFor() const {
  for (size_t rank = 0; rank < ranks_.size(); ++rank) {
    if (!ranks_[rank].told_to_detach) continue;
    return fmt::format("engine worker {} holds a KV pool that is lost", rank);
  }
  switch (state_) {
    case State::kNoPool:
      return "waiting for the cache manager";
    case State::kOpening:
      return fmt::format("waiting for the cache manager to {} the KV pool",
                         adopted_pool_ != 0 ? "hand over" : "create");
    case State::kDraining:
    case State::kDetaching:
      return "a KV pool is lost that a worker may still hold";
    case State::kAttaching:
    case State::kHeld:
      return "";
  }
  return "";
}

}  // namespace wintserve
