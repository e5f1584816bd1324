// How ranks fail, and how a group of them ends and another one starts.
#include <algorithm>
#include <utility>

#include "tests/simulation/rank_group.h"

namespace wintserve::simulation {

void RankGroup::Fail(int rank_index, WorkerFailure failure) {
  const auto rank = static_cast<size_t>(rank_index);
  Member& member = members_[rank];
  if (!member.process || member.dying) return;
  switch (failure) {
    case WorkerFailure::kKilled:
      ++report_.counters.worker_kills;
      report_.Trace("rank {}: is killed", rank);
      return Die(rank, /*kv_trusted=*/true);
    case WorkerFailure::kCrashed:
      ++report_.counters.worker_crashes;
      report_.Trace("rank {}: crashes", rank);
      return Die(rank, /*kv_trusted=*/false);
    case WorkerFailure::kHangs:
      if (member.hangs) return;
      ++report_.counters.worker_hangs;
      report_.Trace("rank {}: hangs", rank);
      Hang(rank);
      events_.After(config_.step_deadline_us, [this, rank, id = member.process_id] {
        if (IsCurrent(rank, id)) Abort();
      });
  }
}

void RankGroup::Hang(size_t rank) {
  members_[rank].hangs = true;
  ++members_[rank].num_drops;  // the plans stay, and may be run when it is killed
}

void RankGroup::DropPending(Member* member) {
  member->pending.clear();
  ++member->num_drops;
  member->free_at_us = events_.now_us();
}

// What it had started may still be written until it is reaped. That its stream drops says nothing.
void RankGroup::Die(size_t rank, bool kv_trusted) {
  Member& member = members_[rank];
  member.dying = true;
  ++member.num_drops;
  if (const auto last_step = member.process->last_executed(); !kv_trusted && last_step) {
    const bool is_old = *last_step > config_.num_bad_steps;
    member.memory->SpoilSince(is_old ? *last_step - config_.num_bad_steps + 1 : 1);
  }
  const int64_t reaped_after_us = fault_random_.Between(1, config_.max_reap_us);
  const uint64_t id = member.process_id;
  if (!member.pending.empty()) {
    events_.After(fault_random_.Between(0, reaped_after_us - 1),
                  [this, rank, kv_trusted] { WriteLate(rank, kv_trusted); });
  }
  events_.After(WorkerLatencyUs(), [this, rank, id] { OnStreamDropped(rank, id); });
  events_.After(reaped_after_us, [this, rank, kv_trusted] { OnReaped(rank, kv_trusted); });
}

// Some of the plans, and a part of the next one: the device goes on for a while without its host.
void RankGroup::WriteLate(size_t rank, bool kv_trusted) {
  Member& member = members_[rank];
  ++report_.counters.late_writes;
  for (const Pending& pending : std::exchange(member.pending, {})) {
    if (pending.start_us > events_.now_us() || !CheckMayWrite(rank, pending)) return;
    if (!kv_trusted) return member.process->Scribble(*pending.plan);
    if (fault_random_.Chance(0.7)) {
      member.process->Execute(BeginningOf(*pending.plan));
      return;
    }
    member.process->Execute(*pending.plan);
  }
}

StepPlan RankGroup::BeginningOf(const StepPlan& plan) {
  StepPlan beginning = plan;
  beginning.slot_release.clear();
  const auto num_copies = fault_random_.Between(0, std::ssize(plan.copies));
  beginning.copies.resize(static_cast<size_t>(num_copies));
  const auto num_rows =
      num_copies < std::ssize(plan.copies) ? 0 : fault_random_.Between(0, std::ssize(plan.rows));
  beginning.rows.resize(static_cast<size_t>(num_rows));
  if (num_rows == 0) return beginning;
  PlanRow& last = beginning.rows.back();
  last.length = static_cast<uint32_t>(fault_random_.Between(1, last.length));
  if (!last.tokens.empty()) last.tokens.resize(last.length);
  last.sample = last.prompt_logprobs = false;
  return beginning;
}

bool RankGroup::IsCurrent(size_t rank, uint64_t process_id) const {
  return members_[rank].process && members_[rank].process_id == process_id;
}

void RankGroup::OnReaped(size_t rank, bool kv_trusted) {
  Member& member = members_[rank];
  const uint64_t id = member.process_id;
  report_.Trace("rank {}: is reaped", rank);
  member.process.reset();
  member.pending.clear();
  events_.After(WorkerLatencyUs(),
                [this, rank, id, kv_trusted] { OnExitNotice(rank, id, kv_trusted); });
  events_.After(fault_random_.Between(1, config_.max_restart_us), [this, rank] {
    Launch(rank);
    events_.After(WorkerLatencyUs(),
                  [this, rank, new_id = members_[rank].process_id] { OnAttached(rank, new_id); });
  });
}

// --- What the API server hears, and does.

void RankGroup::OnStreamDropped(size_t rank, uint64_t process_id) {
  if (members_[rank].process_id != process_id) return;
  members_[rank].attached = false;
  Abort();
  if (config_.mistake == Mistake::kFenceOnStreamDrop && aborting()) SetFenced(rank);
}

void RankGroup::OnExitNotice(size_t rank, uint64_t process_id, bool kv_trusted) {
  Member& member = members_[rank];
  // Its successor was there before the news; or it has never been attached.
  if (member.stream_id != process_id) return;
  member.attached = false;
  member.exit_known = true;
  Abort();
  kv_trusted_ &= kv_trusted;
  if (aborting()) return SetFenced(rank);
  // The group was over before. Now it turns out that what it wrote was wrong.
  if (!std::exchange(kv_trusted_, true)) notify_.on_fenced(false);
}

void RankGroup::OnAttached(size_t rank, uint64_t process_id) {
  Member& member = members_[rank];
  if (!IsCurrent(rank, process_id)) return;
  report_.Trace("rank {}: is attached", rank);
  Abort();  // unless the end of the one before was noticed
  member.attached = true;
  member.stream_id = process_id;
  // That one is gone. Where nobody has said how it ended, the worst is to be assumed.
  const bool kv_trusted = std::exchange(member.exit_known, false);
  if (aborting()) {
    kv_trusted_ &= kv_trusted;
    return SetFenced(rank);
  }
  if (!kv_trusted) notify_.on_fenced(false);
  StartIfComplete();
}

void RankGroup::Abort() {
  if (state_ == State::kAborting || state_ == State::kWaiting) return;
  state_ = State::kAborting;
  ++report_.counters.groups_lost;
  report_.counters.plans_lost += in_flight_.size();
  report_.Trace("group {}: is given up, {} plans in flight", group_epoch_, in_flight_.size());
  for (size_t rank = 0; rank < members_.size(); ++rank) {
    Member& member = members_[rank];
    member.fenced = false;
    const int64_t arrival = member.to_rank.Arrival(events_.now_us(), WorkerLatencyUs());
    events_.At(arrival, [this, rank, id = member.stream_id] { OnAbort(rank, id); });
  }
  events_.After(config_.abort_timeout_us,
                [this, epoch = group_epoch_] { EndThoseThatStay(epoch); });
  notify_.on_frozen();
}

void RankGroup::EndThoseThatStay(uint64_t group_epoch) {
  if (!aborting() || group_epoch != group_epoch_) return;
  for (size_t rank = 0; rank < members_.size(); ++rank) {
    Member& member = members_[rank];
    if (member.fenced || !member.process || member.dying) continue;
    ++report_.counters.workers_ended;
    report_.Trace("rank {}: does not leave the group, and is killed", rank);
    Die(rank, /*kv_trusted=*/true);
  }
}

// At the rank: it leaves what it has begun where it is, and drops the rest.
void RankGroup::OnAbort(size_t rank, uint64_t process_id) {
  Member& member = members_[rank];
  if (!IsCurrent(rank, process_id) || member.dying || member.hangs) return;
  if (fault_random_.Chance(config_.abort_hang_chance)) return Hang(rank);
  if (!member.pending.empty()) WriteLate(rank, /*kv_trusted=*/true);
  DropPending(&member);
  const int64_t arrival = member.from_rank.Arrival(events_.now_us(), WorkerLatencyUs());
  events_.At(arrival, [this, rank, process_id, epoch = group_epoch_] {
    OnAborted(rank, process_id, epoch);
  });
}

// Also of a process that has died since: it had left the group before.
void RankGroup::OnAborted(size_t rank, uint64_t process_id, uint64_t group_epoch) {
  if (!aborting() || group_epoch != group_epoch_) return;
  if (members_[rank].process_id == process_id) SetFenced(rank);
}

void RankGroup::SetFenced(size_t rank) {
  members_[rank].fenced = true;
  if (config_.mistake == Mistake::kFenceOnFirst) {
    for (Member& member : members_) member.fenced = true;
  }
  if (!std::all_of(members_.begin(), members_.end(), [](const Member& m) { return m.fenced; })) {
    return;
  }
  state_ = State::kWaiting;
  fenced_epoch_ = group_epoch_;
  in_flight_.clear();
  const bool kv_trusted = std::exchange(kv_trusted_, true);
  report_.Trace("group {}: is fenced, {}", group_epoch_, kv_trusted ? "trusted" : "not trusted");
  notify_.on_fenced(kv_trusted);
  StartIfComplete();
}

void RankGroup::StartIfComplete() {
  if (state_ != State::kWaiting) return;
  if (!std::all_of(members_.begin(), members_.end(), [](const Member& m) { return m.attached; })) {
    return;
  }
  state_ = State::kStarting;
  ++group_epoch_;
  events_.After(config_.step_deadline_us, [this, epoch = group_epoch_] {
    if (state_ == State::kStarting && epoch == group_epoch_) Abort();
  });
  for (size_t rank = 0; rank < members_.size(); ++rank) {
    Member& member = members_[rank];
    member.joined = false;
    const int64_t arrival = member.to_rank.Arrival(events_.now_us(), WorkerLatencyUs());
    events_.At(arrival, [this, rank, id = member.stream_id, epoch = group_epoch_] {
      Join(rank, id, epoch);
    });
  }
}

// At the rank.
void RankGroup::Join(size_t rank, uint64_t process_id, uint64_t group_epoch) {
  Member& member = members_[rank];
  if (!IsCurrent(rank, process_id) || member.dying || member.hangs) return;
  member.process->AttachPool(pool_epoch_, member.memory.get());
  member.process->JoinGroup();
  const int64_t arrival = member.from_rank.Arrival(
      events_.now_us(), WorkerLatencyUs() + fault_random_.Between(0, config_.step_us));
  events_.At(arrival,
             [this, rank, process_id, group_epoch] { OnJoined(rank, process_id, group_epoch); });
}

void RankGroup::OnJoined(size_t rank, uint64_t process_id, uint64_t group_epoch) {
  if (state_ != State::kStarting || group_epoch != group_epoch_) return;
  if (members_[rank].process_id != process_id) return;
  members_[rank].joined = true;
  if (!std::all_of(members_.begin(), members_.end(), [](const Member& m) { return m.joined; })) {
    return;
  }
  state_ = State::kReady;
  last_done_us_ = events_.now_us();
  report_.Trace("group {}: is ready", group_epoch_);
  notify_.on_ready();
}

int64_t RankGroup::WorkerLatencyUs() {
  return fault_random_.Around(static_cast<double>(config_.worker_latency_us));
}

}  // namespace wintserve::simulation
