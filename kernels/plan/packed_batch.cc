#include "kernels/plan/packed_batch.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "kernels/sampling/definition.h"

namespace wintserve::kernels::plan {

static_assert(std::is_trivially_copyable_v<PackedRow> &&
              std::is_trivially_copyable_v<PackedLogitRow>);

PackedBatchShape ShapeOf(const Batch& batch) {
  PackedBatchShape shape = {.num_tokens = static_cast<int32_t>(batch.tokens.size()),
                            .num_rows = static_cast<int32_t>(batch.rows.size()),
                            .num_padding_rows = batch.num_padding_rows};
  for (const BatchRow& row : batch.rows) {
    shape.num_blocks += static_cast<int32_t>(BlocksOf(row));
    shape.num_logit_rows += row.want_logits ? 1 : 0;
  }
  return shape;
}

PackedBatchShape LargestShape(const BatchLimits& limits) {
  return {.num_tokens = static_cast<int32_t>(limits.max_tokens),
          .num_rows = static_cast<int32_t>(limits.max_rows),
          .num_blocks = static_cast<int32_t>(limits.max_rows * limits.max_blocks_per_row),
          .num_logit_rows = static_cast<int32_t>(limits.max_rows)};
}

void PackBatch(const Batch& batch, int32_t* words) {
  const PackedBatchShape shape = ShapeOf(batch);
  std::copy(batch.tokens.begin(), batch.tokens.end(), words);
  auto* row_words = reinterpret_cast<char*>(words + shape.rows_word());
  auto* logit_words = reinterpret_cast<char*>(words + shape.logits_word());
  int32_t* const blocks = words + shape.blocks_word();
  int32_t first_token = 0;
  int32_t first_block = 0;
  for (const BatchRow& row : batch.rows) {
    const PackedRow packed = {first_token, row.position, row.length, first_block};
    std::memcpy(row_words, &packed, sizeof(packed));
    row_words += sizeof(packed);
    const auto num_blocks = static_cast<int32_t>(BlocksOf(row));
    std::copy_n(row.block_table.begin(), num_blocks, blocks + first_block);
    first_block += num_blocks;
    first_token += row.length;
    if (!row.want_logits) continue;
    const PackedLogitRow logit_row = {first_token - 1, row.slot, row.sample,
                                      sampling::MinScaledLogit(row.sample.min_p)};
    std::memcpy(logit_words, &logit_row, sizeof(logit_row));
    logit_words += sizeof(logit_row);
  }
}

}  // namespace wintserve::kernels::plan
