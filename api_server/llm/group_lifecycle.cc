#include "api_server/llm/group_lifecycle.h"

#include <fmt/core.h>

#include <algorithm>
#include <utility>

#include "common/check.h"

namespace wintserve {

const char* NameOf(FaultCause cause) {
  switch (cause) {
    case FaultCause::kExit:
      return "exit";
    case FaultCause::kStream:
      return "stream";
    case FaultCause::kReported:
      return "reported";
    case FaultCause::kDeadline:
      return "deadline";
    case FaultCause::kDivergence:
      return "divergence";
  }
  return "unknown";
}

GroupLifecycle::GroupLifecycle(uint32_t world_size, std::function<uint64_t()> new_epoch)
    : new_epoch_(std::move(new_epoch)), ranks_(world_size) {}

void GroupLifecycle::OnWatching(bool watching, int64_t now_us) {
  watching_ = watching;
  if (watching) return;
  // The grace begins when nobody is left to tell an exit.
  for (Rank& rank : ranks_) {
    if (rank.lost_us.has_value()) rank.lost_us = now_us;
  }
}

void GroupLifecycle::OnHello(uint32_t rank, uint64_t worker_id, int64_t now_us) {
  CHECK(rank < ranks_.size() && !ranks_[rank].attached && !has_group(), "rank={} state={}", rank,
        static_cast<int>(state_));
  Rank& r = ranks_[rank];
  if (r.worker_id != worker_id && std::exchange(r.in_group, false) && !r.gone) {
    r.unjudged_id = r.worker_id;
    r.verdict_us = now_us + (watching_ ? kVerdictWaitUs : 0);
  }
  Fence(&r);
  r.worker_id = worker_id;
  r.attached = true;
  r.gone = false;
}

void GroupLifecycle::OnDisconnected(uint32_t rank, const std::string& reason, int64_t now_us) {
  Rank& r = ranks_[rank];
  if (!r.attached) return;
  r.attached = false;
  r.lost_us = now_us;
  if (!r.end_us.has_value()) r.end_us = now_us + kPatienceUs;
  OnFault(FaultCause::kStream, /*kv_trusted=*/true,
          fmt::format("engine worker {} is gone: {}", rank, reason), now_us);
}

bool GroupLifecycle::OnExit(uint32_t rank, uint64_t worker_id, bool kv_trusted,
                            const std::string& text, int64_t now_us) {
  if (rank >= ranks_.size() || worker_id == 0) return false;
  Rank& r = ranks_[rank];
  if (r.unjudged_id == worker_id) {
    r.unjudged_id = 0;
    if (!kv_trusted) Distrust();
    return true;
  }
  if (r.worker_id != worker_id || r.gone) return false;
  Fence(&r);
  r.attached = false;
  r.gone = true;
  if (r.in_group && !kv_trusted) Distrust();
  // One that was in no group has written nothing.
  OnFault(FaultCause::kExit, kv_trusted || !r.in_group,
          fmt::format("engine worker {} {}", rank, text), now_us);
  return true;
}

void GroupLifecycle::Distrust() {
  if (state_ == State::kGathering) {
    distrust_due_ = true;
  } else if (state_ == State::kAborting) {
    kv_trusted_ = false;
  }
}

void GroupLifecycle::OnFault(FaultCause cause, bool kv_trusted, const std::string& text,
                             int64_t now_us) {
  if (state_ == State::kAborting) {
    kv_trusted_ = kv_trusted_ && kv_trusted;
    return;
  }
  if (!has_group()) return;
  state_ = State::kAborting;
  kv_trusted_ = kv_trusted;
  fault_cause_ = cause;
  fault_ = text;
  if (!fault_time_us_.has_value()) fault_time_us_ = now_us;
  for (Rank& rank : ranks_) {
    rank.fenced = rank.gone;
    rank.told = false;
    if (!rank.fenced && !rank.end_us.has_value()) rank.end_us = now_us + kPatienceUs;
  }
}

bool GroupLifecycle::OnAborted(uint32_t rank, uint64_t group_epoch) {
  Rank& r = ranks_[rank];
  if (state_ != State::kAborting || group_epoch != epoch_ || !r.attached || r.fenced) return false;
  Fence(&r);
  return true;
}

bool GroupLifecycle::OnReady(uint32_t rank, uint64_t group_epoch, uint64_t pool_epoch) {
  Rank& r = ranks_[rank];
  if (state_ != State::kAttaching || group_epoch != epoch_ || pool_epoch != attached_pool_ ||
      r.ready) {
    return false;
  }
  r.ready = true;
  return true;
}

void GroupLifecycle::SetPool(uint64_t pool_epoch) {
  pool_ = pool_epoch;
  const bool attached = state_ == State::kAttaching || state_ == State::kInUse;
  if (attached && pool_ != attached_pool_) state_ = State::kConfigured;
}

// Nothing is waited for that an end or a new process has settled.
void GroupLifecycle::Fence(Rank* rank) {
  rank->fenced = true;
  rank->lost_us.reset();
  rank->end_us.reset();
}

GroupLifecycle::Action GroupLifecycle::Act(Action action, uint32_t rank) {
  rank_ = rank;
  return action;
}

// What nobody will tell any more.
void GroupLifecycle::GiveUpWaiting(int64_t now_us) {
  for (Rank& rank : ranks_) {
    if (!watching_ && rank.lost_us.has_value() && now_us >= *rank.lost_us + kGraceUs) {
      if (rank.in_group) Distrust();
      Fence(&rank);
      rank.gone = true;
    }
    if (rank.unjudged_id != 0 && now_us >= rank.verdict_us) {
      rank.unjudged_id = 0;
      Distrust();
    }
  }
}

GroupLifecycle::Action GroupLifecycle::NextEnd(int64_t now_us) {
  for (uint32_t rank = 0; rank < ranks_.size(); ++rank) {
    std::optional<int64_t>& end_us = ranks_[rank].end_us;
    if (!end_us.has_value() || now_us < *end_us) continue;
    end_us = now_us + kPatienceUs;  // and again, if that does not help
    return Act(Action::kEndWorker, rank);
  }
  return Action::kNone;
}

GroupLifecycle::Action GroupLifecycle::NextAction(int64_t now_us) {
  GiveUpWaiting(now_us);
  switch (state_) {
    case State::kGathering:
      if (const Action end = NextEnd(now_us); end != Action::kNone) return end;
      if (std::exchange(distrust_due_, false)) return Action::kDistrustGroup;
      if (!All(&Rank::attached) || !AllJudged()) return Action::kNone;
      epoch_ = new_epoch_();
      for (Rank& rank : ranks_) rank.in_group = true;
      state_ = State::kConfigured;
      return Action::kConfigure;
    case State::kConfigured:
      if (pool_ == 0) return Action::kNone;
      attached_pool_ = pool_;
      for (Rank& rank : ranks_) rank.ready = false;
      state_ = State::kAttaching;
      ready_by_us_ = now_us + kReadyPatienceUs;
      return Action::kAttachPool;
    case State::kAttaching:
      return NextActionWhileAttaching(now_us);
    case State::kInUse:
      return Action::kNone;
    case State::kAborting:
      return NextActionWhileAborting(now_us);
  }
  return Action::kNone;
}

GroupLifecycle::Action GroupLifecycle::NextActionWhileAttaching(int64_t now_us) {
  if (All(&Rank::ready)) {
    state_ = State::kInUse;
    fault_time_us_.reset();
    return Action::kUseGroup;
  }
  if (now_us < ready_by_us_) return Action::kNone;
  const auto late =
      std::find_if(ranks_.begin(), ranks_.end(), [](const Rank& rank) { return !rank.ready; });
  OnFault(FaultCause::kDeadline, /*kv_trusted=*/true,
          fmt::format("engine worker {} is not ready after {} s", late - ranks_.begin(),
                      kReadyPatienceUs / 1'000'000),
          now_us);
  return NextActionWhileAborting(now_us);
}

GroupLifecycle::Action GroupLifecycle::NextActionWhileAborting(int64_t now_us) {
  for (uint32_t rank = 0; rank < ranks_.size(); ++rank) {
    Rank& r = ranks_[rank];
    if (!r.attached || r.fenced || std::exchange(r.told, true)) continue;
    return Act(Action::kAbortGroup, rank);
  }
  if (const Action end = NextEnd(now_us); end != Action::kNone) return end;
  if (!All(&Rank::fenced) || !AllJudged()) return Action::kNone;
  state_ = State::kGathering;
  return Action::kLoseGroup;
}

std::optional<int64_t> GroupLifecycle::NextDeadlineUs() const {
  std::optional<int64_t> next;
  const auto add = [&next](int64_t time_us) {
    next = next.has_value() ? std::min(*next, time_us) : time_us;
  };
  if (state_ == State::kAttaching) add(ready_by_us_);
  for (const Rank& rank : ranks_) {
    if (rank.end_us.has_value()) add(*rank.end_us);
    if (!watching_ && rank.lost_us.has_value()) add(*rank.lost_us + kGraceUs);
    if (rank.unjudged_id != 0) add(rank.verdict_us);
  }
  return next;
}

bool GroupLifecycle::AllJudged() const {
  return std::all_of(ranks_.begin(), ranks_.end(),
                     [](const Rank& rank) { return rank.unjudged_id == 0; });
}

bool GroupLifecycle::All(bool Rank::*flag) const { return Count(flag) == ranks_.size(); }

uint32_t GroupLifecycle::Count(bool Rank::*flag) const {
  return static_cast<uint32_t>(
      std::count_if(ranks_.begin(), ranks_.end(), [flag](const Rank& rank) { return rank.*flag; }));
}

std::string GroupLifecycle::WaitingFor() const {
  switch (state_) {
    case State::kGathering:
      if (!AllJudged()) return "waiting to hear how an engine worker has ended";
      return fmt::format("waiting for engine workers: {} of {} connected", Count(&Rank::attached),
                         ranks_.size());
    case State::kAborting:
      return fmt::format("waiting for engine workers to leave their group: {} of {} have",
                         Count(&Rank::fenced), ranks_.size());
    case State::kAttaching:
      for (size_t rank = 0; rank < ranks_.size(); ++rank) {
        if (!ranks_[rank].ready) return fmt::format("engine worker {} is warming up", rank);
      }
      return "";
    case State::kConfigured:
    case State::kInUse:
      return "";
  }
  return "";
}

}  // namespace wintserve
