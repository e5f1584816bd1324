#include "kernels/cpu/cpu_batch.h"

#include <algorithm>
#include <numeric>

#include "common/check.h"

namespace wintserve::kernels::cpu {

CpuBatch::CpuBatch(const BatchLimits& limits)
    : limits_(limits), slots_(limits.num_slots), ids_of_slots_(limits.num_slots, 0) {}

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
  route_as_.clear();
  if (batch.num_padding_rows > 0) {
    route_as_.resize(first_token + batch.num_padding_rows);
    std::iota(route_as_.begin(), route_as_.begin() + first_token, 0);
  }
  for (int32_t i = 0; i < batch.num_padding_rows; ++i) {
    tokens_.push_back(0);
    positions_.push_back(0);
    logit_tokens_.push_back(static_cast<int32_t>(first_token++));
    logit_rows_.push_back({.slot = -1});
  }
  SetCounts(first_token, std::ssize(chunks_) + batch.num_padding_rows, std::ssize(logit_rows_));
}

void CpuBatch::KeepIds(const int32_t* ids) {
  for (size_t i = 0; i < logit_rows_.size(); ++i) {
    const int32_t slot = logit_rows_[i].slot;
    if (slot >= 0) ids_of_slots_[slot] = std::max(ids[i], 0);
  }
}

void CpuBatch::StartSlot(int32_t slot, const SlotSampling& sampling) {
  CheckSlotSampling(slot, sampling, limits_);
  SlotState& state = slots_[slot];
  state.logit_biases.assign(sampling.logit_biases.begin(), sampling.logit_biases.end());
  state.counts.Clear();
  state.counts.AddPrompt(sampling.prompt_ids);
  for (const int32_t id : sampling.generated_ids) state.counts.AddGenerated(id);
}

void CpuBatch::CountDrawn(int64_t i, int32_t id) {
  const LogitRow& row = logit_rows_[i];
  if (!row.sample.penalties.none()) slots_[row.slot].counts.AddGenerated(id);
}

std::span<const sampling::LogitBias> CpuBatch::logit_biases(int64_t i) const {
  const LogitRow& row = logit_rows_[i];
  if (row.sample.num_logit_biases == 0) return {};
  const std::vector<sampling::LogitBias>& biases = slots_[row.slot].logit_biases;
  CHECK(std::ssize(biases) == row.sample.num_logit_biases, "slot {} has {} biases, the row {}",
        row.slot, biases.size(), row.sample.num_logit_biases);
  return biases;
}

std::span<const TokenOccurrence> CpuBatch::occurrences(int64_t i) const {
  const LogitRow& row = logit_rows_[i];
  if (row.sample.penalties.none()) return {};
  return slots_[row.slot].counts.occurrences();
}

}  // namespace wintserve::kernels::cpu
