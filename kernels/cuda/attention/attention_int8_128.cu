#include "kernels/cuda/attention/kernel_entries.cuh"

namespace wintserve::kernels::cuda {

AttentionKernelEntry Int8Head128Attention(int num_warps) {
  return EntryOf<KvCacheKind::kInt8, 128>(num_warps);
}

}  // namespace wintserve::kernels::cuda
