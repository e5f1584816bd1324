#include "api_server/work_queue/plan_codec.h"

#include <fmt/core.h>
#include <xxhash.h>

#include <cmath>
#include <limits>
#include <utility>

#include "common/check.h"
#include "common/status_macros.h"
#include "proto/work_queue.pb.h"

namespace wintserve {
namespace {

constexpr uint32_t kMaxId = std::numeric_limits<int32_t>::max();  // of tokens and blocks
constexpr float kMaxAbsPenalty = 2;
constexpr float kMaxAbsBias = 100;
constexpr uint8_t kKnownRowFlags =
    proto::ROW_FLAG_SAMPLE | proto::ROW_FLAG_TOKEN_FROM_SLOT | proto::ROW_FLAG_PROMPT_LOGPROBS;

template <typename... Args>
absl::Status Invalid(fmt::format_string<Args...> format, Args&&... args) {
  return absl::InvalidArgumentError("StepPlan: " +
                                    fmt::format(format, std::forward<Args>(args)...));
}

void AppendBlockIds(const std::vector<BlockId>& blocks,
                    google::protobuf::RepeatedField<uint32_t>* out) {
  out->Reserve(out->size() + static_cast<int>(blocks.size()));
  for (const BlockId block : blocks) out->Add(static_cast<uint32_t>(block));
}

absl::StatusOr<std::vector<BlockId>> ReadBlockIds(
    const google::protobuf::RepeatedField<uint32_t>& ids, std::string_view field) {
  std::vector<BlockId> blocks;
  blocks.reserve(ids.size());
  for (const uint32_t id : ids) {
    if (id > kMaxId)
      return Invalid("{} holds block {}, above the largest id {}", field, id, kMaxId);
    blocks.push_back(static_cast<BlockId>(id));
  }
  return blocks;
}

absl::StatusOr<std::vector<int32_t>> ReadTokens(
    const google::protobuf::RepeatedField<uint32_t>& ids, std::string_view field) {
  std::vector<int32_t> tokens;
  tokens.reserve(ids.size());
  for (const uint32_t id : ids) {
    if (id > kMaxId) return Invalid("{} holds {}, above the largest id {}", field, id, kMaxId);
    tokens.push_back(static_cast<int32_t>(id));
  }
  return tokens;
}

// Written so that NaN fails too.
absl::Status CheckPenalty(std::string_view name, float penalty) {
  if (std::fabs(penalty) <= kMaxAbsPenalty) return absl::OkStatus();
  return Invalid("slot_init.sampling.{} is {}, must be from {} to {}", name, penalty,
                 -kMaxAbsPenalty, kMaxAbsPenalty);
}

absl::StatusOr<std::vector<TokenBias>> ReadBiases(const proto::Sampling& in) {
  if (in.bias_size() != in.bias_token_size()) {
    return Invalid("slot_init.sampling.bias has {} entries, bias_token has {}", in.bias_size(),
                   in.bias_token_size());
  }
  ASSIGN_OR_RETURN(const std::vector<int32_t> tokens,
                   ReadTokens(in.bias_token(), "slot_init.sampling.bias_token"));
  std::vector<TokenBias> biases;
  biases.reserve(tokens.size());
  for (size_t i = 0; i < tokens.size(); ++i) {
    const TokenBias bias = {tokens[i], in.bias(static_cast<int>(i))};
    if (!(std::fabs(bias.bias) <= kMaxAbsBias) && bias.bias != TokenBias::kBanned) {
      return Invalid("slot_init.sampling.bias of token {} is {}, must be from {} to {}", bias.token,
                     bias.bias, -kMaxAbsBias, kMaxAbsBias);
    }
    if (i > 0 && tokens[i - 1] >= bias.token) {
      return Invalid("slot_init.sampling.bias_token holds {} after {}, must rise", bias.token,
                     tokens[i - 1]);
    }
    biases.push_back(bias);
  }
  return biases;
}

absl::StatusOr<SamplingParams> ReadSampling(const proto::Sampling& in) {
  // Written so that NaN fails too.
  if (!(in.temperature() >= 0) || !std::isfinite(in.temperature())) {
    return Invalid("slot_init.sampling.temperature is {}, must be at least 0", in.temperature());
  }
  if (!(in.top_p() > 0 && in.top_p() <= 1)) {
    return Invalid("slot_init.sampling.top_p is {}, must be in (0, 1]", in.top_p());
  }
  if (in.top_k() > kMaxId) {
    return Invalid("slot_init.sampling.top_k is {}, at most {}", in.top_k(), kMaxId);
  }
  if (!(in.min_p() >= 0 && in.min_p() <= 1)) {
    return Invalid("slot_init.sampling.min_p is {}, must be in [0, 1]", in.min_p());
  }
  if (!(in.repetition_penalty() > 0) || !std::isfinite(in.repetition_penalty())) {
    return Invalid("slot_init.sampling.repetition_penalty is {}, must be above 0",
                   in.repetition_penalty());
  }
  RETURN_IF_ERROR(CheckPenalty("presence_penalty", in.presence_penalty()));
  RETURN_IF_ERROR(CheckPenalty("frequency_penalty", in.frequency_penalty()));
  if (in.num_top_logprobs() > kMaxId) {
    return Invalid("slot_init.sampling.num_top_logprobs is {}, at most {}", in.num_top_logprobs(),
                   kMaxId);
  }
  if (in.num_prompt_top_logprobs() > kMaxId) {
    return Invalid("slot_init.sampling.num_prompt_top_logprobs is {}, at most {}",
                   in.num_prompt_top_logprobs(), kMaxId);
  }
  ASSIGN_OR_RETURN(std::vector<TokenBias> biases, ReadBiases(in));
  return SamplingParams{
      .temperature = in.temperature(),
      .top_p = in.top_p(),
      .top_k = static_cast<int32_t>(in.top_k()),
      .seed = in.seed(),
      .choice_index = in.choice_index(),
      .first_stop_position = in.first_stop_position(),
      .min_p = in.min_p(),
      .repetition_penalty = in.repetition_penalty(),
      .presence_penalty = in.presence_penalty(),
      .frequency_penalty = in.frequency_penalty(),
      .logit_biases = std::move(biases),
      .num_top_logprobs =
          in.has_num_top_logprobs() ? static_cast<int32_t>(in.num_top_logprobs()) : -1,
      .num_prompt_top_logprobs = in.has_num_prompt_top_logprobs()
                                     ? static_cast<int32_t>(in.num_prompt_top_logprobs())
                                     : -1};
}

void FillSampling(const SamplingParams& sampling, proto::Sampling* to) {
  to->set_temperature(sampling.temperature);
  to->set_top_p(sampling.top_p);
  to->set_top_k(static_cast<uint32_t>(sampling.top_k));
  to->set_seed(sampling.seed);
  to->set_choice_index(sampling.choice_index);
  to->set_first_stop_position(sampling.first_stop_position);
  to->set_min_p(sampling.min_p);
  to->set_repetition_penalty(sampling.repetition_penalty);
  to->set_presence_penalty(sampling.presence_penalty);
  to->set_frequency_penalty(sampling.frequency_penalty);
  for (const TokenBias& bias : sampling.logit_biases) {
    to->add_bias_token(static_cast<uint32_t>(bias.token));
    to->add_bias(bias.bias);
  }
  if (sampling.num_top_logprobs >= 0) {
    to->set_num_top_logprobs(static_cast<uint32_t>(sampling.num_top_logprobs));
  }
  if (sampling.num_prompt_top_logprobs >= 0) {
    to->set_num_prompt_top_logprobs(static_cast<uint32_t>(sampling.num_prompt_top_logprobs));
  }
}

absl::Status CheckColumn(std::string_view name, int64_t size, int64_t num_rows) {
  if (size == num_rows) return absl::OkStatus();
  return Invalid("{} has {} entries, row_slot has {}", name, size, num_rows);
}

// What rows have taken of the columns that not all of them use.
struct RowReads {
  int tokens = 0;
  int next_tokens = 0;
};

absl::Status ReadPromptLogprobs(const proto::StepPlan& in, int i, RowReads* reads, PlanRow* row) {
  row->prompt_logprobs = true;
  if (row->num_prompt_logprobs() == 0) {
    return Invalid(
        "row_flags[{}] asks for log-probabilities of a prompt, but no token follows in it", i);
  }
  if (row->sample) return absl::OkStatus();
  if (reads->next_tokens == in.next_token_size()) {
    return Invalid("next_token has {} entries, too few for row {}", in.next_token_size(), i);
  }
  const uint32_t token = in.next_token(reads->next_tokens++);
  if (token > kMaxId) return Invalid("next_token holds {}, above the largest id {}", token, kMaxId);
  row->next_token = static_cast<int32_t>(token);
  return absl::OkStatus();
}

absl::StatusOr<PlanRow> ReadRow(const proto::StepPlan& in, int i, RowReads* reads) {
  const uint8_t flags = static_cast<uint8_t>(in.row_flags()[i]);
  PlanRow row{.slot = in.row_slot(i),
              .position = in.row_position(i),
              .length = in.row_length(i),
              .sample = (flags & proto::ROW_FLAG_SAMPLE) != 0,
              .tokens = {}};
  if ((flags & ~kKnownRowFlags) != 0) return Invalid("row_flags[{}] is {:#x}, unknown", i, flags);
  if (row.length == 0) return Invalid("row_length[{}] is 0", i);
  if (uint64_t{row.position} + row.length > kMaxId) {
    return Invalid("row_position[{}] is {} and row_length {}: together above {}", i, row.position,
                   row.length, kMaxId);
  }
  if ((flags & proto::ROW_FLAG_TOKEN_FROM_SLOT) != 0) {
    if (row.length != 1) {
      return Invalid("row_length[{}] is {}, must be 1 for a token from the slot", i, row.length);
    }
    if ((flags & proto::ROW_FLAG_PROMPT_LOGPROBS) != 0) {
      return Invalid("row_flags[{}] is {:#x}: a token from the slot is none of a prompt", i, flags);
    }
    return row;
  }
  if (row.length > static_cast<uint32_t>(in.tokens_size() - reads->tokens)) {
    return Invalid("tokens has {} entries, too few for row {}", in.tokens_size(), i);
  }
  row.tokens.reserve(row.length);
  for (uint32_t j = 0; j < row.length; ++j) {
    const uint32_t token = in.tokens(reads->tokens++);
    if (token > kMaxId) return Invalid("tokens holds {}, above the largest id {}", token, kMaxId);
    row.tokens.push_back(static_cast<int32_t>(token));
  }
  if ((flags & proto::ROW_FLAG_PROMPT_LOGPROBS) != 0) {
    RETURN_IF_ERROR(ReadPromptLogprobs(in, i, reads, &row));
  }
  return row;
}

absl::Status ReadRows(const proto::StepPlan& in, StepPlan* plan) {
  const int num_rows = in.row_slot_size();
  RETURN_IF_ERROR(CheckColumn("row_position", in.row_position_size(), num_rows));
  RETURN_IF_ERROR(CheckColumn("row_length", in.row_length_size(), num_rows));
  RETURN_IF_ERROR(CheckColumn("row_flags", static_cast<int64_t>(in.row_flags().size()), num_rows));
  plan->rows.reserve(num_rows);
  RowReads reads;
  for (int i = 0; i < num_rows; ++i) {
    ASSIGN_OR_RETURN(PlanRow row, ReadRow(in, i, &reads));
    plan->rows.push_back(std::move(row));
  }
  if (reads.tokens != in.tokens_size()) {
    return Invalid("tokens has {} entries, the rows take {}", in.tokens_size(), reads.tokens);
  }
  if (reads.next_tokens != in.next_token_size()) {
    return Invalid("next_token has {} entries, the rows take {}", in.next_token_size(),
                   reads.next_tokens);
  }
  return absl::OkStatus();
}

}  // namespace

std::string EncodePlan(const StepPlan& plan) {
  proto::StepPlan out;
  out.set_group_epoch(plan.group_epoch);
  out.set_pool_epoch(plan.pool_epoch);
  out.set_step(plan.step);
  out.set_previous_plan_hash(plan.previous_plan_hash);
  for (const SlotInit& init : plan.slot_init) {
    proto::SlotInit* to = out.add_slot_init();
    to->set_slot(init.slot);
    FillSampling(init.sampling, to->mutable_sampling());
    AppendBlockIds(init.block_table, to->mutable_block_table());
    to->mutable_prompt_tokens()->Assign(init.prompt_tokens.begin(), init.prompt_tokens.end());
    to->mutable_generated_tokens()->Assign(init.generated_tokens.begin(),
                                           init.generated_tokens.end());
  }
  for (const PlanRow& row : plan.rows) {
    const bool from_slot = row.tokens.empty();
    CHECK(from_slot ? row.length == 1 : row.length == row.tokens.size(),
          "slot={} length={} tokens={}", row.slot, row.length, row.tokens.size());
    out.add_row_slot(row.slot);
    out.add_row_position(row.position);
    out.add_row_length(row.length);
    const int flags = (row.sample ? proto::ROW_FLAG_SAMPLE : 0) |
                      (from_slot ? proto::ROW_FLAG_TOKEN_FROM_SLOT : 0) |
                      (row.prompt_logprobs ? proto::ROW_FLAG_PROMPT_LOGPROBS : 0);
    out.mutable_row_flags()->push_back(static_cast<char>(flags));
    for (const int32_t token : row.tokens) out.add_tokens(static_cast<uint32_t>(token));
    if (row.prompt_logprobs && !row.sample) {
      out.add_next_token(static_cast<uint32_t>(row.next_token));
    }
  }
  for (const BlockAppend& append : plan.block_append) {
    proto::BlockAppend* to = out.add_block_append();
    to->set_slot(append.slot);
    AppendBlockIds(append.blocks, to->mutable_blocks());
  }
  for (const uint32_t slot : plan.slot_release) out.add_slot_release(slot);
  for (const BlockCopy& copy : plan.copies) {
    proto::BlockCopy* to = out.add_copies();
    to->set_to_device(copy.to_device);
    to->set_block(static_cast<uint32_t>(copy.block));
    to->set_host_slot(copy.host_slot);
  }
  return out.SerializeAsString();
}

absl::StatusOr<StepPlan> DecodePlan(std::string_view plan_bytes) {
  proto::StepPlan in;
  if (plan_bytes.size() > kMaxId ||
      !in.ParseFromArray(plan_bytes.data(), static_cast<int>(plan_bytes.size()))) {
    return Invalid("{} bytes that are no such message", plan_bytes.size());
  }
  StepPlan plan;
  plan.group_epoch = in.group_epoch();
  plan.pool_epoch = in.pool_epoch();
  plan.step = in.step();
  plan.previous_plan_hash = in.previous_plan_hash();
  if (plan.step == 0) return Invalid("step is 0, the first is 1");
  for (const proto::SlotInit& init : in.slot_init()) {
    ASSIGN_OR_RETURN(SamplingParams sampling, ReadSampling(init.sampling()));
    ASSIGN_OR_RETURN(std::vector<BlockId> table,
                     ReadBlockIds(init.block_table(), "slot_init.block_table"));
    ASSIGN_OR_RETURN(std::vector<int32_t> prompt,
                     ReadTokens(init.prompt_tokens(), "slot_init.prompt_tokens"));
    ASSIGN_OR_RETURN(std::vector<int32_t> generated,
                     ReadTokens(init.generated_tokens(), "slot_init.generated_tokens"));
    plan.slot_init.push_back({init.slot(), std::move(sampling), std::move(table), std::move(prompt),
                              std::move(generated)});
  }
  for (const proto::BlockAppend& append : in.block_append()) {
    ASSIGN_OR_RETURN(std::vector<BlockId> blocks,
                     ReadBlockIds(append.blocks(), "block_append.blocks"));
    plan.block_append.push_back({append.slot(), std::move(blocks)});
  }
  RETURN_IF_ERROR(ReadRows(in, &plan));
  plan.slot_release.assign(in.slot_release().begin(), in.slot_release().end());
  for (const proto::BlockCopy& copy : in.copies()) {
    if (copy.block() > kMaxId) {
      return Invalid("copies holds block {}, above the largest id {}", copy.block(), kMaxId);
    }
    plan.copies.push_back({copy.to_device(), static_cast<BlockId>(copy.block()), copy.host_slot()});
  }
  return plan;
}

uint64_t PlanHash(std::string_view plan_bytes) {
  return XXH3_64bits(plan_bytes.data(), plan_bytes.size());
}

uint64_t SampledDigest(std::span<const int32_t> ids) {
  const uint64_t digest = XXH3_64bits(ids.data(), ids.size_bytes());
  return digest != 0 ? digest : 1;
}

}  // namespace wintserve
