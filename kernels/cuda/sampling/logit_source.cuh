// One block's part of a row of logits, read four ids at a time.
#pragma once

#include <cstdint>

#include "kernels/cuda/device_ops.h"
#include "kernels/cuda/sampling/row_blocks.cuh"
#include "kernels/cuda/sampling/sampling_args.h"
#include "kernels/plan/sampling_plan.h"
#include "kernels/sampling/definition.h"

namespace wintserve::kernels::cuda {

struct FourLogits {
  float value[4];
};

// Ids begin … end - 1 of a row. What a logit becomes before it is read is up to `bias`, `penalties`
// and `stop_ids`; for log-probabilities nothing.
struct LogitSource {
  const float* logits = nullptr;  // of id 0
  int begin = 0;
  int end = 0;
  bool is_aligned = false;  // four ids from a multiple of 4 are one load

  const sampling::Occurrence* counts = nullptr;  // of id 0; null: no penalties
  sampling::Penalties penalties = {};
  const sampling::LogitBias* bias = nullptr;
  int num_bias = 0;
  const int32_t* stop_ids = nullptr;
  int num_stop_ids = 0;
  // In shared memory, a bit for every id from `begin`: it has a bias or is masked. Null: none is.
  uint32_t* marks = nullptr;

  float* cache = nullptr;  // in shared memory: processed logits of the first num_cached ids
  int num_cached = 0;

  WINTSERVE_DEVICE LogitSource(const float* row, int vocabulary, const RowBlocks& blocks,
                               const plan::SamplingPlan& plan)
      : logits(row),
        begin(min(vocabulary, blocks.index * plan.ids_per_block)),
        end(min(vocabulary, begin + plan.ids_per_block)),
        is_aligned(reinterpret_cast<uintptr_t>(row) % 16 == 0),
        cache(reinterpret_cast<float*>(SharedMemory() + plan.cache_offset())),
        num_cached(plan.num_cached) {}

  // Calls visit(chunk, id) in every lane, where id is the lane's first of four in that chunk.
  // kUnroll: how many reads of the logits are under way at a time.
  template <int kUnroll = 1, typename Visit>
  WINTSERVE_DEVICE void ForEachChunk(Visit visit) const {
    const int num_chunks = (end - begin + plan::kSamplingChunk - 1) / plan::kSamplingChunk;
    WINTSERVE_UNROLL_BY(kUnroll)
    for (int chunk = Warp(); chunk < num_chunks; chunk += plan::kSamplingWarps) {
      visit(chunk, FirstId(chunk));
    }
  }

  WINTSERVE_DEVICE int FirstId(int chunk) const {
    return begin + chunk * plan::kSamplingChunk + Lane() * 4;
  }

  // As the model gave them; minus infinity at and beyond `end`.
  WINTSERVE_DEVICE FourLogits ReadRaw(int id) const {
    FourLogits x;
    if (is_aligned && id + 4 <= end) {
      const float4 four = LoadFresh(reinterpret_cast<const float4*>(logits + id));
      x = {four.x, four.y, four.z, four.w};
    } else {
      for (int i = 0; i < 4; ++i) {
        x.value[i] = id + i < end ? LoadFresh(logits + id + i) : sampling::LogitOfKey(0xff800000u);
      }
    }
    return x;
  }

  // What becomes of them, in order: bias, penalties, mask (minus infinity).
  WINTSERVE_DEVICE FourLogits Process(int id, FourLogits x) const {
    const uint32_t marked =
        marks == nullptr ? 0 : marks[(id - begin) / 32] >> ((id - begin) % 32) & 0xf;
    if (counts == nullptr && marked == 0) return x;
    const FourOccurrences occurrences = ReadOccurrences(id);
    for (int i = 0; i < 4; ++i) {
      if (id + i >= end) break;
      const bool is_marked = (marked >> i & 1) != 0;
      const sampling::Occurrence occurrence = occurrences.value[i];
      if (is_marked || occurrence != 0) {
        const float added = is_marked ? BiasOf(id + i) : 0.0f;
        x.value[i] = sampling::ProcessedLogit(x.value[i], added, occurrence, penalties);
      }
      if (is_marked && IsStopId(id + i)) x.value[i] = sampling::LogitOfKey(0xff800000u);
    }
    return x;
  }

  // Processed. REQUIRES: Cache was called for ids from the cache, and a block barrier since.
  WINTSERVE_DEVICE FourLogits Read(int id) const {
    if (id - begin < num_cached) {
      const float4 four = *reinterpret_cast<const float4*>(cache + (id - begin));
      return {four.x, four.y, four.z, four.w};
    }
    return Process(id, ReadRaw(id));
  }

  WINTSERVE_DEVICE void Cache(int id, const FourLogits& x) const {
    if (id - begin >= num_cached) return;
    *reinterpret_cast<float4*>(cache + (id - begin)) =
        float4{x.value[0], x.value[1], x.value[2], x.value[3]};
  }

  // Fills the bits of `memory`, which has one for each id of the block, and makes them `marks`.
  // All threads of a block together.
  WINTSERVE_DEVICE void Mark(uint32_t* memory) {
    marks = memory;
    for (int word = ThreadIndex(); word * 32 < end - begin; word += plan::kSamplingThreads) {
      marks[word] = 0;
    }
    SyncBlock();
    for (int i = ThreadIndex(); i < num_bias; i += plan::kSamplingThreads) {
      MarkId(bias[i].id);
    }
    for (int i = ThreadIndex(); i < num_stop_ids; i += plan::kSamplingThreads) {
      MarkId(stop_ids[i]);
    }
    SyncBlock();
  }

 private:
  struct FourOccurrences {
    sampling::Occurrence value[4];
  };

  // 0 at and beyond `end`.
  WINTSERVE_DEVICE FourOccurrences ReadOccurrences(int id) const {
    if (counts == nullptr) return {};
    if (id + 4 <= end) {
      const uint4 four = *reinterpret_cast<const uint4*>(counts + id);
      return {four.x, four.y, four.z, four.w};
    }
    FourOccurrences occurrences;
    for (int i = 0; i < 4; ++i) occurrences.value[i] = id + i < end ? counts[id + i] : 0;
    return occurrences;
  }

  WINTSERVE_DEVICE void MarkId(int id) const {
    if (id >= begin && id < end) FetchAndOr(&marks[(id - begin) / 32], 1u << ((id - begin) % 32));
  }

  WINTSERVE_DEVICE float BiasOf(int id) const {
    int low = 0;
    int high = num_bias;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (bias[middle].id < id) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low < num_bias && bias[low].id == id ? bias[low].bias : 0.0f;
  }

  WINTSERVE_DEVICE bool IsStopId(int id) const {
    int low = 0;
    int high = num_stop_ids;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (stop_ids[middle] < id) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low < num_stop_ids && stop_ids[low] == id;
  }
};

}  // namespace wintserve::kernels::cuda
