#include "kernels/cuda/attention/kernel_entries.cuh"

namespace wintserve::kernels::cuda {

AttentionKernelEntry Int8Head64Attention(int num_warps) {
  return EntryOf<KvCacheKind::kInt8, 64>(num_warps);
}

}  // namespace wintserve::kernels::cuda
