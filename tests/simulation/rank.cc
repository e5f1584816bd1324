#include "tests/simulation/rank.h"

#include <algorithm>
#include <set>

namespace wintserve::simulation {
namespace {

// Of everything that a plan says.
uint64_t DigestOf(const StepPlan& plan) {
  uint64_t digest = MixBits(plan.step, plan.pool_epoch);
  const auto add = [&digest](int64_t value) {
    digest = MixBits(digest, static_cast<uint64_t>(value));
  };
  const auto add_blocks = [&add](const std::vector<BlockId>& blocks) {
    add(static_cast<int64_t>(blocks.size()));
    for (const BlockId block : blocks) add(static_cast<int64_t>(block));
  };
  for (const SlotInit& init : plan.slot_init) {
    add(init.slot);
    add(init.sampling.seed);
    add(init.sampling.choice_index);
    add_blocks(init.block_table);
    for (const int32_t token : init.prompt_tokens) add(token);
    for (const int32_t token : init.generated_tokens) add(token);
  }
  for (const BlockAppend& append : plan.block_append) {
    add(append.slot);
    add_blocks(append.blocks);
  }
  for (const PlanRow& row : plan.rows) {
    add(row.slot);
    add(row.position);
    add(row.length);
    add(row.sample ? 1 : 0);
    for (const int32_t token : row.tokens) add(token);
  }
  for (const uint32_t slot : plan.slot_release) add(slot);
  for (const BlockCopy& copy : plan.copies) {
    add(copy.to_device ? 1 : 0);
    add(static_cast<int64_t>(copy.block));
    add(copy.host_slot);
  }
  return digest;
}

}  // namespace

SimulatedRank::SimulatedRank(const SimulationConfig& config, int rank, const References* references,
                             Report* report)
    : config_(config),
      rank_(rank),
      references_(*references),
      report_(*report),
      block_size_(static_cast<uint32_t>(config.scheduler.block_size_tokens)) {}

RankMemory::RankMemory(const SimulationConfig& config, uint64_t pool_epoch, int num_blocks) {
  const Block garbage(static_cast<size_t>(config.scheduler.block_size_tokens),
                      Cell{.history = MixBits(pool_epoch, 77)});
  blocks.assign(static_cast<size_t>(num_blocks), garbage);
  host_slots.assign(static_cast<size_t>(config.num_host_slots), garbage);
}

void RankMemory::SpoilSince(uint64_t first_step) {
  for (std::vector<Block>* tier : {&blocks, &host_slots}) {
    for (Block& block : *tier) {
      for (Cell& cell : block) {
        if (cell.step >= first_step) cell.history = MixBits(cell.history, 99);
      }
    }
  }
}

void SimulatedRank::AttachPool(uint64_t pool_epoch, RankMemory* memory) {
  pool_epoch_ = pool_epoch;
  memory_ = memory;
  slots_.assign(static_cast<size_t>(config_.scheduler.max_num_seqs), Slot{});
}

void SimulatedRank::JoinGroup() {
  slots_.assign(static_cast<size_t>(config_.scheduler.max_num_seqs), Slot{});
  last_step_.reset();
  plan_digest_ = 0;
}

RankResult SimulatedRank::Execute(const StepPlan& plan) {
  RankResult result;
  if (last_step_.has_value() && plan.step != *last_step_ + 1) {
    report_.Violation("I6", "rank {}: step {} comes after step {}", rank_, plan.step, *last_step_);
  }
  if (plan.pool_epoch != pool_epoch_) {
    report_.Violation("I3", "rank {}: step {} names pool {}, mapped is pool {}", rank_, plan.step,
                      plan.pool_epoch, pool_epoch_);
  }
  last_step_ = last_executed_ = plan.step;
  for (const BlockCopy& copy : plan.copies) RunCopy(copy, plan.step);
  for (const SlotInit& init : plan.slot_init) Init(init);
  for (const BlockAppend& append : plan.block_append) {
    if (InUse("block_append", append.slot)) Append(append.slot, append.blocks);
  }
  std::set<uint32_t> named;
  uint64_t num_tokens = 0;
  for (const PlanRow& row : plan.rows) {
    if (!named.insert(row.slot).second) {
      report_.Violation("plan", "step {}: two rows of slot {}", plan.step, row.slot);
    }
    num_tokens += row.length;
    if (CheckRow(row)) RunRow(row, plan.step, &result);
  }
  const auto max_tokens = static_cast<uint64_t>(config_.scheduler.max_num_batched_tokens);
  if (num_tokens > max_tokens) {
    report_.Violation("plan", "step {} has {} tokens, allowed are {}", plan.step, num_tokens,
                      max_tokens);
  }
  for (const uint32_t slot : plan.slot_release) Release(slot);
  plan_digest_ = MixBits(plan_digest_, DigestOf(plan));
  result.plan_digest = plan_digest_;
  return result;
}

void SimulatedRank::Scribble(const StepPlan& plan) {
  const auto spoil = [&plan](Cell* cell) {
    *cell = Cell{.history = MixBits(plan.step, 98), .step = plan.step};
  };
  for (const BlockCopy& copy : plan.copies) {
    Block& target = copy.to_device ? memory_->blocks[static_cast<size_t>(copy.block)]
                                   : memory_->host_slots[copy.host_slot];
    for (Cell& cell : target) spoil(&cell);
  }
  for (const SlotInit& init : plan.slot_init) Init(init);
  for (const BlockAppend& append : plan.block_append) {
    if (InUse("block_append", append.slot)) Append(append.slot, append.blocks);
  }
  for (const PlanRow& row : plan.rows) {
    if (!InUse("row", row.slot)) continue;
    for (uint32_t i = 0; i < row.length; ++i) spoil(&CellAt(slots_[row.slot], row.position + i));
  }
}

void SimulatedRank::RunCopy(const BlockCopy& copy, uint64_t step) {
  const auto block = static_cast<size_t>(copy.block);
  if (block >= memory_->blocks.size() || copy.host_slot >= memory_->host_slots.size()) {
    report_.Violation("plan", "a copy between block {} and host slot {}; there are {} and {}",
                      block, copy.host_slot, memory_->blocks.size(), memory_->host_slots.size());
    return;
  }
  Block& on_device = memory_->blocks[block];
  Block& on_host = memory_->host_slots[copy.host_slot];
  Block& target = copy.to_device ? on_device : on_host;
  target = copy.to_device ? on_host : on_device;
  for (Cell& cell : target) cell.step = step;
}

void SimulatedRank::Init(const SlotInit& init) {
  if (init.slot >= slots_.size()) {
    report_.Violation("plan", "slot_init: slot {} is not in 0 … {}", init.slot, slots_.size() - 1);
    return;
  }
  Slot& slot = slots_[init.slot];
  if (slot.in_use) {
    report_.Violation("plan", "slot_init: slot {} was not released", init.slot);
    return;
  }
  slot.in_use = true;
  slot.sampling = init.sampling;
  slot.sequence = references_.Find(init.sampling);
  if (slot.sequence == nullptr) {
    report_.Violation("plan", "slot_init: slot {} is of no sequence: seed {}, choice {}", init.slot,
                      init.sampling.seed, init.sampling.choice_index);
    return;
  }
  const SamplingParams& wanted = slot.sequence->sampling;
  if (init.sampling.temperature != wanted.temperature || init.sampling.top_p != wanted.top_p ||
      init.sampling.top_k != wanted.top_k ||
      init.sampling.repetition_penalty != wanted.repetition_penalty ||
      init.sampling.frequency_penalty != wanted.frequency_penalty ||
      init.sampling.num_prompt_top_logprobs != wanted.num_prompt_top_logprobs ||
      init.sampling.first_stop_position != wanted.first_stop_position) {
    report_.Violation("I7",
                      "slot_init: slot {} samples unlike the request {} (stop ids from {}, "
                      "asked from {})",
                      init.slot, slot.sequence->key.request, init.sampling.first_stop_position,
                      wanted.first_stop_position);
  }
  InitCounts(init, &slot);
  Append(init.slot, init.block_table);
}

void SimulatedRank::InitCounts(const SlotInit& init, Slot* slot) {
  const ReferenceSequence& sequence = *slot->sequence;
  const size_t num_prompt = init.sampling.repetition_penalty != 1 ? sequence.prompt_len : 0;
  const size_t num_generated = init.generated_tokens.size();
  const auto generated = sequence.tokens.begin() + static_cast<ptrdiff_t>(sequence.prompt_len);
  const bool is_right =
      sequence.prompt_len + num_generated <= sequence.tokens.size() &&
      std::equal(init.prompt_tokens.begin(), init.prompt_tokens.end(), sequence.tokens.begin(),
                 sequence.tokens.begin() + static_cast<ptrdiff_t>(num_prompt)) &&
      std::equal(init.generated_tokens.begin(), init.generated_tokens.end(), generated);
  if (!is_right) {
    report_.Violation("I7", "slot_init: slot {} counts other tokens than the sequence {}.{} has",
                      init.slot, sequence.key.request, sequence.key.choice);
  }
  slot->num_counted = sequence.prompt_len + num_generated;
}

void SimulatedRank::Append(uint32_t index, const std::vector<BlockId>& blocks) {
  std::vector<int32_t>& table = slots_[index].table;
  for (const BlockId block : blocks) {
    const auto id = static_cast<int32_t>(block);
    if (id < 0 || static_cast<size_t>(id) >= memory_->blocks.size()) {
      report_.Violation("plan", "slot {}: block {} is not in 0 … {}", index, id,
                        memory_->blocks.size() - 1);
      return;
    }
    table.push_back(id);
  }
  const uint32_t max_tokens = static_cast<uint32_t>(config_.max_sequence_tokens);
  if (table.size() > (max_tokens + block_size_ - 1) / block_size_) {
    report_.Violation("plan", "slot {}: a table of {} blocks, sequences have at most {} tokens",
                      index, table.size(), max_tokens);
  }
}

bool SimulatedRank::InUse(const char* where, uint32_t slot) const {
  if (slot < slots_.size() && slots_[slot].in_use) return true;
  report_.Violation("plan", "{}: slot {} is not in use", where, slot);
  return false;
}

bool SimulatedRank::CheckRow(const PlanRow& row) const {
  if (!InUse("row", row.slot)) return false;
  const Slot& slot = slots_[row.slot];
  if (slot.sequence == nullptr) return false;
  const auto fail = [&](const auto& text) {
    report_.Violation("plan", "slot {}, row of {} at position {}: {}", row.slot, row.length,
                      row.position, text);
    return false;
  };
  if (row.length == 0) return fail("no tokens");
  if (slot.next_position.has_value() && row.position != *slot.next_position) {
    return fail(fmt::format("the sequence is at {}", *slot.next_position));
  }
  const size_t end = size_t{row.position} + row.length;
  if (end > slot.table.size() * block_size_) {
    return fail(fmt::format("its block table covers {}", slot.table.size() * block_size_));
  }
  if (end >= slot.sequence->tokens.size() + 1) {
    return fail(
        fmt::format("the sequence never has more than {} tokens", slot.sequence->tokens.size()));
  }
  if (row.tokens.empty()) {
    if (row.length != 1) return fail("only one token can come from the slot");
    if (!slot.last_token.has_value()) return fail("no token was sampled there");
  } else if (row.tokens.size() != row.length) {
    return fail(fmt::format("{} ids", row.tokens.size()));
  }
  return CheckMemory(slot, row.position);
}

bool SimulatedRank::CheckMemory(const Slot& slot, uint32_t position) const {
  const ReferenceSequence& sequence = *slot.sequence;
  for (uint32_t i = 0; i < position; ++i) {
    const Cell& cell = CellAt(slot, i);
    if (cell.position == i && cell.history == sequence.history[i]) continue;
    report_.Violation("I4",
                      "rank {}, sequence {}.{} at position {}: block {} holds token {} of "
                      "position {} where the sequence has token {} at position {}{}",
                      rank_, sequence.key.request, sequence.key.choice, position,
                      slot.table[i / block_size_], cell.token, cell.position, sequence.tokens[i], i,
                      cell.token == sequence.tokens[i] ? " (after another history)" : "");
    return false;
  }
  return true;
}

// The tokens that follow are the prompt's own.
void SimulatedRank::CheckPromptRow(const PlanRow& row) const {
  const ReferenceSequence& sequence = *slots_[row.slot].sequence;
  const size_t end = size_t{row.position} + row.length;
  if (sequence.sampling.num_prompt_top_logprobs >= 0 && row.num_prompt_logprobs() > 0 &&
      row.position + row.num_prompt_logprobs() < sequence.prompt_len &&
      (row.sample || row.next_token == sequence.tokens[end])) {
    return;
  }
  report_.Violation(
      "I7",
      "rank {}, sequence {}.{}: a row of {} at position {} asks for log-probabilities "
      "of {} tokens of its prompt of {}, the next one {}",
      rank_, sequence.key.request, sequence.key.choice, row.length, row.position,
      row.num_prompt_logprobs(), sequence.prompt_len, row.next_token);
}

PromptRowLogprobs SimulatedRank::ReadPromptLogprobs(const PlanRow& row) const {
  PromptRowLogprobs read{.slot = row.slot, .position = row.position + 1};
  for (uint32_t i = 1; i <= row.num_prompt_logprobs(); ++i) {
    const Cell& cell = CellAt(slots_[row.slot], row.position + i - 1);
    read.tokens.push_back(
        Model::LogprobsOf(cell.history, i < row.length ? row.tokens[i] : row.next_token));
  }
  return read;
}

void SimulatedRank::RunRow(const PlanRow& row, uint64_t step, RankResult* result) {
  Slot& slot = slots_[row.slot];
  uint64_t history = row.position == 0 ? kEmptyHistory : CellAt(slot, row.position - 1).history;
  for (uint32_t i = 0; i < row.length; ++i) {
    const uint32_t position = row.position + i;
    const int32_t token = row.tokens.empty() ? *slot.last_token : row.tokens[i];
    if (token != slot.sequence->tokens[position]) {
      report_.Violation("I7", "rank {}, sequence {}.{}: token {} at position {}, it should be {}",
                        rank_, slot.sequence->key.request, slot.sequence->key.choice, token,
                        position, slot.sequence->tokens[position]);
    }
    history = ExtendHistory(history, token);
    CellAt(slot, position) =
        Cell{.position = position, .token = token, .history = history, .step = step};
  }
  if (row.prompt_logprobs) {
    CheckPromptRow(row);
    result->prompt_logprobs.push_back(ReadPromptLogprobs(row));
  }
  slot.next_position = row.position + row.length;
  slot.last_token.reset();
  if (row.sample) {
    if (slot.sampling.has_penalties() && slot.num_counted++ != *slot.next_position) {
      report_.Violation("I7", "rank {}, sequence {}.{}: penalties count {} tokens at position {}",
                        rank_, slot.sequence->key.request, slot.sequence->key.choice,
                        slot.num_counted - 1, *slot.next_position);
    }
    const int32_t token = references_.model().Sample(slot.sampling, *slot.next_position, history);
    slot.last_token = token;
    result->sampled.push_back({.slot = row.slot, .token = token});
    result->sampled_digest = MixBits(result->sampled_digest, static_cast<uint64_t>(token));
  }
}

void SimulatedRank::Release(uint32_t slot) {
  if (InUse("slot_release", slot)) slots_[slot] = Slot{};
}

SimulatedRank::Cell& SimulatedRank::CellAt(const Slot& slot, uint32_t position) {
  const auto block = static_cast<size_t>(slot.table[position / block_size_]);
  return memory_->blocks[block][position % block_size_];
}

const SimulatedRank::Cell& SimulatedRank::CellAt(const Slot& slot, uint32_t position) const {
  const auto block = static_cast<size_t>(slot.table[position / block_size_]);
  return memory_->blocks[block][position % block_size_];
}

}  // namespace wintserve::simulation
