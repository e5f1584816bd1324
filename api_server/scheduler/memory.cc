// Blocks for the next plans, what happens when there are none, and the invariants.
#include <fmt/core.h>

#include <algorithm>
#include <unordered_map>

#include "api_server/scheduler/scheduler_impl.h"

namespace wintserve {

// Somebody has no block. What is on its way is waited for; then the pins of those that wait go, and
// then, one by one, the sequences that come last. The first one always finds the whole pool in the
// end, and Submit has seen that this is enough.
void Scheduler::Impl::RelieveMemory(const PlanDraft& draft) {
  if (ledger_.lost() || ledger_.lease_is_asked() || !ledger_.exhausted() || num_leaving_ > 0 ||
      HasCopiesUnderWay() || !draft.flight.copy_ids.empty()) {
    return;
  }
  if (RevokePinsOfWaiting(draft.starved_first) || running_.empty()) return;
  Sequence* last = running_.back();
  if (running_.size() == 1) {
    // Alone it finds the whole pool, unless it holds content twice itself: then it comes back,
    // takes the indexed blocks where it may, and never again pins what it has computed.
    if (!HoldsDuplicates(*last)) return;
    last->never_commits = true;
  }
  Preempt(last);
}

bool Scheduler::Impl::HoldsDuplicates(const Sequence& sequence) const {
  return std::any_of(sequence.blocks.begin(), sequence.blocks.end(),
                     [](const HeldBlock& held) { return held.leased && held.entry != 0; });
}

bool Scheduler::Impl::HasCopiesUnderWay() const {
  return !restores_.empty() || !copy_outs_.empty() ||
         std::any_of(in_flight_.begin(), in_flight_.end(),
                     [](const PlanInFlight& plan) { return !plan.copy_ids.empty(); });
}

// Of all but `keeps`, which needs the blocks.
bool Scheduler::Impl::RevokePinsOfWaiting(const Sequence* keeps) {
  std::vector<Sequence*> pinning;
  for (Sequence* sequence : waiting_) {
    if (!sequence->blocks.empty() && sequence != keeps) pinning.push_back(sequence);
  }
  for (Sequence* sequence : pinning) RevokeMatch(sequence);
  return !pinning.empty();
}

void Scheduler::Impl::Preempt(Sequence* sequence) {
  ++totals_.preemptions;
  GiveUpSlot(sequence);
  std::erase(running_, sequence);
  sequence->phase = Phase::kPreempted;
  ++num_leaving_;
  RetireIfUnnamed(sequence);
}

// What the next three plans can use, and a margin.
void Scheduler::Impl::RefillLease(std::vector<CacheCommand>* commands) {
  constexpr int kPlansAhead = 3;
  int demand = candidate_blocks_;
  int prefill_tokens_left = kPlansAhead * config_.max_num_batched_tokens;
  for (const Sequence* sequence : running_) {
    int end = sequence->num_planned + kPlansAhead;
    if (!sequence->decodes()) {
      const int chunk = std::min(sequence->num_remaining(), prefill_tokens_left);
      prefill_tokens_left -= chunk;
      end = sequence->num_planned + chunk;
    }
    const int num_blocks = BlocksFor(std::min(end, sequence->max_length() - 1));
    demand += std::max(0, num_blocks - static_cast<int>(sequence->blocks.size()));
  }
  // Without a margin something would be asked for at every step.
  const int least = std::min(16, config_.num_blocks / 8);
  const int most = std::max(least, config_.num_blocks * 3 / 100);
  const int margin = std::clamp(static_cast<int>(running_.size()), least, most);
  ledger_.Refill(demand, running_.empty() && demand == 0 ? 0 : margin, &next_tag_, commands);
}

absl::Status Scheduler::Impl::CheckInvariants() const {
  if (num_plans_in_flight() > 1 + config_.async_depth) {
    return absl::InternalError(fmt::format("{} plans are in flight", in_flight_.size()));
  }
  int num_leased = ledger_.num_leased_ahead();
  int num_leaving = 0;
  int num_matched = 0;
  std::unordered_map<uint64_t, uint32_t> pins;
  std::set<uint32_t> slots(free_slots_.begin(), free_slots_.end());
  slots.insert(slots_to_release_.begin(), slots_to_release_.end());
  if (slots.size() != free_slots_.size() + slots_to_release_.size()) {
    return absl::InternalError("a slot is released twice");
  }
  for (const Sequence& sequence : sequences_) {
    const std::string name =
        fmt::format("sequence {}/{}", sequence.key.request, sequence.key.choice);
    for (const HeldBlock& held : sequence.blocks) {
      if (held.leased) ++num_leased;
      if (held.entry != 0) ++pins[held.entry];
      if (!held.leased && held.entry == 0) {
        return absl::InternalError(
            fmt::format("{} holds block {} by nothing", name, held.block.id));
      }
    }
    if (sequence.leaving()) ++num_leaving;
    if (sequence.match == MatchState::kDone) ++num_matched;
    if (sequence.num_done > sequence.num_planned ||
        BlocksFor(sequence.num_planned) > static_cast<int>(sequence.blocks.size())) {
      return absl::InternalError(fmt::format("{} has done {} and planned {} tokens in {} blocks",
                                             name, sequence.num_done, sequence.num_planned,
                                             sequence.blocks.size()));
    }
    if (sequence.phase == Phase::kRunning && !slots.insert(sequence.slot).second) {
      return absl::InternalError(fmt::format("{} shares slot {}", name, sequence.slot));
    }
  }
  if (static_cast<int>(slots.size()) != config_.max_num_seqs) {
    return absl::InternalError(
        fmt::format("{} of {} slots are accounted for", slots.size(), config_.max_num_seqs));
  }
  if (num_leased != ledger_.num_leased() || pins != ledger_.pins()) {
    return absl::InternalError(
        fmt::format("{} leased blocks and {} pinned entries are held, the ledger has {} and {}",
                    num_leased, pins.size(), ledger_.num_leased(), ledger_.pins().size()));
  }
  std::map<const Tenant*, int> num_requests;
  for (const auto& [id, request] : requests_) {
    if (request->tenant != nullptr) ++num_requests[request->tenant];
  }
  for (const auto& [name, tenant] : tenants_) {
    if (const int found = num_requests[&tenant]; found == 0 || found != tenant.num_requests) {
      return absl::InternalError(fmt::format("tenant {} has {} requests, counted were {}", name,
                                             found, tenant.num_requests));
    }
  }
  if (num_leaving != num_leaving_ || num_matched != num_matched_waiting_) {
    return absl::InternalError(fmt::format("{} leave and {} are matched, counted were {} and {}",
                                           num_leaving, num_matched, num_leaving_,
                                           num_matched_waiting_));
  }
  return absl::OkStatus();
}

}  // namespace wintserve
