// For attention_cuda_bench: a cache of plausible numbers, and the roof that reading it is held to.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/plan/kv_layout.h"

namespace wintserve::kernels::cuda {

// Fills num_tiles tiles, one behind the other, with numbers between -2 and 2 that differ
// everywhere.
void LaunchFillTiles(plan::KvCacheKind kind, int head_dim, unsigned char* tiles, int64_t num_tiles,
                     cudaStream_t stream);
// values[i]: between -2 and 2.
void LaunchFillFloats(float* values, int64_t count, cudaStream_t stream);

// Reads size_bytes (a multiple of 16) as fast as it goes. `sink` is written only by chance.
void LaunchRead(const void* from, int64_t size_bytes, uint32_t* sink, int num_multiprocessors,
                cudaStream_t stream);

}  // namespace wintserve::kernels::cuda
