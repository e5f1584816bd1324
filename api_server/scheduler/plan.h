// The plain structs of the step protocol: what the scheduler decides and what comes back. They
// mirror proto/work_queue.proto, which says what each field means.
#pragma once

#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

namespace wintserve {

enum class BlockId : int32_t {};  // of the KV pool: not a slot, not a request

struct TokenBias {
  static constexpr float kBanned = -std::numeric_limits<float>::infinity();

  int32_t token = 0;
  float bias = 0;  // -100 … 100, or kBanned: not sampled while there is another one
  bool operator==(const TokenBias&) const = default;
};

struct SamplingParams {
  float temperature = 1.0f;  // 0 is greedy
  float top_p = 1.0f;        // (0, 1]; a request's 0 has become temperature 0 before it gets here
  int32_t top_k = 0;         // 0 keeps all
  int64_t seed = 0;
  uint32_t choice_index = 0;
  uint32_t first_stop_position = 0;  // a token sampled for an earlier position is no stop id
  float min_p = 0.0f;                // [0, 1]; 0 keeps all
  float repetition_penalty = 1.0f;   // > 0, finite; of tokens in prompt and answer
  float presence_penalty = 0.0f;     // -2 … 2; of tokens in the answer
  float frequency_penalty = 0.0f;
  std::vector<TokenBias> logit_biases = {};  // in rising order, each token once
  int32_t num_top_logprobs = -1;  // reported with the token's own; -1: no log-probability either
  int32_t num_prompt_top_logprobs = -1;  // the same of prompt tokens, by the rows that ask for them

  bool has_penalties() const {
    return repetition_penalty != 1 || presence_penalty != 0 || frequency_penalty != 0;
  }
};

struct SlotInit {
  uint32_t slot = 0;
  SamplingParams sampling;
  std::vector<BlockId> block_table = {};
  // The sequence as it is now, where penalties have to know it. The prompt: with a
  // repetition_penalty; the answer so far, of one that is computed again: with any.
  std::vector<int32_t> prompt_tokens = {};
  std::vector<int32_t> generated_tokens = {};
};

struct BlockAppend {
  uint32_t slot = 0;
  std::vector<BlockId> blocks = {};
};

// A run of consecutive tokens of one slot. Empty `tokens` with length 1: the token last sampled
// there.
struct PlanRow {
  uint32_t slot = 0;
  uint32_t position = 0;
  uint32_t length = 0;
  bool sample = false;
  std::vector<int32_t> tokens = {};  // `length` ids, or empty (see above)
  // The log-probability of the token that follows each of the row's is reported: of all `tokens`
  // but the first, and of next_token (the prompt's after the row) unless the row samples.
  bool prompt_logprobs = false;
  int32_t next_token = 0;

  // Tokens whose log-probability is reported.
  uint32_t num_prompt_logprobs() const {
    return !prompt_logprobs ? 0 : sample ? length - 1 : length;
  }
};

// One block's bytes between the pool and the host tier.
struct BlockCopy {
  bool to_device = false;
  BlockId block = BlockId{0};
  uint32_t host_slot = 0;
};

// Copies run first, then slot_init and block_append apply, then the rows run, then slot_release.
struct StepPlan {
  uint64_t group_epoch = 0;
  uint64_t pool_epoch = 0;
  uint64_t step = 0;
  uint64_t previous_plan_hash = 0;
  std::vector<SlotInit> slot_init = {};
  std::vector<BlockAppend> block_append = {};
  std::vector<PlanRow> rows = {};
  std::vector<uint32_t> slot_release = {};
  std::vector<BlockCopy> copies = {};
};

struct TokenLogprob {
  int32_t token = 0;
  float logprob = 0;
  bool operator==(const TokenLogprob&) const = default;
};

// Of the logits as the model gave them: before bias, penalties and temperature.
struct PositionLogprobs {
  float logprob = 0;                   // of the sampled token, or the prompt's
  int32_t rank = 0;                    // its place among all, from 1
  std::vector<TokenLogprob> top = {};  // the most probable ones, best first
  bool operator==(const PositionLogprobs&) const = default;
};

struct SampledToken {
  uint32_t slot = 0;
  int32_t token = 0;
  std::optional<PositionLogprobs> logprobs = {};  // where the slot's sampling asks for them
};

// Of the tokens that follow those of one row.
struct PromptRowLogprobs {
  uint32_t slot = 0;
  uint32_t position = 0;  // of the first of these tokens
  std::vector<PositionLogprobs> tokens = {};
};

struct StepDone {
  uint64_t group_epoch = 0;
  uint64_t step = 0;
  uint64_t plan_hash = 0;
  uint32_t execute_us = 0;
  std::vector<SampledToken> sampled = {};  // rank 0 only
  uint64_t sampled_digest = 0;
  std::vector<PromptRowLogprobs> prompt_logprobs = {};  // by row that asks for them; rank 0 only
};

}  // namespace wintserve
