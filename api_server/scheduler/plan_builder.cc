// What goes into the next plan.
#include <algorithm>
#include <utility>

#include "api_server/scheduler/scheduler_impl.h"

namespace wintserve {
namespace {

// Of a serialized plan, an upper bound: a number takes at most 5 bytes.
constexpr int64_t kMaxPlanBytes = 4 << 20;
constexpr int64_t kBytesPerNumber = 5;
constexpr int64_t kBytesPerRow = 140;  // with its SlotInit, but for what is as long as a sequence

constexpr int kMaxCopyOutsPerPlan = 16;  // they delay the rows

}  // namespace

int Scheduler::Impl::BlocksFor(int num_tokens) const {
  return (num_tokens + config_.block_size_tokens - 1) / config_.block_size_tokens;
}

bool Scheduler::Impl::IsLong(const Sequence& sequence) const {
  return config_.long_prefill_token_threshold > 0 &&
         sequence.num_remaining() > config_.long_prefill_token_threshold;
}

void Scheduler::Impl::BuildPlan(SchedulerOutput* output) {
  if (paused_ || num_plans_in_flight() > config_.async_depth) return;
  PlanDraft draft;
  draft.plan.step = last_step_ + 1;
  AddCopies(&draft);
  const bool prefill_only = !config_.chunked_prefill && NextStepIsPrefillOnly();
  if (!prefill_only) AddDecodes(&draft);
  draft.prefill_tokens_left = PrefillBudget(draft);
  AddRunningPrefills(&draft);
  Admit(&draft, output);
  if (prefill_only && draft.flight.rows.empty()) AddDecodes(&draft);
  last_step_was_prefill_only_ = draft.flight.work.num_decodes == 0 && !draft.flight.rows.empty();
  if (draft.lacks_blocks) RelieveMemory(draft);

  StepPlan& plan = draft.plan;
  plan.slot_release.insert(plan.slot_release.end(), slots_to_release_.begin(),
                           slots_to_release_.end());
  slots_to_release_.clear();
  if (plan.rows.empty() && plan.copies.empty() && plan.slot_release.empty()) return;
  free_slots_.insert(plan.slot_release.begin(), plan.slot_release.end());
  std::erase_if(running_,
                [](const Sequence* sequence) { return sequence->phase != Phase::kRunning; });
  last_step_ = plan.step;
  draft.flight.step = plan.step;
  in_flight_.push_back(std::move(draft.flight));
  output->plan = std::move(plan);
}

void Scheduler::Impl::AddCopies(PlanDraft* draft) {
  const auto add = [draft](const CopyOrder& order, Sequence* owner) {
    draft->plan.copies.push_back({.to_device = order.direction == CopyDirection::kToDevice,
                                  .block = BlockId{order.block.id},
                                  .host_slot = order.host_slot});
    draft->flight.copies.push_back({order, owner});
    ++draft->flight.work.num_copies;
  };
  for (const auto& [order, owner] : restores_) {
    add(order, owner);
    --owner->num_copies_to_plan;
    if (std::exchange(owner->last_copy_step, draft->plan.step) != draft->plan.step) {
      draft->flight.restored.push_back(owner);
    }
    owner->last_plan_step = draft->plan.step;
  }
  restores_.clear();
  for (int i = 0; i < kMaxCopyOutsPerPlan && !copy_outs_.empty(); ++i) {
    add(copy_outs_.front(), nullptr);
    copy_outs_.pop_front();
  }
}

// Its rows come no earlier than in the plan after that of the copies into its blocks. It runs
// already when they were lost with the rank group and had to be ordered again.
bool Scheduler::Impl::AwaitsCopies(const Sequence& sequence, const PlanDraft& draft) {
  return sequence.num_copies_to_plan > 0 || sequence.last_copy_step == draft.plan.step;
}

void Scheduler::Impl::AddDecodes(PlanDraft* draft) {
  draft->plan.rows.reserve(running_.size() + config_.max_partial_prefills);
  draft->flight.rows.reserve(running_.size() + config_.max_partial_prefills);
  for (Sequence* sequence : running_) {
    if (!sequence->decodes() || AwaitsCopies(*sequence, *draft)) continue;
    if (TokensWithBlocks(*sequence) == 0) {
      draft->lacks_blocks = true;
      continue;
    }
    // One that is resumed may have a long history to send; then it goes on with a later plan.
    if (!sequence->slot_initialised && !FitsMessage(*sequence, 1, *draft)) continue;
    AddRow(sequence, 1, draft);
  }
}

int Scheduler::Impl::PrefillBudget(const PlanDraft& draft) const {
  const int num_decodes = draft.flight.work.num_decodes;
  const int left = config_.max_num_batched_tokens - num_decodes;
  if (num_decodes == 0 || config_.max_step_slowdown <= 0) return left;
  const double floor = std::max(1, config_.max_num_batched_tokens / 8);
  const double measured = step_times_.PrefillTokensWithin(config_.max_step_slowdown, num_decodes);
  return static_cast<int>(std::min<double>(left, std::max(floor, measured)));
}

void Scheduler::Impl::AddRunningPrefills(PlanDraft* draft) {
  // Chunking off: a prompt is whole in its first row, so there are none but those whose row was
  // lost with the rank group. A long prompt takes all that is left, unless others could use it.
  const int num_prefills = static_cast<int>(
      std::count_if(running_.begin(), running_.end(),
                    [](const Sequence* sequence) { return !sequence->decodes(); }));
  const int num_next = std::min(waiting_.num_in_line(), static_cast<int>(free_slots_.size()));
  draft->shares_prefill = num_prefills + num_next > 1;
  if (num_prefills == 0) return;
  for (Sequence* sequence : running_) {
    // Its last plan may be this one: a decode row was added before.
    if (sequence->decodes() || sequence->phase != Phase::kRunning ||
        sequence->last_plan_step == draft->plan.step || AwaitsCopies(*sequence, *draft)) {
      continue;
    }
    const int wanted = ChunkOf(*sequence, *draft);
    int chunk = std::min(wanted, TokensWithBlocks(*sequence));
    if (chunk < wanted && chunk == 0) draft->lacks_blocks = true;
    if (chunk > 0 && !FitsMessage(*sequence, chunk, *draft)) chunk = 0;
    if (chunk < sequence->num_remaining()) {
      ++draft->num_partial;
      if (IsLong(*sequence)) ++draft->num_long_partial;
    }
    if (chunk > 0) AddRow(sequence, chunk, draft);
  }
}

// Tokens of its next row, were there blocks; 0: none in this plan.
int Scheduler::Impl::ChunkOf(const Sequence& sequence, const PlanDraft& draft) const {
  const int remaining = sequence.num_remaining();
  if (!config_.chunked_prefill) {
    // A prompt beyond the budget runs where nothing else does.
    const bool fits =
        draft.flight.rows.empty() || draft.num_tokens + remaining <= config_.max_num_batched_tokens;
    return fits ? remaining : 0;
  }
  const int chunk = std::min(remaining, draft.prefill_tokens_left);
  if (!draft.shares_prefill || !IsLong(sequence)) return chunk;
  return std::min(chunk, config_.long_prefill_token_threshold);
}

// How many more of its tokens have room in its blocks and the local lease.
int Scheduler::Impl::TokensWithBlocks(const Sequence& sequence) const {
  const int num_blocks = static_cast<int>(sequence.blocks.size()) + ledger_.num_leased_ahead();
  return num_blocks * config_.block_size_tokens - sequence.num_planned;
}

bool Scheduler::Impl::FitsMessage(const Sequence& sequence, int chunk,
                                  const PlanDraft& draft) const {
  if (draft.flight.rows.empty()) return true;
  int64_t numbers = chunk + BlocksFor(sequence.num_planned + chunk);
  if (!sequence.slot_initialised) numbers += sequence.num_init_numbers();
  return draft.num_bytes + kBytesPerRow + numbers * kBytesPerNumber <= kMaxPlanBytes;
}

void Scheduler::Impl::AddRow(Sequence* sequence, int chunk, PlanDraft* draft) {
  StepPlan& plan = draft->plan;
  const size_t num_blocks_before = sequence->blocks.size();
  const size_t num_blocks = BlocksFor(sequence->num_planned + chunk);
  while (sequence->blocks.size() < num_blocks) sequence->blocks.push_back(ledger_.Take());
  const auto ids_from = [sequence](size_t first) {
    std::vector<BlockId> ids;
    ids.reserve(sequence->blocks.size() - first);
    for (size_t i = first; i < sequence->blocks.size(); ++i) {
      ids.push_back(BlockId{sequence->blocks[i].block.id});
    }
    return ids;
  };
  if (!sequence->slot_initialised) {
    SlotInit init{.slot = sequence->slot, .sampling = sequence->request->sampling};
    init.sampling.choice_index = sequence->key.choice;
    init.block_table = ids_from(0);
    if (sequence->sends_prompt()) init.prompt_tokens = *sequence->request->prompt_ids;
    if (sequence->sends_generated()) init.generated_tokens = sequence->generated;
    draft->num_bytes +=
        (std::ssize(init.block_table) + sequence->num_init_numbers()) * kBytesPerNumber;
    plan.slot_init.push_back(std::move(init));
    sequence->slot_initialised = true;
  } else if (sequence->blocks.size() > num_blocks_before) {
    plan.block_append.push_back({.slot = sequence->slot, .blocks = ids_from(num_blocks_before)});
  }

  const bool decodes = sequence->decodes();
  const int begin = sequence->num_planned;
  const int end = begin + chunk;
  PlanRow& row = plan.rows.emplace_back();
  row.slot = sequence->slot;
  row.position = static_cast<uint32_t>(begin);
  row.length = static_cast<uint32_t>(chunk);
  row.sample = end == sequence->length_planned;
  if (!decodes || !sequence->token_in_slot) {
    row.tokens.reserve(chunk);
    sequence->AppendTokens(begin, end, &row.tokens);
    draft->prefill_tokens_left -= chunk;
    draft->num_bytes += chunk * kBytesPerNumber;
  }
  if (decodes) {
    ++draft->flight.work.num_decodes;
  } else {
    draft->flight.work.num_prefill_tokens += chunk;
  }
  PlannedRow& planned =
      draft->flight.rows.emplace_back(PlannedRow{sequence, sequence->slot, end, row.sample});
  if (sequence->lacks_prompt_logprobs()) AskForPromptLogprobs(*sequence, &row, &planned);
  draft->num_tokens += chunk;
  draft->num_bytes += kBytesPerRow;

  sequence->num_planned = end;
  sequence->last_plan_step = plan.step;
  if (!row.sample) return;
  sequence->token_in_slot = true;
  if (++sequence->length_planned < sequence->max_length()) return;
  // Known ahead: nothing follows, so the slot can be had again with the next plan.
  GiveUpSlot(sequence);
  sequence->phase = Phase::kLastTokenInFlight;
  ++num_leaving_;
}

// Of the prompt's tokens that follow those of the row.
void Scheduler::Impl::AskForPromptLogprobs(const Sequence& sequence, PlanRow* row,
                                           PlannedRow* planned) {
  const int begin = static_cast<int>(row->position);
  const int count = std::min(planned->end, sequence.prompt_len() - 1) - begin;
  if (count <= 0) return;
  row->prompt_logprobs = true;
  if (!row->sample) row->next_token = (*sequence.request->prompt_ids)[planned->end];
  planned->num_prompt_logprobs = count;
  planned->prompt_logprobs_from = begin + 1;
}

// Chunking off: the first prompt does not fit beside the decodes, and it is its turn.
bool Scheduler::Impl::NextStepIsPrefillOnly() const {
  if (last_step_was_prefill_only_) return false;
  const Sequence* prompt = NextWholePrompt();
  if (prompt == nullptr) return false;
  const int num_decodes =
      static_cast<int>(std::count_if(running_.begin(), running_.end(),
                                     [](const Sequence* sequence) { return sequence->decodes(); }));
  return num_decodes + prompt->num_remaining() > config_.max_num_batched_tokens;
}

const Sequence* Scheduler::Impl::NextWholePrompt() const {
  for (const Sequence* sequence : running_) {
    const bool ready = !sequence->decodes() && sequence->num_copies_to_plan == 0 &&
                       TokensWithBlocks(*sequence) >= sequence->num_remaining();
    if (ready) return sequence;
  }
  if (free_slots_.empty()) return nullptr;
  QueueWalk walk(waiting_);
  while (Sequence* sequence = walk.Next()) {
    if (!MayStartBesideIsolated(*sequence) || !MayStart(sequence) ||
        sequence->num_copies_to_plan > 0) {
      continue;
    }
    const bool ready = !NeedsMatch(*sequence) && !sequence->match_outdated &&
                       FitsMemory(*sequence, 0, true) &&
                       TokensWithBlocks(*sequence) >= sequence->num_remaining();
    return ready ? sequence : nullptr;
  }
  return nullptr;
}

}  // namespace wintserve
