#include "tools/quantizer/forward/token_states.h"

#include <algorithm>
#include <numeric>

#include "common/check.h"
#include "common/status_macros.h"
#include "kernels/cpu/matmul.h"
#include "kernels/cpu/row_ops.h"

namespace wintserve::quantizer {

using kernels::ConstRows;
using kernels::Rows;
using kernels::WeightMatrix;

constexpr int64_t kFloatBytes = sizeof(float);

TokenRows AllTokens(int64_t num_tokens) {
  TokenRows rows;
  rows.tokens.resize(num_tokens);
  std::iota(rows.tokens.begin(), rows.tokens.end(), 0);
  rows.gates.assign(num_tokens, 1.0f);
  return rows;
}

TokenStates::TokenStates(const ModelConfig& config, const SequenceBatches& batches,
                         kernels::Backend* backend, kernels::cpu::ThreadPool* pool)
    : config_(config),
      batches_(batches),
      backend_(backend),
      pool_(pool),
      attention_{config.num_heads, config.num_kv_heads, config.head_dim} {}

absl::StatusOr<std::unique_ptr<TokenStates>> TokenStates::Create(const ModelConfig& config,
                                                                 const SequenceBatches& batches,
                                                                 kernels::Backend* backend,
                                                                 kernels::cpu::ThreadPool* pool) {
  RETURN_IF_ERROR(backend->CheckModel(config.hidden_size, config.num_experts));
  std::unique_ptr<TokenStates> states(new TokenStates(config, batches, backend, pool));
  ASSIGN_OR_RETURN(states->kv_block_bytes_, backend->KvLayerBytes(states->attention_));
  ASSIGN_OR_RETURN(states->batch_, backend->CreateBatch(batches.limits()));
  ASSIGN_OR_RETURN(states->residual_,
                   RowBuffer::Allocate(batches.num_tokens(), config.hidden_size));
  return states;
}

void TokenStates::Embed(const WeightMatrix& table) {
  for (const SequenceBatches::Range& range : batches_.ranges()) {
    backend_->SetBatch(batches_.MakeBatch(range), batch_.get());
    backend_->Embed(table, *batch_, residual_.From(range.first_token));
  }
}

void TokenStates::Normalize(std::span<const int32_t> tokens, const float* gain, Rows out) const {
  backend_->AddRmsNorm(residual_.rows(), ConstRows(), tokens.data(), std::ssize(tokens),
                       config_.hidden_size, gain, config_.rms_norm_eps, out);
}

void TokenStates::Normalize(int64_t first, int64_t count, const float* gain, Rows out) const {
  backend_->AddRmsNorm(residual_.From(first), ConstRows(), /*row_ids=*/nullptr, count,
                       config_.hidden_size, gain, config_.rms_norm_eps, out);
}

absl::Status TokenStates::Attend(const float* gain, const WeightMatrix& qkv_weights) {
  const int64_t batch_tokens = batches_.max_batch_tokens();
  ASSIGN_OR_RETURN(
      attended_, RowBuffer::Allocate(num_tokens(), int64_t{config_.num_heads} * config_.head_dim));
  ASSIGN_OR_RETURN(const RowBuffer normed, RowBuffer::Allocate(batch_tokens, config_.hidden_size));
  ASSIGN_OR_RETURN(const RowBuffer qkv,
                   RowBuffer::Allocate(batch_tokens, attention_.qkv_columns()));
  ASSIGN_OR_RETURN(const RowBuffer cos_sin, RowBuffer::Allocate(batch_tokens, config_.head_dim));
  ASSIGN_OR_RETURN(RowBuffer kv_pool,
                   RowBuffer::Allocate(batches_.max_blocks(), kv_block_bytes_ / kFloatBytes));
  kv_pool.FillWithZeros(pool_);  // as the backend reads whole blocks
  const kernels::KvLayer kv = {kv_pool.rows().data, kv_block_bytes_, 0};
  for (const SequenceBatches::Range& range : batches_.ranges()) {
    backend_->SetBatch(batches_.MakeBatch(range), batch_.get());
    backend_->RopeAngles(*batch_, config_.head_dim, config_.rope_theta, config_.compression_ratio,
                         cos_sin.rows());
    Normalize(range.first_token, range.num_tokens, gain, normed.rows());
    backend_->Linear(normed.rows(), range.num_tokens, qkv_weights, qkv.rows());
    backend_->RopeAndAppendKv(attention_, *batch_, cos_sin.rows(), qkv.rows(), kv);
    backend_->Attention(attention_, *batch_, qkv.rows(), kv, attended_.From(range.first_token));
  }
  return absl::OkStatus();
}

absl::Status TokenStates::AddAttentionOutput(const WeightMatrix& output) {
  const int64_t chunk_rows = std::min(ChunkRows(config_.hidden_size), num_tokens());
  ASSIGN_OR_RETURN(const RowBuffer delta, RowBuffer::Allocate(chunk_rows, config_.hidden_size));
  for (int64_t first = 0; first < num_tokens(); first += chunk_rows) {
    const int64_t count = std::min(chunk_rows, num_tokens() - first);
    backend_->Linear(attended_.From(first), count, output, delta.rows());
    AddRows(delta.rows(), count, config_.hidden_size, residual_.From(first));
  }
  attended_ = {};
  return absl::OkStatus();
}

absl::Status TokenStates::Route(const float* gain, const WeightMatrix& router, const float* bias) {
  const kernels::RouterShape shape = {config_.num_experts, config_.num_experts_per_token,
                                      config_.moe_norm_min};
  ASSIGN_OR_RETURN(mlp_sum_, RowBuffer::Allocate(num_tokens(), config_.hidden_size));
  mlp_sum_.FillWithZeros(pool_);
  routed_.assign(shape.num_experts, {});
  const int64_t chunk_rows = std::min(ChunkRows(config_.hidden_size), num_tokens());
  std::vector<int32_t> ids(chunk_rows * shape.top_k);
  std::vector<float> weights(chunk_rows * shape.top_k);
  ASSIGN_OR_RETURN(const RowBuffer normed, RowBuffer::Allocate(chunk_rows, config_.hidden_size));
  for (int64_t first = 0; first < num_tokens(); first += chunk_rows) {
    const int64_t count = std::min(chunk_rows, num_tokens() - first);
    Normalize(first, count, gain, normed.rows());
    backend_->Route(normed.rows(), count, router, bias, shape, ids.data(), weights.data());
    for (int64_t i = 0; i < count * shape.top_k; ++i) {
      TokenRows& rows = routed_[ids[i]];
      rows.tokens.push_back(static_cast<int32_t>(first + i / shape.top_k));
      rows.gates.push_back(weights[i]);
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<RowBuffer> TokenStates::Activate(const float* gain, std::span<const int32_t> tokens,
                                                const WeightMatrix& gate_up) const {
  constexpr int64_t kTile = kernels::cpu::kTileColumns;
  const int64_t width = gate_up.n() / 2;
  CHECK(width % kTile == 0, "width={}", width);
  const int64_t num_rows = std::ssize(tokens);
  const int64_t chunk_rows =
      std::min(ChunkRows(std::max<int64_t>(2 * width, config_.hidden_size)), num_rows);
  ASSIGN_OR_RETURN(RowBuffer activations, RowBuffer::Allocate(num_rows, width));
  ASSIGN_OR_RETURN(const RowBuffer normed, RowBuffer::Allocate(chunk_rows, config_.hidden_size));
  ASSIGN_OR_RETURN(const RowBuffer product, RowBuffer::Allocate(chunk_rows, 2 * width));
  for (int64_t first = 0; first < num_rows; first += chunk_rows) {
    const int64_t count = std::min(chunk_rows, num_rows - first);
    Normalize(tokens.subspan(first, count), gain, normed.rows());
    backend_->Linear(normed.rows(), count, gate_up, product.rows());
    // To the function a row is so many tiles of one row each, below each other.
    pool_->Run(count, count * width * 16, [&](int64_t r, int) {
      const float* gate = product.From(r).data;
      kernels::cpu::SwiGluTile(gate, gate + width, width / kTile, activations.From(first + r).data,
                               kTile);
    });
  }
  return activations;
}

absl::Status TokenStates::Multiply(ConstRows inputs, int64_t num_rows, const WeightMatrix& matrix,
                                   absl::FunctionRef<void(int64_t i, const float* y)> sink) const {
  const int64_t chunk_rows = std::min(ChunkRows(config_.hidden_size), num_rows);
  ASSIGN_OR_RETURN(const RowBuffer product, RowBuffer::Allocate(chunk_rows, config_.hidden_size));
  for (int64_t first = 0; first < num_rows; first += chunk_rows) {
    const int64_t count = std::min(chunk_rows, num_rows - first);
    backend_->Linear({inputs.row(first), inputs.stride}, count, matrix, product.rows());
    pool_->Run(count, count * config_.hidden_size,
               [&](int64_t r, int) { sink(first + r, product.From(r).data); });
  }
  return absl::OkStatus();
}

void TokenStates::FinishMlp() {
  CHECK(!mlp_sum_.is_empty());
  AddRows(mlp_sum_.rows(), num_tokens(), config_.hidden_size, residual_.rows());
  mlp_sum_ = {};
  routed_.clear();
}

void TokenStates::AddRows(ConstRows from, int64_t num_rows, int64_t columns, Rows to) const {
  pool_->Run(num_rows, num_rows * columns, [&](int64_t r, int) {
    const float* x = from.row(r);
    float* y = to.row(r);
    for (int64_t c = 0; c < columns; ++c) y[c] += x[c];
  });
}

}  // namespace wintserve::quantizer
