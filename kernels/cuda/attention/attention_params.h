// What the kernels of this room are given. All pointers are device memory.
#pragma once

#include <cstdint>

#include "kernels/plan/attention_plan.h"

namespace wintserve::kernels::cuda {

// The batch: chunk i holds tokens first_token[i] … + length[i] - 1 and continues a sequence at
// position[i]. All of it may change between two replays of a captured launch but for the pointers
// and the two counts, which are upper bounds.
struct SequenceArrays {
  int32_t num_sequences = 0;
  int32_t num_tokens = 0;
  const int32_t* first_token = nullptr;     // [num_sequences]
  const int32_t* position = nullptr;        // [num_sequences]
  const int32_t* length = nullptr;          // [num_sequences]; 0: no sequence
  const int32_t* token_sequence = nullptr;  // [num_tokens] index of its chunk; -1: no token
  // [num_sequences, block_table_stride] pool blocks of tokens 0 … 63, 64 … 127 and so on; entries
  // behind position + length tokens are not read.
  const int32_t* block_tables = nullptr;
  int64_t block_table_stride = 0;
};

struct DeviceKvLayer {
  unsigned char* pool = nullptr;   // aligned to 128 bytes, as are the offsets
  int64_t block_stride_bytes = 0;  // from one block to the next
  int64_t layer_offset_bytes = 0;  // from a block's start to this layer
};

struct AttentionParams {
  SequenceArrays sequences;
  DeviceKvLayer kv;
  const float* qkv = nullptr;
  int64_t qkv_stride = 0;
  float* out = nullptr;
  int64_t out_stride = 0;
  float query_scale = 0;  // log2(e) / sqrt(head_dim)
  plan::AttentionWork work;
  // Scratch for work.max_partials sums; the counters are 0 before and after a launch.
  float* partials = nullptr;
  int32_t* arrivals = nullptr;
};

struct AppendKvParams {
  SequenceArrays sequences;
  DeviceKvLayer kv;
  int32_t num_heads = 0;
  int32_t num_kv_heads = 0;
  const float* cos_sin = nullptr;
  int64_t cos_sin_stride = 0;
  float* qkv = nullptr;
  int64_t qkv_stride = 0;
};

}  // namespace wintserve::kernels::cuda
