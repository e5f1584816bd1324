// The one interface that a model's graph calls: the operators of a decoder on one device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "absl/status/statusor.h"
#include "kernels/formats/matrix.h"

namespace wintserve::kernels {

// Tokens of one block of the KV pool.
inline constexpr int kKvBlockTokens = 64;

// Activations in device memory: element (row, column) of a float32 matrix lies at
// data[row * stride + column], stride >= columns. A stride that is not a multiple of 1024 floats
// keeps neighbouring rows out of each other's cache sets (see PaddedStride).
struct Rows {
  float* data = nullptr;
  int64_t stride = 0;

  float* row(int64_t r) const { return data + r * stride; }
};

struct ConstRows {
  const float* data = nullptr;
  int64_t stride = 0;

  ConstRows() = default;
  ConstRows(const float* data_in, int64_t stride_in) : data(data_in), stride(stride_in) {}
  ConstRows(Rows rows) : data(rows.data), stride(rows.stride) {}  // NOLINT: a view of the same rows
  const float* row(int64_t r) const { return data + r * stride; }
};

constexpr int64_t PaddedStride(int64_t columns) { return columns + 16; }

// Device memory; freed on destruction. The backend outlives it.
class Buffer {
 public:
  virtual ~Buffer() = default;
  virtual void* data() const = 0;
  virtual int64_t size_bytes() const = 0;
};

// A weight matrix in a layout of its backend's own. Immutable; belongs to the backend that made it.
class WeightMatrix {
 public:
  virtual ~WeightMatrix() = default;
  virtual int64_t k() const = 0;  // input features
  virtual int64_t n() const = 0;  // output features; of a gate-up matrix both halves
  virtual int64_t size_bytes() const = 0;
};

// What a pack is for: a backend may lay out the columns or rows of each differently.
enum class MatrixUse {
  kLinear,     // Linear, Route, and the down matrix of an MLP
  kGateUp,     // columns: the gate half, then the up half
  kEmbedding,  // k = vocabulary rows, n = hidden; float32 or bfloat16
};

// kFastDeploy: every decoded weight is rounded to bf16 as FastDeploy's kernels do.
// kUnrounded:  code * scale in float32; for comparing backends.
enum class WeightRounding { kFastDeploy, kUnrounded };

struct AttentionShape {
  int num_heads = 0;
  int num_kv_heads = 0;  // query head h reads KV head h / (num_heads / num_kv_heads)
  int head_dim = 0;      // even
  int64_t qkv_columns() const { return int64_t{num_heads + 2 * num_kv_heads} * head_dim; }
};

// Tokens first_token … first_token + length - 1 of the batch continue one sequence at `position`.
// Host memory; block_table covers position + length tokens and names blocks of the pool.
struct SequenceChunk {
  int64_t first_token = 0;
  int32_t position = 0;
  int32_t length = 0;
  std::span<const int32_t> block_table;
};

// One layer's share of the KV pool. A block holds [layer][K, V][kv_head][kKvBlockTokens * head_dim]
// float32; how a backend orders the last part (K may be transposed) is its own matter, so blocks
// move between backends only as opaque bytes of the same kv_layout.
struct KvLayer {
  float* pool = nullptr;     // device memory
  int64_t block_stride = 0;  // floats from one block to the next
  int64_t layer_offset = 0;  // floats from a block's start to this layer's K
};

struct RouterShape {
  int num_experts = 0;
  int top_k = 0;
  float norm_min = 0;  // lower bound of the sum that the chosen probabilities are divided by
};

struct ExpertWeights {
  const WeightMatrix* gate_up = nullptr;  // kGateUp
  const WeightMatrix* down = nullptr;     // kLinear
};

// Threading:   one thread calls; operators may run on more inside.
// Memory:      pointers in Rows, KvLayer and Route's outputs are device memory (host memory on a
//              CPU); tokens, positions, row lists, SequenceChunks and ExpertWeights are host
//              memory.
// Order:       operators run in call order; CopyToHost and CopyFromHost wait for what was called
//              before. Outputs must not overlap inputs unless an operator says so.
// Determinism: on one device type and SIMD target a row's result has the same bits in any batch and
//              with any number of threads.
// Errors:      Pack* report what a file can get wrong; a wrong shape in a call is our bug (CHECK).
class Backend {
 public:
  virtual ~Backend() = default;

  // "cpu AVX3" or the like: device and instruction set, for the log.
  virtual std::string name() const = 0;
  // Names the order of a KV block's bytes; part of the KV layout digest.
  virtual std::string kv_layout() const = 0;
  virtual WeightRounding rounding() const = 0;

  virtual std::unique_ptr<Buffer> Allocate(int64_t size_bytes) = 0;  // zeroed
  virtual void CopyFromHost(void* device, const void* host, int64_t size_bytes) = 0;
  virtual void CopyToHost(void* host, const void* device, int64_t size_bytes) = 0;

  // INVALID_ARGUMENT: a shape or scale that the kernels cannot represent; the message names it.
  virtual absl::StatusOr<std::unique_ptr<WeightMatrix>> Pack(const formats::HostMatrix& matrix,
                                                             MatrixUse use) = 0;

  // x[t, :] = table[tokens[t], :]
  virtual void Embed(const WeightMatrix& table, std::span<const int32_t> tokens, Rows x) = 0;

  // For each i: r = row_ids[i] (or i, when row_ids is empty);
  //   x[r, :] += delta[r, :]  (unless delta.data is null; written back)
  //   out[i, :] = x[r, :] / sqrt(mean(x[r, :]^2) + epsilon) * gain[:]
  virtual void AddRmsNorm(Rows x, ConstRows delta, std::span<const int32_t> row_ids,
                          int64_t num_rows, int64_t columns, const float* gain, float epsilon,
                          Rows out) = 0;

  // y [num_rows, n] = x [num_rows, k] * w [k, n]
  virtual void Linear(ConstRows x, int64_t num_rows, const WeightMatrix& w, Rows y) = 0;

  // cos_sin[t, j] = cos(a), cos_sin[t, head_dim / 2 + j] = sin(a) with
  // a = (positions[t] / compression_ratio) * theta^(-2j / head_dim), j < head_dim / 2.
  virtual void RopeAngles(std::span<const int32_t> positions, int head_dim, float theta,
                          float compression_ratio, Rows cos_sin) = 0;

  // qkv [tokens, qkv_columns]: rotates adjacent pairs of q in place, writes rotated k and plain v
  // to the tokens' places in the sequences' blocks.
  virtual void RopeAndAppendKv(const AttentionShape& shape, std::span<const SequenceChunk> chunks,
                               ConstRows cos_sin, Rows qkv, const KvLayer& kv) = 0;

  // Causal attention of the rotated q in qkv over each sequence's blocks, positions 0 … own;
  // out [tokens, num_heads * head_dim]. Scores are scaled by 1 / sqrt(head_dim).
  virtual void Attention(const AttentionShape& shape, std::span<const SequenceChunk> chunks,
                         ConstRows qkv, const KvLayer& kv, Rows out) = 0;

  // y = down(silu(gate(x)) * up(x))
  virtual void SwiGluMlp(ConstRows x, int64_t num_rows, const ExpertWeights& mlp, Rows y) = 0;

  // P = softmax(x * router); the top_k of P + bias (float32 addition; bias may be null; the lower
  // index wins a tie), best first, to expert_ids [num_rows, top_k]; P of each, divided by
  // max(their sum, norm_min), to expert_weights [num_rows, top_k].
  virtual void Route(ConstRows x, int64_t num_rows, const WeightMatrix& router, const float* bias,
                     const RouterShape& shape, int32_t* expert_ids, float* expert_weights) = 0;

  // y[r, :] = sum over a row's experts, in ascending order of index, of weight * mlp_e(x[r, :]),
  // then + shared(x[r, :]) unless shared is null.
  virtual void MoeMlp(ConstRows x, int64_t num_rows, std::span<const ExpertWeights> experts,
                      int top_k, const int32_t* expert_ids, const float* expert_weights,
                      const ExpertWeights* shared, Rows y) = 0;
};

}  // namespace wintserve::kernels
