#include "tests/fakes/fake_model.h"

#include <fmt/format.h>

#include <cmath>

#include "common/check.h"
#include "common/status_macros.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/cpu_batch.h"

namespace wintserve::testing_fakes {
namespace {

uint64_t Mix(uint64_t hash, uint64_t value) {
  hash = (hash ^ value) * 0x9E3779B97F4A7C15;
  return hash ^ (hash >> 29);
}

float LogitOf(uint64_t history, int id) {
  return static_cast<float>(Mix(history, id) % 4096) / 512.0f;
}

}  // namespace

FakeModel::FakeModel(Collective* collective, int max_batch_tokens, int max_logit_rows)
    : backend_(kernels::cpu::CreateCpuBackend({})),
      collective_(collective),
      max_batch_tokens_(max_batch_tokens),
      max_logit_rows_(max_logit_rows > 0 ? max_logit_rows : max_batch_tokens) {}

std::vector<float> FakeModel::LogitsAfter(std::span<const int32_t> tokens) {
  uint64_t history = 0;
  for (const int32_t token : tokens) history = Mix(history, token + 1);
  std::vector<float> logits;
  for (int id = 0; id < kVocabSize; ++id) logits.push_back(LogitOf(history, id));
  return logits;
}

absl::StatusOr<kernels::ConstRows> FakeModel::TokenLogits(int64_t first_token, int64_t num_tokens) {
  CHECK(num_tokens >= 1 && num_tokens <= max_logit_rows_ && first_token >= 0 &&
            first_token + num_tokens <= std::ssize(histories_),
        "first_token={} num_tokens={} of {}", first_token, num_tokens, histories_.size());
  num_token_logits_ += num_tokens;
  token_logits_.clear();
  for (int64_t t = first_token; t < first_token + num_tokens; ++t) {
    CHECK(!has_logits_[t], "token {} a second time", t);
    has_logits_[t] = true;
    for (int id = 0; id < kVocabSize; ++id) {
      token_logits_.push_back(broken_ ? NAN : LogitOf(histories_[t], id));
    }
  }
  RETURN_IF_ERROR(JoinCollective());
  if (collective_->rank() != 0) return kernels::ConstRows();
  return kernels::ConstRows(token_logits_.data(), kVocabSize);
}

absl::Status FakeModel::JoinCollective() {
  float arrived = 1;
  RETURN_IF_ERROR(collective_->AllReduceSum(&arrived, 1));
  CHECK(arrived == static_cast<float>(collective_->world_size()));
  return absl::OkStatus();
}

absl::StatusOr<kernels::ConstRows> FakeModel::Forward(const kernels::DeviceBatch& device_batch,
                                                      void* kv_pool) {
  ++num_forwards_;
  logits_.clear();
  histories_.assign(device_batch.num_tokens(), 0);
  has_logits_.assign(device_batch.num_tokens(), false);
  const auto& batch = static_cast<const kernels::cpu::CpuBatch&>(device_batch);
  CHECK(batch.num_tokens() <= max_batch_tokens_, "{} tokens", batch.num_tokens());
  auto* pool = static_cast<int32_t*>(kv_pool);
  const auto entry = [&](const kernels::cpu::SequenceChunk& chunk, int position) -> int32_t& {
    return pool[chunk.block_table[position / kBlockTokens] * kBlockTokens +
                position % kBlockTokens];
  };
  int64_t num_logit_rows = 0;
  for (const kernels::cpu::SequenceChunk& chunk : batch.chunks()) {
    const int end = chunk.position + chunk.length;
    for (int t = 0; t < chunk.length; ++t) {
      entry(chunk, chunk.position + t) = batch.tokens()[chunk.first_token + t] + 1;
    }
    uint64_t history = 0;
    for (int position = 0; position < end; ++position) {
      if (entry(chunk, position) == 0) {
        return absl::InternalError(fmt::format("position {} was never written", position));
      }
      history = Mix(history, entry(chunk, position));
      if (position >= chunk.position) {
        histories_[chunk.first_token + position - chunk.position] = history;
      }
    }
    if (num_logit_rows == batch.num_logit_rows() ||
        batch.logit_tokens()[num_logit_rows] != chunk.first_token + chunk.length - 1) {
      continue;
    }
    ++num_logit_rows;
    has_logits_[chunk.first_token + chunk.length - 1] = true;
    for (int id = 0; id < kVocabSize; ++id) {
      logits_.push_back(broken_ ? NAN : LogitOf(history, id));
    }
  }
  // Of a padding row nothing is defined.
  for (; num_logit_rows < batch.num_logit_rows(); ++num_logit_rows) {
    CHECK(batch.is_padding(num_logit_rows));
    ++num_padding_rows_;
    logits_.insert(logits_.end(), kVocabSize, NAN);
  }
  RETURN_IF_ERROR(JoinCollective());
  if (collective_->rank() != 0) return kernels::ConstRows();
  return kernels::ConstRows(logits_.data(), kVocabSize);
}

}  // namespace wintserve::testing_fakes
