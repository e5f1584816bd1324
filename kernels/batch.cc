#include "kernels/batch.h"

#include <cmath>

#include "common/check.h"
#include "kernels/sampling/check_params.h"

namespace wintserve::kernels {
namespace {

void CheckSample(const SampleParams& sample, const BatchLimits& limits) {
  sampling::CheckParams(sample);
  CHECK(sample.penalties.none() || limits.counted_vocab_size > 0,
        "penalties, but nothing is counted");
  CHECK(sample.num_logit_biases >= 0 && sample.num_logit_biases <= sampling::kMaxLogitBiases,
        "num_logit_biases={}", sample.num_logit_biases);
  CHECK(sample.num_top_logprobs >= -1 && sample.num_top_logprobs <= sampling::kMaxTopLogprobs,
        "num_top_logprobs={}", sample.num_top_logprobs);
}

}  // namespace

void CheckBatch(const Batch& batch, const BatchLimits& limits) {
  const auto num_tokens = static_cast<int64_t>(batch.tokens.size());
  const auto num_rows = static_cast<int64_t>(batch.rows.size());
  const int64_t num_padding = batch.num_padding_rows;
  CHECK(num_padding >= 0, "num_padding_rows={}", num_padding);
  CHECK(num_tokens + num_padding <= limits.max_tokens,
        "num_tokens={} num_padding_rows={} max_tokens={}", num_tokens, num_padding,
        limits.max_tokens);
  CHECK(num_rows + num_padding <= limits.max_rows, "num_rows={} num_padding_rows={} max_rows={}",
        num_rows, num_padding, limits.max_rows);
  int64_t row_tokens = 0;
  for (const BatchRow& row : batch.rows) {
    const auto num_blocks = static_cast<int64_t>(row.block_table.size());
    const int64_t end = int64_t{row.position} + row.length;
    CHECK(row.position >= 0 && row.length >= 1 && end <= num_blocks * kKvBlockTokens,
          "position={} length={} blocks={}", row.position, row.length, num_blocks);
    CHECK(BlocksOf(row) <= limits.max_blocks_per_row, "position={} length={} max_blocks_per_row={}",
          row.position, row.length, limits.max_blocks_per_row);
    CHECK(!row.want_logits || (row.slot >= 0 && row.slot < limits.num_slots),
          "slot={} num_slots={}", row.slot, limits.num_slots);
    if (row.want_logits) CheckSample(row.sample, limits);
    row_tokens += row.length;
  }
  CHECK(row_tokens == num_tokens, "the rows hold {} tokens, the batch {}", row_tokens, num_tokens);
  for (const int32_t token : batch.tokens) {
    CHECK(token >= TokenOfSlot(limits.num_slots - 1), "token={} num_slots={}", token,
          limits.num_slots);
  }
}

void CheckSlotSampling(int32_t slot, const SlotSampling& sampling, const BatchLimits& limits) {
  CHECK(slot >= 0 && slot < limits.num_slots, "slot={} num_slots={}", slot, limits.num_slots);
  const auto num_biases = static_cast<int64_t>(sampling.logit_biases.size());
  CHECK(num_biases <= sampling::kMaxLogitBiases, "num_biases={}", num_biases);
  int64_t previous = -1;
  for (const auto [id, bias] : sampling.logit_biases) {
    CHECK(id > previous, "a bias of token {} after one of {}", id, previous);
    CHECK(bias == sampling::kBanned || std::fabs(bias) <= sampling::kMaxAbsLogitBias,
          "bias {} of token {}", bias, id);
    previous = id;
  }
  const auto num_ids =
      static_cast<int64_t>(sampling.prompt_ids.size() + sampling.generated_ids.size());
  CHECK(num_ids <= limits.max_sequence_tokens(), "num_ids={} max_sequence_tokens={}", num_ids,
        limits.max_sequence_tokens());
}

}  // namespace wintserve::kernels
