// For the sources behind kernel_entries.h.
#pragma once

#include "kernels/cuda/attention/attention_kernel.cuh"
#include "kernels/cuda/attention/kernel_entries.h"

namespace wintserve::kernels::cuda {

template <KvCacheKind kKind, int kHeadDim, int kWarps>
AttentionKernelEntry EntryOfWarps() {
  return {.kernel = AttentionKernel<kKind, kHeadDim, kWarps>,
          .shared_bytes = AttentionConfig<kKind, kHeadDim, kWarps>::kSharedBytes,
          .partial_floats = PartialFloats(kHeadDim, kWarps)};
}

template <KvCacheKind kKind, int kHeadDim>
AttentionKernelEntry EntryOf(int num_warps) {
  static_assert(plan::kAttentionWarps == std::array<int, 3>{1, 4, 8});
  switch (num_warps) {
    case 1:
      return EntryOfWarps<kKind, kHeadDim, 1>();
    case 4:
      return EntryOfWarps<kKind, kHeadDim, 4>();
    default:
      return EntryOfWarps<kKind, kHeadDim, 8>();
  }
}

}  // namespace wintserve::kernels::cuda
