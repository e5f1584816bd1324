#include "tests/fakes/fake_model.h"

#include <fmt/format.h>

#include <cmath>

#include "common/check.h"
#include "common/status_macros.h"

namespace wintserve::testing_fakes {
namespace {

uint64_t Mix(uint64_t hash, uint64_t value) {
  hash = (hash ^ value) * 0x9E3779B97F4A7C15;
  return hash ^ (hash >> 29);
}

}  // namespace

absl::StatusOr<std::span<const float>> FakeModel::Forward(const Batch& batch, void* kv_pool) {
  ++num_forwards_;
  logits_.clear();
  CHECK(std::ssize(batch.tokens) <= max_batch_tokens_, "{} tokens", batch.tokens.size());
  auto* pool = static_cast<int32_t*>(kv_pool);
  const auto entry = [&](const BatchRow& row, int position) -> int32_t& {
    return pool[row.block_table[position / kBlockTokens] * kBlockTokens + position % kBlockTokens];
  };
  auto token = batch.tokens.begin();
  for (const BatchRow& row : batch.rows) {
    const int end = row.position + row.length;
    CHECK(std::ssize(row.block_table) * kBlockTokens >= end);
    for (int position = row.position; position < end; ++position)
      entry(row, position) = *token++ + 1;
    uint64_t history = 0;
    for (int position = 0; position < end; ++position) {
      if (entry(row, position) == 0) {
        return absl::InternalError(fmt::format("position {} was never written", position));
      }
      history = Mix(history, entry(row, position));
    }
    if (!row.want_logits) continue;
    for (int id = 0; id < kVocabSize; ++id) {
      logits_.push_back(broken_ ? NAN : static_cast<float>(Mix(history, id) % 4096) / 512.0f);
    }
  }
  CHECK(token == batch.tokens.end());
  float arrived = 1;
  RETURN_IF_ERROR(collective_->AllReduceSum(&arrived, 1));
  CHECK(arrived == static_cast<float>(collective_->world_size()));
  if (collective_->rank() != 0) logits_.clear();
  return logits_;
}

}  // namespace wintserve::testing_fakes
