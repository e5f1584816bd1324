#include "api_server/scheduler/scheduler.h"

#include <fmt/core.h>

#include <algorithm>
#include <utility>

#include "common/check.h"

namespace wintserve {
namespace {

void Remove(std::deque<Sequence*>* queue, Sequence* sequence) {
  queue->erase(std::remove(queue->begin(), queue->end(), sequence), queue->end());
}

PlanRow PrefillRow(const Sequence& sequence) {
  return {.slot = sequence.slot,
          .position = 0,
          .length = static_cast<uint32_t>(sequence.prompt_len()),
          .sample = true,
          .tokens = *sequence.prompt_ids};
}

PlanRow DecodeRow(const Sequence& sequence) {
  const int position = sequence.prompt_len() + sequence.num_sampled - 1;
  return {.slot = sequence.slot,
          .position = static_cast<uint32_t>(position),
          .length = 1,
          .sample = true,
          .tokens = {}};
}

SlotInit InitOf(const Sequence& sequence) {
  SlotInit init{.slot = sequence.slot, .sampling = sequence.sampling};
  init.block_table.reserve(sequence.blocks.size());
  for (const LeasedBlock& block : sequence.blocks) init.block_table.push_back(block.id);
  return init;
}

}  // namespace

Scheduler::Scheduler(const SchedulerConfig& config) : config_(config) {
  CHECK(config.max_num_seqs > 0 && config.max_num_batched_tokens >= config.max_num_seqs,
        "max_num_seqs={} max_num_batched_tokens={}", config.max_num_seqs,
        config.max_num_batched_tokens);
  for (int slot = 0; slot < config.max_num_seqs; ++slot) free_slots_.insert(slot);
}

absl::Status Scheduler::Submit(ScheduledRequest request) {
  CHECK(!request.prompt_ids.empty() && request.max_tokens > 0 && request.num_choices > 0,
        "prompt_len={} max_tokens={} num_choices={}", request.prompt_ids.size(), request.max_tokens,
        request.num_choices);
  const int prompt_len = static_cast<int>(request.prompt_ids.size());
  const int blocks_needed = BlocksNeeded(prompt_len + request.max_tokens - 1);
  if (blocks_needed > config_.num_blocks) {
    return absl::InvalidArgumentError(fmt::format(
        "the request needs {} KV blocks for {} prompt tokens and max_tokens {}, the pool has {}",
        blocks_needed, prompt_len, request.max_tokens, config_.num_blocks));
  }
  const auto prompt_ids =
      std::make_shared<const std::vector<int32_t>>(std::move(request.prompt_ids));
  for (int choice = 0; choice < request.num_choices; ++choice) {
    const SequenceKey key{request.id, static_cast<uint32_t>(choice)};
    const auto [entry, is_new] = sequences_.try_emplace(key);
    CHECK(is_new, "request {} was submitted twice", request.id);
    Sequence& sequence = entry->second;
    sequence.key = key;
    sequence.prompt_ids = prompt_ids;
    sequence.sampling = request.sampling;
    sequence.sampling.choice_index = key.choice;
    sequence.max_tokens = request.max_tokens;
    waiting_.push_back(&sequence);
  }
  return absl::OkStatus();
}

void Scheduler::Cancel(uint64_t request_id) {
  for (auto it = sequences_.lower_bound({request_id, 0});
       it != sequences_.end() && it->first.request == request_id;) {
    Sequence* sequence = &(it++)->second;  // Finish may erase it
    Finish(sequence);
  }
}

void Scheduler::Cancel(const SequenceKey& key) {
  if (const auto found = sequences_.find(key); found != sequences_.end()) Finish(&found->second);
}

// Takes the sequence out of every queue. Returns false while a plan in flight keeps it alive.
bool Scheduler::Finish(Sequence* sequence) {
  switch (sequence->state) {
    case SequenceState::kWaiting:
      Remove(&waiting_, sequence);
      break;
    case SequenceState::kPrefill:
      Remove(&prefills_, sequence);
      break;
    case SequenceState::kDecode:
      std::erase(decodes_, sequence);
      break;
    case SequenceState::kFinished:
      return false;
  }
  const bool owns_slot = sequence->state != SequenceState::kWaiting;
  sequence->state = SequenceState::kFinished;
  if (owns_slot && !sequence->slot_initialised) free_slots_.insert(sequence->slot);
  if (owns_slot && sequence->slot_initialised) slots_to_release_.push_back(sequence->slot);
  if (sequence->in_flight) return false;
  Retire(sequence);
  return true;
}

// REQUIRES: finished, and no plan in flight mentions its blocks.
void Scheduler::Retire(Sequence* sequence) {
  CHECK(sequence->state == SequenceState::kFinished && !sequence->in_flight);
  num_blocks_held_ -= static_cast<int>(sequence->blocks.size());
  ReturnBlocks(std::move(sequence->blocks));
  sequences_.erase(sequence->key);
}

void Scheduler::ReturnBlocks(std::vector<LeasedBlock> blocks) {
  if (blocks.empty()) return;
  blocks_to_return_.insert(blocks_to_return_.end(), blocks.begin(), blocks.end());
  lease_refused_ = false;
  if (lease_.has_value()) lease_->blocks_returned_since = true;
}

void Scheduler::OnBlocksLeased(uint64_t tag, std::vector<LeasedBlock> blocks) {
  if (!lease_.has_value() || lease_->tag != tag) return ReturnBlocks(std::move(blocks));
  const bool stale_refusal = lease_->blocks_returned_since;
  lease_.reset();
  // Only the head is ever asked for, but it may have been cancelled since.
  Sequence* head = waiting_.empty() ? nullptr : waiting_.front();
  if (blocks.empty()) {
    lease_refused_ = !stale_refusal;
    // All blocks that are not free would be ours, so there is none whose return could be waited
    // for.
    if (lease_refused_ && num_blocks_held_ == 0 && head != nullptr) {
      failed_.push_back(head->key);
      Finish(head);
      lease_refused_ = false;
    }
    return;
  }
  const int num_blocks = static_cast<int>(blocks.size());
  if (head == nullptr || num_blocks != BlocksNeeded(head->max_computed_tokens())) {
    return ReturnBlocks(std::move(blocks));  // meant for a head that is gone
  }
  waiting_.pop_front();
  head->blocks = std::move(blocks);
  num_blocks_held_ += num_blocks;
  head->slot = *free_slots_.begin();
  free_slots_.erase(free_slots_.begin());
  head->state = SequenceState::kPrefill;
  prefills_.push_back(head);
}

absl::StatusOr<std::vector<SequenceToken>> Scheduler::OnStepDone(
    uint64_t step, const std::vector<SampledToken>& sampled) {
  if (!in_flight_.has_value() || in_flight_->step != step) {
    return absl::InternalError(fmt::format("step {} is reported done, in flight is {}", step,
                                           in_flight_.has_value() ? in_flight_->step : 0));
  }
  const InFlight done = *std::exchange(in_flight_, std::nullopt);
  if (sampled.size() != done.rows.size()) {
    return absl::InternalError(fmt::format("step {} sampled {} tokens, its plan asks for {}", step,
                                           sampled.size(), done.rows.size()));
  }
  free_slots_.insert(done.slot_release.begin(), done.slot_release.end());
  std::vector<SequenceToken> tokens;
  tokens.reserve(sampled.size());
  for (size_t i = 0; i < sampled.size(); ++i) {
    Sequence* sequence = done.rows[i];
    const int32_t token = sampled[i].token;
    if (sampled[i].slot != sequence->slot || token < 0 || token >= config_.vocab_size) {
      return absl::InternalError(
          fmt::format("step {} sampled token {} in slot {}, expected one below {} in slot {}", step,
                      token, sampled[i].slot, config_.vocab_size, sequence->slot));
    }
    sequence->in_flight = false;
    if (sequence->state == SequenceState::kFinished) {  // cancelled meanwhile
      Retire(sequence);
      continue;
    }
    if (sequence->state == SequenceState::kPrefill) {
      sequence->state = SequenceState::kDecode;
      decodes_.push_back(sequence);
    }
    ++sequence->num_sampled;
    SequenceToken& news = tokens.emplace_back(SequenceToken{sequence->key, token, std::nullopt});
    const auto& eos_ids = config_.eos_ids;
    // In this order: a stop token on the last place is a stop.
    if (std::find(eos_ids.begin(), eos_ids.end(), token) != eos_ids.end()) {
      news.end = SequenceEnd::kStop;
    } else if (sequence->num_sampled == sequence->max_tokens) {
      news.end = SequenceEnd::kLength;
    }
    if (news.end.has_value()) Finish(sequence);
  }
  return tokens;
}

SchedulerOutput Scheduler::Schedule() {
  SchedulerOutput output;
  RequestLease(&output);
  output.return_blocks = std::exchange(blocks_to_return_, {});
  output.failed = std::exchange(failed_, {});
  const bool idle = decodes_.empty() && prefills_.empty() && slots_to_release_.empty();
  if (in_flight_.has_value() || idle) return output;

  StepPlan plan;
  plan.step = ++last_step_;
  in_flight_ = InFlight{.step = plan.step, .rows = {}, .slot_release = {}};
  const bool prefill_only = NextStepIsPrefillOnly();
  if (!prefill_only) AddDecodes(&plan);
  AddPrefills(config_.max_num_batched_tokens, &plan, &output.started);
  last_step_was_prefill_only_ = prefill_only;
  plan.slot_release = std::exchange(slots_to_release_, {});
  in_flight_->slot_release = plan.slot_release;
  output.plan = std::move(plan);
  return output;
}

void Scheduler::RequestLease(SchedulerOutput* output) {
  if (lease_.has_value() || lease_refused_ || waiting_.empty() || free_slots_.empty()) return;
  lease_ = Lease{.tag = next_lease_tag_++};
  const int num_blocks = BlocksNeeded(waiting_.front()->max_computed_tokens());
  output->lease = BlockLeaseRequest{lease_->tag, static_cast<uint32_t>(num_blocks)};
}

bool Scheduler::NextStepIsPrefillOnly() const {
  if (prefills_.empty()) return false;
  if (decodes_.empty()) return true;
  const int rows = static_cast<int>(decodes_.size()) + prefills_.front()->prompt_len();
  return rows > config_.max_num_batched_tokens && !last_step_was_prefill_only_;
}

void Scheduler::AddDecodes(StepPlan* plan) {
  for (Sequence* sequence : decodes_) {
    plan->rows.push_back(DecodeRow(*sequence));
    sequence->in_flight = true;
    in_flight_->rows.push_back(sequence);
  }
}

void Scheduler::AddPrefills(int budget, StepPlan* plan, std::vector<SequenceKey>* started) {
  int num_rows = static_cast<int>(plan->rows.size());
  while (!prefills_.empty()) {
    Sequence* sequence = prefills_.front();
    // A prompt beyond the budget runs where nothing else does.
    if (num_rows > 0 && num_rows + sequence->prompt_len() > budget) return;
    prefills_.pop_front();
    plan->slot_init.push_back(InitOf(*sequence));
    plan->rows.push_back(PrefillRow(*sequence));
    sequence->slot_initialised = true;
    sequence->in_flight = true;
    in_flight_->rows.push_back(sequence);
    started->push_back(sequence->key);
    num_rows += sequence->prompt_len();
  }
}

int Scheduler::BlocksNeeded(int num_tokens) const {
  return (num_tokens + config_.block_size_tokens - 1) / config_.block_size_tokens;
}

SchedulerStats Scheduler::stats() const {
  return {.num_running = static_cast<int>(sequences_.size() - waiting_.size()),
          .num_waiting = static_cast<int>(waiting_.size()),
          .num_blocks_held = num_blocks_held_};
}

}  // namespace wintserve
