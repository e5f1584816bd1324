// How the CUDA sampler divides a row of logits among thread blocks, and what each keeps in shared
// memory. Pure arithmetic, the same on host and device.
#pragma once

#include <cstdint>

#include "kernels/plan/host_device.h"

namespace wintserve::kernels::plan {

inline constexpr int kSamplingThreads = 512;
inline constexpr int kSamplingWarps = kSamplingThreads / 32;
// Consecutive ids that a warp looks at together, four a lane.
inline constexpr int kSamplingChunk = 128;
// Bins of a histogram, one a thread.
inline constexpr int kSamplingBins = kSamplingThreads;
// Candidates that one block sorts, two a thread.
inline constexpr int kSamplingListSize = 2 * kSamplingThreads;
// Block clusters of 8 are the largest that every device with clusters has.
inline constexpr int kMaxSamplingBlocksPerRow = 8;

struct SamplingDevice {
  int num_sms = 0;
  int max_shared_bytes_per_block = 0;
  int max_shared_bytes_per_sm = 0;
  int max_blocks_per_row = 1;  // 1: no clusters; a power of two
  // With fewer, exchanging results between blocks takes longer than the passes over the ids.
  int min_ids_per_block = 4096;
};

// Blocks share a row as a cluster: block i of it has ids i * ids_per_block and on. A block keeps
// the first num_cached of them in shared memory; the rest it reads again in every pass.
struct SamplingPlan {
  int blocks_per_row = 1;
  int ids_per_block = 0;  // a multiple of kSamplingChunk
  int num_cached = 0;     // a multiple of kSamplingChunk, at most ids_per_block
  int fixed_bytes = 0;    // of shared memory that come first; a multiple of 16

  WINTSERVE_HOST_DEVICE constexpr int num_chunks() const { return ids_per_block / kSamplingChunk; }
  // Byte offsets in a block's shared memory, each a multiple of 16: a sum for every chunk, a bit
  // for every id, the cached logits.
  WINTSERVE_HOST_DEVICE constexpr int chunk_sums_offset() const { return fixed_bytes; }
  WINTSERVE_HOST_DEVICE constexpr int marks_offset() const {
    return chunk_sums_offset() + (num_chunks() + 1) / 2 * 2 * static_cast<int>(sizeof(uint64_t));
  }
  WINTSERVE_HOST_DEVICE constexpr int cache_offset() const {
    return marks_offset() + ids_per_block / 8;
  }
  WINTSERVE_HOST_DEVICE constexpr int shared_bytes() const {
    return cache_offset() + num_cached * static_cast<int>(sizeof(float));
  }
};

// The most blocks a row that leave every block a multiprocessor of its own, if the row is long
// enough to be worth them.
// REQUIRES: num_rows >= 1, vocabulary >= 1, fixed_bytes a multiple of 16.
constexpr SamplingPlan PlanSampling(int num_rows, int vocabulary, int fixed_bytes,
                                    const SamplingDevice& device) {
  SamplingPlan plan = {.fixed_bytes = fixed_bytes};
  while (plan.blocks_per_row * 2 <= device.max_blocks_per_row &&
         int64_t{num_rows} * plan.blocks_per_row * 2 <= device.num_sms &&
         int64_t{plan.blocks_per_row} * 2 * device.min_ids_per_block <= vocabulary) {
    plan.blocks_per_row *= 2;
  }
  const int chunks = (vocabulary + kSamplingChunk - 1) / kSamplingChunk;
  plan.ids_per_block = (chunks + plan.blocks_per_row - 1) / plan.blocks_per_row * kSamplingChunk;
  // With more blocks than multiprocessors two share one; each takes 1 KiB for the system.
  const bool is_alone = int64_t{num_rows} * plan.blocks_per_row <= device.num_sms;
  const int half = device.max_shared_bytes_per_sm / 2 - 1024;
  const int budget =
      (is_alone || half > device.max_shared_bytes_per_block ? device.max_shared_bytes_per_block
                                                            : half) -
      plan.cache_offset();
  const int fitting = budget / static_cast<int>(sizeof(float)) / kSamplingChunk * kSamplingChunk;
  plan.num_cached = fitting < 0 ? 0 : fitting > plan.ids_per_block ? plan.ids_per_block : fitting;
  return plan;
}

}  // namespace wintserve::kernels::plan
