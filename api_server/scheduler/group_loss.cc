// The loss of the rank group, and requests that run alone because they may be the cause of it.
#include <algorithm>
#include <utility>

#include "api_server/scheduler/scheduler_impl.h"

namespace wintserve {

void Scheduler::Impl::OnGroupLost(bool kv_trusted) {
  DropPlansInFlight();
  std::vector<Sequence*> resumed = TakeFromSlots();
  if (!kv_trusted) DistrustBlocks();
  for (Sequence* sequence : resumed) {
    if (kv_trusted && ResumeInSlot(sequence)) {
      ++totals_.resumed_sequences;
    } else {
      ++totals_.recomputed_sequences;
      QueueAgainLater(sequence);
    }
  }
  // Nothing in flight names those that leave any more. Whoever retires here may be gone afterwards.
  std::vector<Sequence*> leaving;
  for (Sequence& sequence : sequences_) {
    if (sequence.leaving()) leaving.push_back(&sequence);
  }
  for (Sequence* sequence : leaving) RetireIfUnnamed(sequence);
  CountWaitingTokensAgain();
}

// Their copies are ordered again: whether they have run is not known, and to run them twice changes
// nothing.
void Scheduler::Impl::DropPlansInFlight() {
  std::vector<PlannedCopy> restores;
  std::vector<CopyOrder> copy_outs;
  for (const PlanInFlight& plan : in_flight_) {
    for (const PlannedCopy& copy : plan.copies) {
      if (copy.owner == nullptr) {
        copy_outs.push_back(copy.order);
      } else {
        restores.push_back(copy);
        ++copy.owner->num_copies_to_plan;
      }
    }
    if (!ledger_.lost()) continue;
    for (Sequence* sequence : plan.restored) StartOverUnfilled(sequence);
  }
  restores_.insert(restores_.begin(), restores.begin(), restores.end());
  copy_outs_.insert(copy_outs_.begin(), copy_outs.begin(), copy_outs.end());
  in_flight_.clear();
  last_done_step_ = last_step_;
  last_step_was_prefill_only_ = false;
}

// The session is lost, and with it the orders of copies into its blocks, which have not run.
void Scheduler::Impl::StartOverUnfilled(Sequence* sequence) {
  ledger_.Drop(&sequence->blocks);
  sequence->num_done = sequence->num_planned = sequence->num_committed = 0;
  sequence->num_host_blocks = 0;
  SetRestored(sequence, false, /*known_tag=*/0);
}

// Empties all slots. Returns those that had one, or had given it up for their last row, by rank.
// They are where the last step done left them, and run, but in no slot and not in running_.
std::vector<Sequence*> Scheduler::Impl::TakeFromSlots() {
  std::vector<Sequence*> taken;
  for (Sequence& sequence : sequences_) {
    sequence.num_planned = sequence.num_done;
    sequence.length_planned = sequence.length();
    sequence.slot_initialised = false;
    sequence.token_in_slot = false;
    if (sequence.phase == Phase::kLastTokenInFlight) {
      --num_leaving_;
      sequence.phase = Phase::kRunning;
    } else if (sequence.phase != Phase::kRunning) {
      continue;
    } else if (Tenant* tenant = sequence.request->tenant) {
      waiting_.StopRunning(tenant);
    }
    taken.push_back(&sequence);
  }
  std::sort(taken.begin(), taken.end(), ByRank());
  running_.clear();
  slots_to_release_.clear();
  for (int slot = 0; slot < config_.max_num_seqs; ++slot) free_slots_.insert(slot);
  return taken;
}

// In a slot, to be initialised by its next row. False: there is none, its tenant has no room, or
// another request runs alone (and its own last row was in flight when that was asked for).
// REQUIRES: called by rank.
bool Scheduler::Impl::ResumeInSlot(Sequence* sequence) {
  if (free_slots_.empty() || !MayStartBesideIsolated(*sequence)) return false;
  Tenant* tenant = sequence->request->tenant;
  if (tenant != nullptr && !waiting_.RunAgain(tenant)) return false;
  sequence->slot = *free_slots_.begin();
  free_slots_.erase(free_slots_.begin());
  running_.push_back(sequence);
  return true;
}

// What is held now is not committed any more. What waiting sequences have matched, or asked for
// before the cache manager knew, may have been written in these steps: they match again.
void Scheduler::Impl::DistrustBlocks() {
  for (Sequence* sequence : std::exchange(to_commit_, {})) sequence->commit_queued = false;
  std::vector<Sequence*> matched;
  for (Sequence& sequence : sequences_) {
    if (sequence.phase != Phase::kWaiting) {
      sequence.commits_stopped = true;
    } else if (sequence.match == MatchState::kAsked || !sequence.blocks.empty()) {
      matched.push_back(&sequence);
    }
  }
  for (Sequence* sequence : matched) {
    if (sequence->match == MatchState::kDone) SetMatch(sequence, MatchState::kNone);
    waiting_.Remove(sequence);
    QueueAgainLater(sequence);  // an answer that comes gives back what it brings
  }
}

std::vector<uint64_t> Scheduler::Impl::RequestsInFlight() const {
  std::set<uint64_t> ids;
  for (const PlanInFlight& plan : in_flight_) {
    for (const PlannedRow& row : plan.rows) ids.insert(row.sequence->key.request);
  }
  return {ids.begin(), ids.end()};
}

void Scheduler::Impl::SetIsolated(std::optional<uint64_t> request_id) {
  isolated_.reset();
  if (!request_id.has_value() || !requests_.contains(*request_id)) return;
  isolated_ = request_id;
  for (Sequence* sequence : std::vector<Sequence*>(running_)) {
    if (!MayStartBesideIsolated(*sequence)) Preempt(sequence);
  }
}

bool Scheduler::Impl::MayStartBesideIsolated(const Sequence& sequence) const {
  return !isolated_.has_value() || sequence.key.request == *isolated_;
}

}  // namespace wintserve
