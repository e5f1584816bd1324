#include "kernels/cuda/attention/kernel_entries.cuh"

namespace wintserve::kernels::cuda {

AttentionKernelEntry Bfloat16Head64Attention(int num_warps) {
  return EntryOf<KvCacheKind::kBfloat16, 64>(num_warps);
}

}  // namespace wintserve::kernels::cuda
