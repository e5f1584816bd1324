// The attention kernels by cache kind and head_dim. Each has a source of its own, so that they
// compile side by side.
#pragma once

#include "kernels/cuda/attention/attention_params.h"

namespace wintserve::kernels::cuda {

struct AttentionKernelEntry {
  void (*kernel)(AttentionParams) = nullptr;
  int shared_bytes = 0;
  int partial_floats = 0;  // of one of AttentionParams::partials
};

// num_warps: one of plan::kAttentionWarps.
AttentionKernelEntry Bfloat16Head64Attention(int num_warps);
AttentionKernelEntry Bfloat16Head128Attention(int num_warps);
AttentionKernelEntry Int8Head64Attention(int num_warps);
AttentionKernelEntry Int8Head128Attention(int num_warps);

}  // namespace wintserve::kernels::cuda
