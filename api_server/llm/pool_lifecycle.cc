#include "api_server/llm/pool_lifecycle.h"

#include <fmt/core.h>

#include <algorithm>
#include <utility>

#include "common/check.h"
#include "common/status_macros.h"

namespace wintserve {
namespace {

bool All(const std::vector<bool>& done) {
  return std::all_of(done.begin(), done.end(), [](bool rank_done) { return rank_done; });
}

int64_t FirstMissing(const std::vector<bool>& done) {
  return std::find(done.begin(), done.end(), false) - done.begin();
}

}  // namespace

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
  pool_ = pool;
  has_session_ = true;
  state_ = State::kOpened;
  return absl::OkStatus();
}

void PoolLifecycle::OnPoolGone() {
  CHECK(resuming(), "state={}", static_cast<int>(state_));
  resume_asked_ = false;
  state_ = State::kDraining;
}

absl::Status PoolLifecycle::OnReady(uint32_t rank, uint64_t pool_epoch) {
  const bool expected =
      state_ == State::kAttaching || state_ == State::kDraining || state_ == State::kDetaching;
  return Mark(expected, "is ready for", rank, pool_epoch, &ready_);
}

absl::Status PoolLifecycle::OnDetached(uint32_t rank, uint64_t pool_epoch) {
  RETURN_IF_ERROR(Mark(state_ == State::kDetaching, "has let go of", rank, pool_epoch, &detached_));
  ready_[rank] = true;  // too late from now on
  return absl::OkStatus();
}

absl::Status PoolLifecycle::Mark(bool expected, const char* what, uint32_t rank,
                                 uint64_t pool_epoch, std::vector<bool>* done) const {
  CHECK(rank < done->size(), "rank={}", rank);
  if (!expected || !pool_.has_value() || pool_epoch != pool_->pool_epoch || (*done)[rank]) {
    return absl::InternalError(fmt::format(
        "engine worker {} {} pool {:016x}, which it was not asked for", rank, what, pool_epoch));
  }
  (*done)[rank] = true;
  return absl::OkStatus();
}

void PoolLifecycle::OnLost() {
  connected_ = false;
  resume_asked_ = reconcile_due_ = false;
  if (!std::exchange(has_session_, false)) {
    // The request may or may not have arrived: it is made again.
    if (state_ == State::kOpening) state_ = State::kNoPool;
    return;
  }
  if (state_ == State::kOpened) {
    state_ = State::kNoPool;
  } else if (state_ == State::kAttaching) {
    state_ = State::kDraining;
  } else {
    loss_is_news_ = true;
  }
}

PoolLifecycle::Action PoolLifecycle::NextAction(bool idle) {
  switch (state_) {
    case State::kNoPool:
      if (!workers_attached_ || !connected_) return Action::kNone;
      state_ = State::kOpening;
      return Action::kOpenPool;
    case State::kOpened:
      state_ = State::kAttaching;
      std::fill(ready_.begin(), ready_.end(), false);
      std::fill(detached_.begin(), detached_.end(), false);
      return Action::kAttachPool;
    case State::kAttaching:
      if (!All(ready_)) return Action::kNone;
      state_ = State::kHeld;
      paused_ = false;
      return Action::kUsePool;
    case State::kHeld:
      return NextActionWhileHeld(idle);
    case State::kDraining:
      if (!std::exchange(paused_, true)) return Action::kPause;
      if (!idle) return Action::kNone;
      state_ = State::kDetaching;
      return Action::kDetachPool;
    case State::kDetaching:
      if (!All(detached_)) return Action::kNone;
      state_ = State::kNoPool;
      return NextAction(idle);
    case State::kOpening:
      return Action::kNone;
  }
  return Action::kNone;
}

PoolLifecycle::Action PoolLifecycle::NextActionWhileHeld(bool idle) {
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

const OpenedPool& PoolLifecycle::pool() const {
  CHECK(pool_.has_value());
  return *pool_;
}

std::string PoolLifecycle::WaitingFor() const {
  switch (state_) {
    case State::kNoPool:
      return "waiting for the cache manager";
    case State::kOpening:
    case State::kOpened:
      return "waiting for the cache manager to create the KV pool";
    case State::kAttaching:
      return fmt::format("engine worker {} is warming up", FirstMissing(ready_));
    case State::kDraining:
    case State::kDetaching:
      return fmt::format("engine worker {} holds a KV pool that is lost", FirstMissing(detached_));
    case State::kHeld:
      return "";
  }
  return "";
}

}  // namespace wintserve
