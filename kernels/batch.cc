#include "kernels/batch.h"

#include "common/check.h"

namespace wintserve::kernels {

void CheckBatch(const Batch& batch, const BatchLimits& limits) {
  const auto num_tokens = static_cast<int64_t>(batch.tokens.size());
  const auto num_rows = static_cast<int64_t>(batch.rows.size());
  CHECK(num_tokens <= limits.max_tokens, "num_tokens={} max_tokens={}", num_tokens,
        limits.max_tokens);
  CHECK(num_rows <= limits.max_rows, "num_rows={} max_rows={}", num_rows, limits.max_rows);
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
    row_tokens += row.length;
  }
  CHECK(row_tokens == num_tokens, "the rows hold {} tokens, the batch {}", row_tokens, num_tokens);
  for (const int32_t token : batch.tokens) {
    CHECK(token >= TokenOfSlot(limits.num_slots - 1), "token={} num_slots={}", token,
          limits.num_slots);
  }
}

}  // namespace wintserve::kernels
