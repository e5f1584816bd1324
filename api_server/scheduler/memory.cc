// Blocks for the next plans, and what happens when there are none.
#include <algorithm>

#include "api_server/scheduler/scheduler_impl.h"

namespace wintserve {

// Somebody has no block. What is on its way is waited for; then the pins of those that wait go, and
// then, one by one, the sequences that come last. The first one always finds the whole pool in the
// end, and Submit has seen that this is enough.
void Scheduler::Impl::RelieveMemory(const PlanDraft& draft) {
  if (ledger_.lost() || ledger_.lease_is_asked() || !ledger_.exhausted() || num_leaving_ > 0 ||
      HasCopiesUnderWay() || !draft.flight.copies.empty()) {
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
                     [](const PlanInFlight& plan) { return !plan.copies.empty(); });
}

// Of all but `keeps`, which needs the blocks.
bool Scheduler::Impl::RevokePinsOfWaiting(const Sequence* keeps) {
  std::vector<Sequence*> pinning;
  for (Sequence* sequence : matched_waiting_) {
    if (!sequence->blocks.empty() && sequence != keeps) pinning.push_back(sequence);
  }
  for (Sequence* sequence : pinning) RevokeMatch(sequence);
  return !pinning.empty();
}

void Scheduler::Impl::Preempt(Sequence* sequence) {
  ++totals_.preemptions;
  GiveUpSlot(sequence);
  std::erase(running_, sequence);
  QueueAgainLater(sequence);
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
  int margin = std::clamp(static_cast<int>(running_.size()), least, most);
  if (running_.empty() && demand == 0) margin = 0;
  // The cache manager refuses a request for more than the pool has, which nobody could be given.
  demand = std::min(demand, config_.num_blocks);
  margin = std::min(margin, config_.num_blocks - demand);
  ledger_.Refill(demand, margin, &next_tag_, commands);
}

}  // namespace wintserve
