#include <algorithm>
#include <limits>

#include "common/check.h"
#include "kernels/cuda/attention/append_kv_kernel.cuh"
#include "kernels/cuda/attention/attention.h"
#include "kernels/cuda/attention/kernel_entries.h"
#include "kernels/cuda/launch.h"

namespace wintserve::kernels::cuda {
namespace {

using plan::kAttentionWarps;
using plan::KvCacheKind;

constexpr int kWarpThreads = 32;

AttentionKernelEntry FindEntry(KvCacheKind kind, int head_dim, int num_warps) {
  CHECK(head_dim == 64 || head_dim == 128, "head_dim={}", head_dim);
  if (kind == KvCacheKind::kInt8) {
    return head_dim == 64 ? Int8Head64Attention(num_warps) : Int8Head128Attention(num_warps);
  }
  return head_dim == 64 ? Bfloat16Head64Attention(num_warps) : Bfloat16Head128Attention(num_warps);
}

int SizeOf(int num_warps) {
  return static_cast<int>(std::find(kAttentionWarps.begin(), kAttentionWarps.end(), num_warps) -
                          kAttentionWarps.begin());
}

// As many as run at a time.
int GridBlocks(const AttentionSetup& setup, int num_warps) {
  return setup.num_multiprocessors * setup.blocks_per_multiprocessor[SizeOf(num_warps)];
}

void LaunchPlanned(const AttentionSetup& setup, const AttentionArgs& args,
                   const plan::AttentionLaunch& launch, cudaStream_t stream) {
  const AttentionKernelEntry entry = FindEntry(setup.kind, setup.head_dim, launch.num_warps);
  const int64_t partials =
      args.scratch.partials_bytes / (entry.partial_floats * static_cast<int64_t>(sizeof(float)));
  AttentionParams params;
  params.sequences = args.sequences;
  params.kv = args.kv;
  params.qkv = args.qkv;
  params.qkv_stride = args.qkv_stride;
  params.out = args.out;
  params.out_stride = args.out_stride;
  params.query_scale = plan::QueryScale(setup.head_dim);
  params.work = launch.work;
  params.work.max_partials =
      static_cast<int32_t>(std::min<int64_t>(partials, args.scratch.num_arrivals));
  params.partials = args.scratch.partials;
  params.arrivals = args.scratch.arrivals;
  const LaunchShape shape = {.grid = static_cast<unsigned>(GridBlocks(setup, launch.num_warps)),
                             .block = static_cast<unsigned>(launch.num_warps * kWarpThreads),
                             .shared_bytes = static_cast<size_t>(entry.shared_bytes),
                             .overlaps_previous = true};
  CUDA_LAUNCH(entry.kernel, shape, stream, params);
}

template <KvCacheKind kKind, int kHeadDim>
void LaunchAppend(const AppendKvArgs& args, cudaStream_t stream) {
  const AppendKvParams params = {.sequences = args.sequences,
                                 .kv = args.kv,
                                 .num_heads = args.num_heads,
                                 .num_kv_heads = args.num_kv_heads,
                                 .cos_sin = args.cos_sin,
                                 .cos_sin_stride = args.cos_sin_stride,
                                 .qkv = args.qkv,
                                 .qkv_stride = args.qkv_stride};
  const int64_t num_warps =
      int64_t{args.sequences.num_tokens} * (args.num_heads + 2 * args.num_kv_heads);
  const LaunchShape shape = {
      .grid = static_cast<unsigned>((num_warps + kAppendWarps - 1) / kAppendWarps),
      .block = kAppendWarps * kWarpThreads,
      .overlaps_previous = true};
  CUDA_LAUNCH((RopeAndAppendKvKernel<kKind, kHeadDim>), shape, stream, params);
}

}  // namespace

AttentionSetup PrepareAttention(KvCacheKind kind, int head_dim) {
  AttentionSetup setup;
  setup.kind = kind;
  setup.head_dim = head_dim;
  int device = 0;
  CUDA_CALL(cudaGetDevice, &device);
  CUDA_CALL(cudaDeviceGetAttribute, &setup.num_multiprocessors, cudaDevAttrMultiProcessorCount,
            device);
  for (size_t size = 0; size < kAttentionWarps.size(); ++size) {
    const int num_warps = kAttentionWarps[size];
    const AttentionKernelEntry entry = FindEntry(kind, head_dim, num_warps);
    AllowSharedMemory(entry.kernel, entry.shared_bytes);
    int blocks = 0;
    CUDA_CALL(cudaOccupancyMaxActiveBlocksPerMultiprocessor, &blocks, entry.kernel,
              num_warps * kWarpThreads, static_cast<size_t>(entry.shared_bytes));
    CHECK(blocks > 0, "num_warps={} shared_bytes={}", num_warps, entry.shared_bytes);
    setup.blocks_per_multiprocessor[size] = blocks;
  }
  return setup;
}

int32_t NumAttentionArrivals(int64_t partials_bytes, int head_dim) {
  const int64_t smallest = FindEntry(KvCacheKind::kBfloat16, head_dim, 1).partial_floats *
                           static_cast<int64_t>(sizeof(float));
  return static_cast<int32_t>(
      std::min<int64_t>(partials_bytes / smallest, std::numeric_limits<int32_t>::max()));
}

void LaunchAttention(const AttentionSetup& setup, const AttentionArgs& args, cudaStream_t stream) {
  CHECK(args.num_kv_heads > 0 && args.num_heads % args.num_kv_heads == 0, "heads {} KV heads {}",
        args.num_heads, args.num_kv_heads);
  CHECK(args.qkv_stride % 4 == 0 && args.out_stride % 4 == 0, "strides {} {}", args.qkv_stride,
        args.out_stride);
  if (args.sequences.num_sequences == 0 || args.max_length == 0) return;
  CHECK(int64_t{args.max_length} * args.num_heads <= std::numeric_limits<int32_t>::max(),
        "max_length={}", args.max_length);
  const plan::AttentionLaunches planned = plan::PlanAttention(
      args.sequences.num_sequences, args.sequences.num_tokens, args.max_length, args.num_heads,
      args.num_kv_heads, setup.num_multiprocessors, GridBlocks(setup, /*num_warps=*/1));
  for (int i = 0; i < planned.count; ++i) LaunchPlanned(setup, args, planned.launches[i], stream);
}

void LaunchRopeAndAppendKv(const AppendKvArgs& args, cudaStream_t stream) {
  CHECK(args.head_dim == 64 || args.head_dim == 128, "head_dim={}", args.head_dim);
  CHECK(args.qkv_stride % 4 == 0, "qkv_stride={}", args.qkv_stride);
  if (args.sequences.num_tokens == 0) return;
  const bool is_int8 = args.kind == KvCacheKind::kInt8;
  if (args.head_dim == 128) {
    is_int8 ? LaunchAppend<KvCacheKind::kInt8, 128>(args, stream)
            : LaunchAppend<KvCacheKind::kBfloat16, 128>(args, stream);
  } else {
    is_int8 ? LaunchAppend<KvCacheKind::kInt8, 64>(args, stream)
            : LaunchAppend<KvCacheKind::kBfloat16, 64>(args, stream);
  }
}

}  // namespace wintserve::kernels::cuda
