#include "kernels/cpu/cpu_batch.h"

#include <algorithm>

namespace wintserve::kernels::cpu {

CpuBatch::CpuBatch(const BatchLimits& limits)
    : limits_(limits), ids_of_slots_(limits.num_slots, 0) {}

void CpuBatch::Set(const Batch& batch) {
  CheckBatch(batch, limits_);
  tokens_.clear();
  for (const int32_t token : batch.tokens) {
    tokens_.push_back(token >= 0 ? token : ids_of_slots_[TokenOfSlot(token)]);
  }
  size_t num_blocks = 0;
  for (const BatchRow& row : batch.rows) num_blocks += BlocksOf(row);
  block_tables_.resize(num_blocks);

  positions_.clear();
  chunks_.clear();
  logit_tokens_.clear();
  logit_rows_.clear();
  int64_t first_token = 0;
  auto table = block_tables_.begin();
  for (const BatchRow& row : batch.rows) {
    const auto blocks = std::span(table, BlocksOf(row));
    table = std::copy_n(row.block_table.begin(), blocks.size(), table);
    chunks_.push_back({first_token, row.position, row.length, blocks});
    for (int32_t t = 0; t < row.length; ++t) positions_.push_back(row.position + t);
    first_token += row.length;
    if (!row.want_logits) continue;
    logit_tokens_.push_back(static_cast<int32_t>(first_token - 1));
    logit_rows_.push_back({row.slot, row.sample});
  }
  SetCounts(first_token, std::ssize(chunks_), std::ssize(logit_rows_));
}

void CpuBatch::KeepIds(const int32_t* ids) {
  for (const LogitRow& row : logit_rows_) ids_of_slots_[row.slot] = std::max(*ids++, 0);
}

}  // namespace wintserve::kernels::cpu
