// Who is next in line: matches are asked for those, and plans take them up.
#include <algorithm>

#include "api_server/scheduler/scheduler_impl.h"

namespace wintserve {

// Tokens that it still has to compute, as far as is known.
int Scheduler::Impl::ExpectedTokens(const Sequence& sequence) const {
  if (sequence.match == MatchState::kDone || !caching()) return sequence.num_remaining();
  return static_cast<int>(std::max<int64_t>(1, sequence.num_waiting_tokens));
}

// Blocks that an admission leaves to the sequences that run already.
int Scheduler::Impl::Watermark() const {
  return std::max(config_.num_blocks / 100, static_cast<int>(running_.size()));
}

// `num_reserved_blocks`: meant for those before it.
bool Scheduler::Impl::FitsMemory(const Sequence& sequence, int num_reserved_blocks,
                                 bool is_first) const {
  // Nobody gives up blocks that it could wait for, and it can run alone.
  if (is_first && IsAlone()) return true;
  return FirstBlocks(sequence) + num_reserved_blocks + Watermark() <= ledger_.num_obtainable();
}

// New blocks that it needs to start: for its first chunk, or for all of it.
int Scheduler::Impl::FirstBlocks(const Sequence& sequence) const {
  int num_tokens = ExpectedTokens(sequence);
  if (sequence.must_fit_whole) {
    num_tokens = sequence.num_remaining();
  } else if (config_.chunked_prefill) {
    num_tokens = std::min(num_tokens, config_.max_num_batched_tokens);
  }
  return BlocksFor(num_tokens);
}

// Pins are taken only by those that could start with the next plan: the others would keep blocks
// from them.
void Scheduler::Impl::AskMatches(std::vector<CacheCommand>* commands) {
  candidate_blocks_ = 0;
  int num_slots = static_cast<int>(free_slots_.size());
  int num_candidates = 0;
  int num_tokens = 0;
  QueueWalk walk(waiting_);
  while (num_slots > 0) {
    Sequence* sequence = walk.Next();
    if (sequence == nullptr) return;
    if (!MayStartBesideIsolated(*sequence) || !MayStart(sequence)) continue;
    if (!FitsMemory(*sequence, candidate_blocks_, num_candidates == 0)) return;
    if (num_candidates >= config_.max_partial_prefills &&
        num_tokens >= config_.max_num_batched_tokens) {
      return;
    }
    --num_slots;
    ++num_candidates;
    walk.CountIn();
    num_tokens += ExpectedTokens(*sequence);
    candidate_blocks_ += FirstBlocks(*sequence);
    if (sequence->match == MatchState::kNone && NeedsMatch(*sequence)) {
      AskMatch(sequence, commands);
    }
  }
}

// In order, and nobody is overtaken but by reason of its tenant, its siblings, its copies, or
// because it would be one prompt in pieces too many.
void Scheduler::Impl::Admit(PlanDraft* draft, SchedulerOutput* output) {
  int num_slots = static_cast<int>(free_slots_.size());
  bool is_first = true;
  QueueWalk walk(waiting_);
  while (num_slots > 0) {
    Sequence* sequence = walk.Next();
    if (sequence == nullptr) return;
    if (!MayStartBesideIsolated(*sequence) || !MayStart(sequence)) continue;
    if (AwaitsCopies(*sequence, *draft)) {
      --num_slots;  // it takes its slot with the next plan
      continue;
    }
    if (sequence->match_outdated && caching()) {
      DropMatch(sequence);
      return;
    }
    if (NeedsMatch(*sequence) || !FitsMemory(*sequence, 0, is_first)) return;
    is_first = false;
    switch (TryStart(sequence, draft, output)) {
      case StartResult::kStarted:
        --num_slots;
        break;
      case StartResult::kPassedOver:
        break;
      case StartResult::kWaits:
        return;
    }
  }
}

// The second look: it is matched anew, before its first chunk.
void Scheduler::Impl::DropMatch(Sequence* sequence) {
  // Pins of copies that are under way cannot be given back yet, and they will do.
  sequence->match_outdated = false;
  if (sequence->last_plan_step > last_done_step_) return;
  SetMatch(sequence, MatchState::kNone);
  ledger_.Drop(&sequence->blocks);
  sequence->num_done = 0;
  sequence->num_planned = 0;
  sequence->num_committed = 0;
}

Scheduler::Impl::StartResult Scheduler::Impl::TryStart(Sequence* sequence, PlanDraft* draft,
                                                       SchedulerOutput* output) {
  const int wanted = ChunkOf(*sequence, *draft);
  if (wanted == 0) return StartResult::kWaits;
  const bool is_partial = wanted < sequence->num_remaining();
  const bool is_long = IsLong(*sequence);
  if (is_partial && (draft->num_partial >= config_.max_partial_prefills ||
                     (is_long && draft->num_long_partial >= config_.max_long_partial_prefills))) {
    return StartResult::kPassedOver;
  }
  int chunk = wanted;
  if (const int at_hand = TokensWithBlocks(*sequence); at_hand < wanted) {
    if (IsAlone()) {
      draft->lacks_blocks = true;
      draft->starved_first = sequence;
    }
    // Alone it begins with what there is. Beside others it waits for the lease.
    if (!IsAlone() || !config_.chunked_prefill || ledger_.lease_is_asked() || at_hand == 0) {
      return StartResult::kWaits;
    }
    chunk = at_hand;
  }
  if (!FitsMessage(*sequence, chunk, *draft)) return StartResult::kWaits;
  if (is_partial) ++draft->num_partial;
  if (is_partial && is_long) ++draft->num_long_partial;
  Start(sequence, output);
  AddRow(sequence, chunk, draft);
  return StartResult::kStarted;
}

void Scheduler::Impl::Start(Sequence* sequence, SchedulerOutput* output) {
  waiting_.Start(sequence);
  SetMatch(sequence, MatchState::kNone);
  sequence->phase = Phase::kRunning;
  sequence->slot = *free_slots_.begin();
  free_slots_.erase(free_slots_.begin());
  running_.insert(std::upper_bound(running_.begin(), running_.end(), sequence, ByRank()), sequence);
  if (sequence->started) return;
  sequence->started = true;
  output->started.push_back({sequence->key, sequence->num_done});
  const int host_tokens = sequence->num_host_blocks * config_.block_size_tokens;
  totals_.queried_tokens += sequence->prompt_len();
  totals_.host_hit_tokens += host_tokens;
  totals_.device_hit_tokens += sequence->num_done - host_tokens;
}

}  // namespace wintserve
