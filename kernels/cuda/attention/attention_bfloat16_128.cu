#include "kernels/cuda/attention/kernel_entries.cuh"

namespace wintserve::kernels::cuda {

AttentionKernelEntry Bfloat16Head128Attention(int num_warps) {
  return EntryOf<KvCacheKind::kBfloat16, 128>(num_warps);
}

}  // namespace wintserve::kernels::cuda
