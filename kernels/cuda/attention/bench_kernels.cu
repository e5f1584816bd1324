#include "kernels/cuda/attention/bench_kernels.h"
#include "kernels/cuda/launch.h"

namespace wintserve::kernels::cuda {
namespace {

using plan::KvCacheKind;

constexpr int kThreads = 256;

__device__ uint32_t Hash(uint64_t index) {
  uint64_t x = index * 0x9E3779B97F4A7C15ull;
  x ^= x >> 32;
  x *= 0xD6E8FEB86659FD93ull;
  return static_cast<uint32_t>(x >> 32);
}

__device__ unsigned GridThread() { return blockIdx.x * kThreads + threadIdx.x; }

__global__ void FillTilesKernel(KvCacheKind kind, int head_dim, unsigned char* tiles,
                                int64_t num_tiles) {
  const int tile_words = plan::KvTileBytes(kind, head_dim) / 4;
  const int data_words = plan::kKvTileTokens * plan::KvRowBytes(kind, head_dim) / 4;
  const int64_t count = num_tiles * tile_words;
  for (int64_t i = GridThread(); i < count; i += int64_t{gridDim.x} * kThreads) {
    uint32_t word = Hash(i);
    if (kind == KvCacheKind::kBfloat16) {
      // Sign and mantissa at random, exponents of 1/16 … 1.
      word = (word & 0x81FF81FFu) | 0x3D803D80u;
    } else if (i % tile_words >= data_words) {
      word = (word & 0x03FF03FFu) | 0x20002000u;  // halves of 1/128 … 1/64
    }
    reinterpret_cast<uint32_t*>(tiles)[i] = word;
  }
}

__global__ void FillFloatsKernel(float* values, int64_t count) {
  for (int64_t i = GridThread(); i < count; i += int64_t{gridDim.x} * kThreads) {
    values[i] = static_cast<float>(static_cast<int32_t>(Hash(i))) * 0x1p-30f;
  }
}

__global__ void __launch_bounds__(kThreads)
    ReadKernel(const uint4* from, int64_t count, uint32_t* sink) {
  constexpr int kAtOnce = 8;
  uint32_t sum = 0;
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  int64_t i = GridThread();
  for (; i + (kAtOnce - 1) * stride < count; i += kAtOnce * stride) {
    uint4 values[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) values[j] = __ldcs(from + i + j * stride);
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      sum += values[j].x ^ values[j].y ^ values[j].z ^ values[j].w;
    }
  }
  for (; i < count; i += stride) {
    const uint4 value = __ldcs(from + i);
    sum += value.x ^ value.y ^ value.z ^ value.w;
  }
  if (sum == 0x12345678u) *sink = sum;
}

}  // namespace

void LaunchFillTiles(KvCacheKind kind, int head_dim, unsigned char* tiles, int64_t num_tiles,
                     cudaStream_t stream) {
  const LaunchShape shape = {.grid = 4096, .block = kThreads};
  CUDA_LAUNCH(FillTilesKernel, shape, stream, kind, head_dim, tiles, num_tiles);
}

void LaunchFillFloats(float* values, int64_t count, cudaStream_t stream) {
  const LaunchShape shape = {.grid = 1024, .block = kThreads};
  CUDA_LAUNCH(FillFloatsKernel, shape, stream, values, count);
}

void LaunchRead(const void* from, int64_t size_bytes, uint32_t* sink, int num_multiprocessors,
                cudaStream_t stream) {
  const int64_t count = size_bytes / 16;
  const int64_t wanted = (count + 8 * kThreads - 1) / (8 * kThreads);
  const int64_t blocks = wanted < num_multiprocessors * 8 ? wanted : num_multiprocessors * 8;
  const LaunchShape shape = {.grid = static_cast<unsigned>(blocks), .block = kThreads};
  CUDA_LAUNCH(ReadKernel, shape, stream, static_cast<const uint4*>(from), count, sink);
}

}  // namespace wintserve::kernels::cuda
