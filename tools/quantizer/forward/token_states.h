// What the calibration tokens have become in one model, between two of its operators.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine_worker/config/model_config.h"
#include "kernels/backend.h"
#include "kernels/cpu/thread_pool.h"
#include "tools/quantizer/forward/row_buffer.h"
#include "tools/quantizer/forward/sequence_batches.h"

namespace wintserve::quantizer {

// Tokens, and for each a factor.
struct TokenRows {
  std::vector<int32_t> tokens;  // rising
  std::vector<float> gates;     // one a token

  int64_t size() const { return static_cast<int64_t>(tokens.size()); }
};

// All tokens, each with the factor 1.
TokenRows AllTokens(int64_t num_tokens);

// One model's activations of every calibration token. The operators are those of the CPU backend,
// in the order and with the sums of engine_worker/model/ernie45.cc: with the same weights the
// numbers have the same bits.
//
// Memory, T tokens, H hidden size, A = heads * head_dim, float32:
//   4 T H   the residual, always
//   4 T A   what attention gives, from Attend to AddAttentionOutput
//   4 T H   what the MLPs of a MoE layer give, from Route to FinishMlp; and 8 T top_k of routing,
//           at most twice that
// and the KV blocks and operands of one batch during Attend, else ChunkRows of what an operator
// takes and gives.
// Ownership: config, batches, backend and pool outlive it. Threading: one thread.
// Errors of every method that returns a Status: RESOURCE_EXHAUSTED, no memory.
class TokenStates {
 public:
  // Rows of so many columns that are worked on at once: a multiple of kChunkRows, and of narrow
  // rows so many more that a loop over them has work for tens of threads.
  static constexpr int64_t kChunkRows = 1024;
  static constexpr int64_t ChunkRows(int64_t columns) {
    constexpr int64_t kChunkFloats = int64_t{4} << 20;
    return std::max<int64_t>(1, kChunkFloats / columns / kChunkRows) * kChunkRows;
  }

  // INVALID_ARGUMENT: shapes that the backend does not have.
  static absl::StatusOr<std::unique_ptr<TokenStates>> Create(const ModelConfig& config,
                                                             const SequenceBatches& batches,
                                                             kernels::Backend* backend,
                                                             kernels::cpu::ThreadPool* pool);

  int64_t num_tokens() const { return batches_.num_tokens(); }
  kernels::ConstRows residual() const { return residual_.rows(); }  // [tokens, hidden_size]
  // [tokens, heads * head_dim] between Attend and AddAttentionOutput.
  kernels::ConstRows attended() const { return attended_.rows(); }

  void Embed(const kernels::WeightMatrix& table);

  // out[i, :] = the residual of tokens[i], normalised: the inputs of qkv, router and gate-up.
  // gain [hidden_size].
  void Normalize(std::span<const int32_t> tokens, const float* gain, kernels::Rows out) const;
  // The same of `count` tokens from `first` on.
  void Normalize(int64_t first, int64_t count, const float* gain, kernels::Rows out) const;

  absl::Status Attend(const float* gain, const kernels::WeightMatrix& qkv);
  absl::Status AddAttentionOutput(const kernels::WeightMatrix& output);

  // bias: as of Backend::Route.
  absl::Status Route(const float* gain, const kernels::WeightMatrix& router, const float* bias);
  // The tokens that are routed to an expert, with their routing weights. Valid until FinishMlp.
  // REQUIRES: Route was called in this layer.
  const TokenRows& RoutedTo(int expert) const { return routed_[expert]; }

  // silu(gate) * up of `tokens`: [tokens, width], the inputs of a down matrix. gate_up is packed
  // as kLinear, its width a multiple of 32.
  absl::StatusOr<RowBuffer> Activate(const float* gain, std::span<const int32_t> tokens,
                                     const kernels::WeightMatrix& gate_up) const;
  // Calls sink(i, y) with y [hidden_size] = inputs[i, :] * matrix for every row, on any thread:
  // what an output or a down matrix adds.
  absl::Status Multiply(kernels::ConstRows inputs, int64_t num_rows,
                        const kernels::WeightMatrix& matrix,
                        absl::FunctionRef<void(int64_t i, const float* y)> sink) const;
  // What MLPs add to for a token: in a MoE layer the sum that FinishMlp adds to the residual, else
  // the residual.
  float* MlpOutput(int32_t token) const {
    return (mlp_sum_.is_empty() ? residual_ : mlp_sum_).From(token).data;
  }
  // REQUIRES: Route was called in this layer.
  void FinishMlp();

 private:
  TokenStates(const ModelConfig& config, const SequenceBatches& batches, kernels::Backend* backend,
              kernels::cpu::ThreadPool* pool);

  // to[r, :] += from[r, :]
  void AddRows(kernels::ConstRows from, int64_t num_rows, int64_t columns, kernels::Rows to) const;

  const ModelConfig& config_;
  const SequenceBatches& batches_;
  kernels::Backend* const backend_;
  kernels::cpu::ThreadPool* const pool_;
  const kernels::AttentionShape attention_;
  int64_t kv_block_bytes_ = 0;
  std::unique_ptr<kernels::DeviceBatch> batch_;
  RowBuffer residual_;
  RowBuffer attended_;
  RowBuffer mlp_sum_;
  std::vector<TokenRows> routed_;  // [experts], between Route and FinishMlp
};

}  // namespace wintserve::quantizer
