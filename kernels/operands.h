// Plain data that operators take, for host and device code.
#pragma once

#include <cstdint>

namespace wintserve::kernels {

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

struct AttentionShape {
  int num_heads = 0;
  int num_kv_heads = 0;  // query head h reads KV head h / (num_heads / num_kv_heads)
  int head_dim = 0;      // even
  int64_t qkv_columns() const { return int64_t{num_heads + 2 * num_kv_heads} * head_dim; }
};

struct RouterShape {
  int num_experts = 0;
  int top_k = 0;
  float norm_min = 0;  // lower bound of the sum that the chosen probabilities are divided by
};

}  // namespace wintserve::kernels
