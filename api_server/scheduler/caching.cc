// The scheduler's dealings with the prefix cache: matches, restores, commits, and the loss of the
// session.
#include <fmt/core.h>

#include <algorithm>
#include <utility>

#include "api_server/scheduler/scheduler_impl.h"
#include "common/check.h"

namespace wintserve {

bool Scheduler::Impl::NeedsMatch(const Sequence& sequence) const {
  return caching() && !sequence.request->bypass_cache_match && !sequence.lacks_prompt_logprobs() &&
         sequence.match != MatchState::kDone && sequence.length() > config_.block_size_tokens;
}

void Scheduler::Impl::SetMatch(Sequence* sequence, MatchState state) {
  if (sequence->match == MatchState::kAsked) --num_matching_;
  if (sequence->match == MatchState::kDone) matched_waiting_.erase(sequence);
  if (state == MatchState::kAsked) ++num_matching_;
  if (state == MatchState::kDone) matched_waiting_.insert(sequence);
  sequence->match = state;
}

void Scheduler::Impl::SetRestored(Sequence* sequence, bool restored, uint64_t known_tag) {
  if (sequence->restoring()) --num_restoring_;
  sequence->restored = restored;
  sequence->restore_known_tag = known_tag;
  if (sequence->restoring()) ++num_restoring_;
}

void Scheduler::Impl::AskMatch(Sequence* sequence, std::vector<CacheCommand>* commands) {
  MatchCommand command{.tag = next_tag_++,
                       .salt = sequence->request->salt,
                       .tokens = {},
                       .allow_restore = step_times_.RestoreIsWorthwhile(config_.block_size_tokens)};
  command.tokens.reserve(sequence->length());
  sequence->AppendTokens(0, sequence->length(), &command.tokens);
  asked_[command.tag] = sequence;
  sequence->match_outdated = false;
  SetMatch(sequence, MatchState::kAsked);
  sequence->match_outdated = false;  // said of a match from before the session was lost
  commands->push_back(std::move(command));
}

void Scheduler::Impl::OnPeeked(uint64_t tag, const PeekResult& result) {
  last_answered_tag_ = std::max(last_answered_tag_, tag);
  const auto peeked = peeked_.extract(tag);
  if (peeked.empty()) return;
  const auto found = requests_.find(peeked.mapped());
  if (found == requests_.end()) return;
  const Request& request = *found->second;
  // A hit on the host counts too: it is copied unless that is slower.
  const int num_cached =
      static_cast<int>(result.device_blocks + result.host_blocks) * config_.block_size_tokens;
  const int64_t num_left = std::max(1, request.prompt_len() - num_cached);
  for (Sequence* choice : request.choices) {
    if (choice == nullptr || choice->phase != Phase::kWaiting || choice->must_fit_whole) continue;
    if (num_left < choice->num_waiting_tokens) waiting_.SetTokens(choice, num_left);
  }
}

void Scheduler::Impl::OnMatched(uint64_t tag, MatchResult result) {
  last_answered_tag_ = std::max(last_answered_tag_, tag);
  const auto asked = asked_.extract(tag);
  if (asked.empty()) return;  // of a session that was lost
  Sequence* sequence = asked.mapped();
  CHECK(sequence->blocks.empty() && result.restoring.size() == result.copies.size());
  for (const auto* pinned : {&result.device, &result.restoring}) {
    for (const PinnedBlock& block : *pinned) {
      ledger_.AddPin(block.entry);
      sequence->blocks.push_back({.block = block.block, .entry = block.entry});
    }
  }
  // The copies are made even if it is gone by now: only then can their blocks be used again.
  for (const CopyOrder& order : result.copies) restores_.push_back({order, sequence});
  sequence->num_copies_to_plan = static_cast<int>(result.copies.size());
  SetRestored(sequence, !result.copies.empty(), /*known_tag=*/0);
  sequence->num_host_blocks = static_cast<int>(result.restoring.size());
  sequence->num_committed = static_cast<int>(sequence->blocks.size());
  sequence->num_done = sequence->num_committed * config_.block_size_tokens;
  sequence->num_planned = sequence->num_done;
  sequence->match_outdated = false;
  if (sequence->leaving()) {
    SetMatch(sequence, MatchState::kNone);
    RetireIfUnnamed(sequence);
    return;
  }
  SetMatch(sequence, MatchState::kDone);
  waiting_.SetTokens(sequence, sequence->length() - sequence->num_done);
}

// Its pins go back as soon as no copy into them is under way. It is matched again when there is
// room for all of it.
void Scheduler::Impl::RevokeMatch(Sequence* sequence) {
  SetMatch(sequence, MatchState::kNone);
  waiting_.Remove(sequence);
  QueueAgainLater(sequence);
}

bool Scheduler::Impl::HasBlocksToCommit(const Sequence& sequence) const {
  if (!caching() || sequence.commits_stopped || sequence.commit_tag != 0) return false;
  // Of a cancelled sequence plans in flight may have written more than was ever reported.
  const int num_known = std::min(sequence.num_done, sequence.length());
  return num_known / config_.block_size_tokens > sequence.num_committed;
}

void Scheduler::Impl::QueueCommit(Sequence* sequence) {
  if (std::exchange(sequence->commit_queued, true)) return;
  to_commit_.push_back(sequence);
}

void Scheduler::Impl::SendCommits(std::vector<CacheCommand>* commands) {
  for (Sequence* sequence : std::exchange(to_commit_, {})) {
    sequence->commit_queued = false;
    if (!HasBlocksToCommit(*sequence)) continue;
    const int first = sequence->num_committed;
    const int num_known = std::min(sequence->num_done, sequence->length());
    const int end = num_known / config_.block_size_tokens;
    CommitCommand command{.tag = next_tag_++, .request = {}};
    command.request.parent = first == 0 ? 0 : sequence->blocks[first - 1].entry;
    command.request.salt = sequence->request->salt;
    command.request.blocks.reserve(end - first);
    for (int i = first; i < end; ++i) {
      CommitBlock& block = command.request.blocks.emplace_back();
      block.block = sequence->blocks[i].block;
      command.request.step = std::max(command.request.step, sequence->blocks[i].step);
      block.tokens.reserve(config_.block_size_tokens);
      sequence->AppendTokens(i * config_.block_size_tokens, (i + 1) * config_.block_size_tokens,
                             &block.tokens);
    }
    sequence->commit_tag = command.tag;
    sequence->num_committing = end - first;
    asked_[command.tag] = sequence;
    commands->push_back(std::move(command));
    OutdateMatches(*sequence, first, end - first);
  }
}

void Scheduler::Impl::OnCommitted(uint64_t tag, const std::vector<CommittedBlock>& blocks) {
  last_answered_tag_ = std::max(last_answered_tag_, tag);
  const auto asked = asked_.extract(tag);
  if (asked.empty()) return;  // of a session that was lost
  Sequence* sequence = asked.mapped();
  sequence->commit_tag = 0;
  const int first = sequence->num_committed;
  for (int i = 0; i < sequence->num_committing; ++i) {
    // No entry, or too few of them: the parent was flushed, or the commit was refused.
    if (i >= static_cast<int>(blocks.size()) || blocks[i].entry == 0) {
      sequence->commits_stopped = true;
      break;
    }
    HeldBlock& held = sequence->blocks[first + i];
    held.entry = blocks[i].entry;
    if (blocks[i].duplicate) {
      ledger_.AddPin(held.entry);  // of the other copy; this one stays private
    } else {
      held.leased = false;
      ledger_.LeaseBecamePin(held.entry);
    }
    ++sequence->num_committed;
  }
  OutdateMatches(*sequence, first, sequence->num_committed - first);
  if (sequence->leaving()) {
    RetireIfUnnamed(sequence);
  } else if (HasBlocksToCommit(*sequence)) {
    QueueCommit(sequence);
  }
}

// Marks the waiting sequences whose match one of these blocks lengthens: a Match that is sent after
// the commit finds it.
void Scheduler::Impl::OutdateMatches(const Sequence& committer, int first_block, int num_blocks) {
  const int size = config_.block_size_tokens;
  std::vector<int32_t> ours, theirs;
  for (Sequence* waiting : matched_waiting_) {
    const int next = static_cast<int>(waiting->blocks.size());
    if (next < first_block || next >= first_block + num_blocks ||
        (next + 1) * size >= waiting->length() || waiting->request->bypass_cache_match ||
        waiting->request->salt != committer.request->salt) {
      continue;
    }
    // A parent in the same commit has no handle yet; the answer comes here again.
    if (next > 0 && waiting->blocks.back().entry != committer.blocks[next - 1].entry) continue;
    ours.clear();
    theirs.clear();
    committer.AppendTokens(next * size, (next + 1) * size, &ours);
    waiting->AppendTokens(next * size, (next + 1) * size, &theirs);
    waiting->match_outdated = waiting->match_outdated || ours == theirs;
  }
}

// The choices after the first wait until they can share its prompt.
bool Scheduler::Impl::MayStart(Sequence* sequence) const {
  Request& request = *sequence->request;
  if (sequence->key.choice == 0) return true;
  const Sequence* first = request.choices[0];
  // They come with the first one's first token, before any other's.
  if (first != nullptr && first->lacks_prompt_logprobs()) return false;
  if (request.prompt_is_shareable || !caching() || request.bypass_cache_match) return true;
  const int num_shareable = (request.prompt_len() - 1) / config_.block_size_tokens;
  request.prompt_is_shareable = first == nullptr || num_shareable == 0 ||
                                (first->num_done >= request.prompt_len() &&
                                 (first->num_committed >= num_shareable || first->commits_stopped));
  return request.prompt_is_shareable;
}

void Scheduler::Impl::OnCopyOut(std::vector<CopyOrder> copies) {
  if (ledger_.lost()) return;
  copy_outs_.insert(copy_outs_.end(), copies.begin(), copies.end());
}

void Scheduler::Impl::OnAvailable(uint32_t num_blocks) {
  ledger_.OnAvailable(static_cast<int>(num_blocks));
}

void Scheduler::Impl::OnLeased(uint64_t tag, std::vector<PoolBlock> blocks) {
  last_answered_tag_ = std::max(last_answered_tag_, tag);
  ledger_.OnLeased(tag, std::move(blocks));
}

void Scheduler::Impl::OnCacheLost() {
  if (ledger_.lost()) return;
  ledger_.Lose();
  asked_.clear();
  peeked_.clear();
  peeks_.clear();
  copies_done_.clear();
  restores_.clear();
  copy_outs_.clear();
  to_commit_.clear();
  for (PlanInFlight& plan : in_flight_) plan.copies.clear();
  std::vector<Sequence*> leaving;
  for (Sequence& sequence : sequences_) {
    sequence.commit_queued = false;
    if (std::exchange(sequence.commit_tag, 0) != 0) {
      for (int i = 0; i < sequence.num_committing; ++i) {
        sequence.blocks[sequence.num_committed + i].uncertain = true;
      }
    }
    if (std::exchange(sequence.num_copies_to_plan, 0) > 0) {
      ledger_.Drop(&sequence.blocks);  // they never get their content: the match has missed
      sequence.num_done = sequence.num_planned = sequence.num_committed = 0;
      sequence.num_host_blocks = 0;
      SetRestored(&sequence, false, /*known_tag=*/0);
    }
    if (sequence.match == MatchState::kAsked) SetMatch(&sequence, MatchState::kNone);
    if (sequence.leaving()) leaving.push_back(&sequence);
  }
  for (Sequence* sequence : leaving) RetireIfUnnamed(sequence);
  CountWaitingTokensAgain();  // what a peek has found, and what choices would share, is out of
                              // reach
}

// With what is known now: of a match, or that there is a cache at all.
void Scheduler::Impl::CountWaitingTokensAgain() {
  for (Sequence& sequence : sequences_) {
    if (sequence.phase != Phase::kWaiting) continue;
    const Request& request = *sequence.request;
    const bool is_new = sequence.match != MatchState::kDone && !sequence.must_fit_whole;
    waiting_.SetTokens(&sequence,
                       is_new ? TokensOfChoice(request.prompt_len(), request.bypass_cache_match,
                                               sequence.key.choice)
                              : sequence.length() - sequence.num_done);
  }
}

// The cache manager may know another state of its blocks than we do.
bool Scheduler::Impl::HoldsUncertainBlocks(const Sequence& sequence) const {
  if (sequence.restored &&
      (sequence.restore_known_tag == 0 || last_answered_tag_ < sequence.restore_known_tag)) {
    return true;
  }
  // Of a duplicate, the other copy may be the target of such a restore.
  return HoldsDuplicates(sequence) ||
         std::any_of(sequence.blocks.begin(), sequence.blocks.end(),
                     [](const HeldBlock& held) { return held.uncertain; });
}

// REQUIRES: no plan in flight, blocks dropped. Running or waiting, it starts again from its tokens.
void Scheduler::Impl::Forget(Sequence* sequence) {
  const bool was_waiting = sequence->phase == Phase::kWaiting;
  const bool must_fit_whole = sequence->must_fit_whole || !was_waiting;
  if (was_waiting) {
    waiting_.Remove(sequence);
    SetMatch(sequence, MatchState::kNone);
  }
  Requeue(sequence);
  sequence->must_fit_whole = must_fit_whole;
}

HeldBlocks Scheduler::Impl::OnCacheResumed() {
  CHECK(ledger_.lost() && in_flight_.empty(), "num_plans_in_flight={}", in_flight_.size());
  std::vector<PoolBlock> leased;
  for (Sequence& sequence : sequences_) {
    if (HoldsUncertainBlocks(sequence)) {
      ledger_.Drop(&sequence.blocks);
      if (sequence.phase == Phase::kRunning) GiveUpSlot(&sequence);
      Forget(&sequence);
      continue;
    }
    // What was lost with the session is asked for again.
    if (sequence.phase == Phase::kWaiting && sequence.blocks.empty()) {
      SetMatch(&sequence, MatchState::kNone);
    }
    for (const HeldBlock& held : sequence.blocks) {
      if (held.leased) leased.push_back(held.block);
    }
    if (sequence.phase == Phase::kRunning) QueueCommit(&sequence);
  }
  std::erase_if(running_, [](const Sequence* sequence) {
    return sequence->leaving() || sequence->phase == Phase::kWaiting;
  });
  HeldBlocks held = ledger_.Resume(std::move(leased));
  CountWaitingTokensAgain();
  return held;
}

void Scheduler::Impl::OnPoolReplaced(int num_blocks) {
  CHECK(in_flight_.empty(), "num_plans_in_flight={}", in_flight_.size());
  OnCacheLost();  // with it everything that leaves has gone: nothing names it any more
  CHECK(num_leaving_ == 0, "num_leaving={}", num_leaving_);
  ledger_ = BlockLedger(num_blocks);
  config_.num_blocks = num_blocks;
  slots_to_release_.clear();
  running_.clear();
  for (int slot = 0; slot < config_.max_num_seqs; ++slot) free_slots_.insert(slot);
  std::vector<Sequence*> too_large;
  for (Sequence& sequence : sequences_) {
    if (sequence.phase == Phase::kRunning && sequence.request->tenant != nullptr) {
      waiting_.StopRunning(sequence.request->tenant);
    }
    sequence.blocks.clear();
    Forget(&sequence);
    if (BlocksFor(sequence.max_length() - 1) > num_blocks) too_large.push_back(&sequence);
  }
  CountWaitingTokensAgain();
  for (Sequence* sequence : too_large) {
    failed_.push_back(
        {sequence->key,
         absl::ResourceExhaustedError(fmt::format(
             "the request needs {} KV blocks, the pool that replaced the lost one has {}",
             BlocksFor(sequence->max_length() - 1), num_blocks))});
    End(sequence);
  }
}

}  // namespace wintserve
