#include "engine_worker/runner/slot_table.h"

#include <fmt/format.h>

#include <cmath>

#include "common/check.h"
#include "common/status_macros.h"
#include "kernels/sampling/sampling_types.h"

namespace wintserve {
namespace {

template <typename... Args>
absl::Status Invalid(fmt::format_string<Args...> format, Args&&... args) {
  return absl::InvalidArgumentError(fmt::format(format, std::forward<Args>(args)...));
}

using kernels::sampling::kMaxAbsLogitBias;
using kernels::sampling::kMaxAbsPenalty;
using kernels::sampling::kMaxLogitBiases;
using kernels::sampling::kMaxTopLogprobs;

// Written so that NaN fails, too.
absl::Status CheckPenalty(uint32_t slot, const char* name, float penalty) {
  if (std::fabs(penalty) <= kMaxAbsPenalty) return absl::OkStatus();
  return Invalid("slot {}: {} {} is not in [{}, {}]", slot, name, penalty, -kMaxAbsPenalty,
                 kMaxAbsPenalty);
}

absl::Status CheckSampling(uint32_t slot, const SamplingParams& sampling) {
  if (!(sampling.temperature >= 0 && std::isfinite(sampling.temperature))) {
    return Invalid("slot {}: temperature {} is not a finite number >= 0", slot,
                   sampling.temperature);
  }
  if (!(sampling.top_p > 0 && sampling.top_p <= 1)) {
    return Invalid("slot {}: top_p {} is not in (0, 1]", slot, sampling.top_p);
  }
  if (sampling.top_k < 0) return Invalid("slot {}: top_k {} is negative", slot, sampling.top_k);
  if (!(sampling.min_p >= 0 && sampling.min_p <= 1)) {
    return Invalid("slot {}: min_p {} is not in [0, 1]", slot, sampling.min_p);
  }
  if (!(sampling.repetition_penalty > 0 && std::isfinite(sampling.repetition_penalty))) {
    return Invalid("slot {}: repetition_penalty {} is not a finite number > 0", slot,
                   sampling.repetition_penalty);
  }
  RETURN_IF_ERROR(CheckPenalty(slot, "presence_penalty", sampling.presence_penalty));
  RETURN_IF_ERROR(CheckPenalty(slot, "frequency_penalty", sampling.frequency_penalty));
  for (const int32_t count : {sampling.num_top_logprobs, sampling.num_prompt_top_logprobs}) {
    if (count >= -1 && count <= kMaxTopLogprobs) continue;
    return Invalid("slot {}: {} top log-probabilities, allowed are 0 … {}", slot, count,
                   kMaxTopLogprobs);
  }
  return absl::OkStatus();
}

}  // namespace

SlotTable::SlotTable(const SlotLimits& limits)
    : limits_(limits),
      slots_(limits.max_slots),
      row_step_(limits.max_slots, 0),
      release_step_(limits.max_slots, 0) {
  CHECK(limits.block_size_tokens > 0);
}

absl::Status SlotTable::BeginStep(const StepPlan& plan) {
  ++step_;
  for (const SlotInit& init : plan.slot_init) RETURN_IF_ERROR(Init(init));
  for (const BlockAppend& append : plan.block_append) {
    RETURN_IF_ERROR(CheckInUse("block_append", append.slot));
    RETURN_IF_ERROR(Append(append.slot, append.blocks));
  }
  uint64_t num_tokens = 0;
  for (const PlanRow& row : plan.rows) {
    RETURN_IF_ERROR(CheckInUse("row", row.slot));
    RETURN_IF_ERROR(NameOnce("rows", row.slot, &row_step_));
    RETURN_IF_ERROR(CheckRow(row));
    num_tokens += row.length;
  }
  if (num_tokens > limits_.max_tokens) {
    return Invalid("the plan has {} tokens, allowed are {}", num_tokens, limits_.max_tokens);
  }
  for (const uint32_t slot : plan.slot_release) {
    RETURN_IF_ERROR(CheckInUse("slot_release", slot));
    RETURN_IF_ERROR(NameOnce("slot_release", slot, &release_step_));
  }
  return absl::OkStatus();
}

void SlotTable::FinishStep(const StepPlan& plan) {
  for (const PlanRow& row : plan.rows) {
    Slot& slot = slots_[row.slot];
    slot.next_position = row.position + row.length;
    slot.has_token = row.sample;
  }
  for (const uint32_t index : plan.slot_release) {
    Slot& slot = slots_[index];
    slot.in_use = false;
    slot.block_table.clear();
    slot.next_position.reset();
    slot.has_token = false;
  }
}

absl::Status SlotTable::Init(const SlotInit& init) {
  if (init.slot >= limits_.max_slots) {
    return Invalid("slot_init: slot {} is not in 0 … {}", init.slot, limits_.max_slots - 1);
  }
  Slot& slot = slots_[init.slot];
  if (slot.in_use) return Invalid("slot_init: slot {} was not released", init.slot);
  RETURN_IF_ERROR(CheckSampling(init.slot, init.sampling));
  RETURN_IF_ERROR(CheckBiases(init.slot, init.sampling));
  RETURN_IF_ERROR(CheckHistory(init));
  slot.in_use = true;
  slot.sampling = init.sampling;
  return Append(init.slot, init.block_table);
}

absl::Status SlotTable::CheckBiases(uint32_t slot, const SamplingParams& sampling) const {
  const std::vector<TokenBias>& biases = sampling.logit_biases;
  if (biases.size() > kMaxLogitBiases) {
    return Invalid("slot {}: {} logit biases, allowed are {}", slot, biases.size(),
                   kMaxLogitBiases);
  }
  for (size_t i = 0; i < biases.size(); ++i) {
    const auto [token, bias] = biases[i];
    if (token < 0 || token >= limits_.vocab_size) {
      return Invalid("slot {}: a bias of token {}, which is not in 0 … {}", slot, token,
                     limits_.vocab_size - 1);
    }
    if (i > 0 && token <= biases[i - 1].token) {
      return Invalid("slot {}: a bias of token {} after one of {}", slot, token,
                     biases[i - 1].token);
    }
    if (!(std::fabs(bias) <= kMaxAbsLogitBias) && bias != TokenBias::kBanned) {
      return Invalid("slot {}: the bias {} of token {} is not in [{}, {}]", slot, bias, token,
                     -kMaxAbsLogitBias, kMaxAbsLogitBias);
    }
  }
  return absl::OkStatus();
}

absl::Status SlotTable::CheckHistory(const SlotInit& init) const {
  const size_t length = init.prompt_tokens.size() + init.generated_tokens.size();
  if (length > limits_.max_sequence_tokens) {
    return Invalid("slot {}: a history of {} tokens, sequences have at most {}", init.slot, length,
                   limits_.max_sequence_tokens);
  }
  for (const auto* const tokens : {&init.prompt_tokens, &init.generated_tokens}) {
    for (const int32_t token : *tokens) {
      if (token >= 0 && token < limits_.vocab_size) continue;
      return Invalid("slot {}: token {} of its history is not in 0 … {}", init.slot, token,
                     limits_.vocab_size - 1);
    }
  }
  return absl::OkStatus();
}

absl::Status SlotTable::Append(uint32_t index, const std::vector<BlockId>& blocks) {
  std::vector<int32_t>& table = slots_[index].block_table;
  const uint32_t max_blocks =
      (limits_.max_sequence_tokens + limits_.block_size_tokens - 1) / limits_.block_size_tokens;
  if (table.size() + blocks.size() > max_blocks) {
    return Invalid("slot {}: a block table of {} blocks, {} tokens need at most {}", index,
                   table.size() + blocks.size(), limits_.max_sequence_tokens, max_blocks);
  }
  for (const BlockId block : blocks) {
    const auto id = static_cast<int32_t>(block);
    if (id < 0 || static_cast<uint32_t>(id) >= limits_.num_blocks) {
      return Invalid("slot {}: block {} is not in 0 … {}", index, id,
                     int64_t{limits_.num_blocks} - 1);
    }
    table.push_back(id);
  }
  return absl::OkStatus();
}

absl::Status SlotTable::CheckRow(const PlanRow& row) const {
  const Slot& slot = slots_[row.slot];
  if (row.length == 0) return Invalid("slot {}: a row without tokens", row.slot);
  if (slot.next_position.has_value() && row.position != *slot.next_position) {
    return Invalid("slot {}: a row at position {}, the sequence is at {}", row.slot, row.position,
                   *slot.next_position);
  }
  const uint64_t end = uint64_t{row.position} + row.length;
  if (end > limits_.max_sequence_tokens) {
    return Invalid("slot {}: a row up to position {}, sequences have at most {} tokens", row.slot,
                   end, limits_.max_sequence_tokens);
  }
  const uint64_t covered = uint64_t{slot.block_table.size()} * limits_.block_size_tokens;
  if (end > covered) {
    return Invalid("slot {}: a row up to position {}, its block table covers {}", row.slot, end,
                   covered);
  }
  RETURN_IF_ERROR(CheckTokens(row));
  return row.prompt_logprobs ? CheckPromptLogprobs(row) : absl::OkStatus();
}

absl::Status SlotTable::CheckPromptLogprobs(const PlanRow& row) const {
  if (slots_[row.slot].sampling.num_prompt_top_logprobs < 0) {
    return Invalid("slot {}: a row asks for log-probabilities of its prompt, the slot for none",
                   row.slot);
  }
  if (row.tokens.empty() || row.num_prompt_logprobs() == 0) {
    return Invalid(
        "slot {}: a row asks for log-probabilities, but it brings no token of a prompt "
        "that follows another one",
        row.slot);
  }
  if (!row.sample && (row.next_token < 0 || row.next_token >= limits_.vocab_size)) {
    return Invalid("slot {}: the next token {} is not in 0 … {}", row.slot, row.next_token,
                   limits_.vocab_size - 1);
  }
  return absl::OkStatus();
}

absl::Status SlotTable::CheckTokens(const PlanRow& row) const {
  if (row.tokens.empty()) {
    if (row.length != 1) {
      return Invalid("slot {}: a row of {} tokens without any id; only one can come from the slot",
                     row.slot, row.length);
    }
    if (!slots_[row.slot].has_token) {
      return Invalid("slot {}: no token was sampled there that a row could take up", row.slot);
    }
    return absl::OkStatus();
  }
  if (row.tokens.size() != row.length) {
    return Invalid("slot {}: a row of {} tokens with {} ids", row.slot, row.length,
                   row.tokens.size());
  }
  for (const int32_t token : row.tokens) {
    if (token < 0 || token >= limits_.vocab_size) {
      return Invalid("slot {}: token {} is not in 0 … {}", row.slot, token, limits_.vocab_size - 1);
    }
  }
  return absl::OkStatus();
}

absl::Status SlotTable::CheckInUse(const char* where, uint32_t slot) const {
  if (slot < limits_.max_slots && slots_[slot].in_use) return absl::OkStatus();
  return Invalid("{}: slot {} is not in use", where, slot);
}

absl::Status SlotTable::NameOnce(const char* list, uint32_t slot,
                                 std::vector<uint64_t>* last_step) {
  if ((*last_step)[slot] == step_) return Invalid("{}: slot {} is named twice", list, slot);
  (*last_step)[slot] = step_;
  return absl::OkStatus();
}

}  // namespace wintserve
