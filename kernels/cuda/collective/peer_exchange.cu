#include <algorithm>
#include <cstdint>

#include "common/check.h"
#include "kernels/cuda/collective/peer_exchange.h"
#include "kernels/cuda/device_ops.h"
#include "kernels/cuda/launch.h"

namespace wintserve::kernels::cuda {
namespace {

constexpr int kThreads = 512;
// A look at the abort word crosses the bus to the host.
constexpr int kPollsPerAbortCheck = 256;

enum class Exchange { kAllReduce, kAllGather, kBroadcast };

__device__ void StoreRelease(uint64_t* to, uint64_t value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(to), "l"(value) : "memory");
}
__device__ uint64_t LoadAcquire(const uint64_t* from) {
  uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(from) : "memory");
  return value;
}
__device__ uint32_t LoadVolatile(const uint32_t* from) {
  return *static_cast<const volatile uint32_t*>(from);
}

__device__ float Sum(float a, float b) { return __fadd_rn(a, b); }
__device__ float4 Sum(float4 a, float4 b) {
  return make_float4(__fadd_rn(a.x, b.x), __fadd_rn(a.y, b.y), __fadd_rn(a.z, b.z),
                     __fadd_rn(a.w, b.w));
}

__device__ PeerControl* ControlOf(const PeerGroup& group, int rank) {
  return reinterpret_cast<PeerControl*>(group.memory[rank]);
}

// Where `writer` leaves its part in `owner`'s memory.
template <typename Vector>
__device__ Vector* SlotOf(const PeerGroup& group, uint64_t round, int phase, int owner,
                          int writer) {
  const int64_t index = (static_cast<int64_t>(round % 2) * 2 + phase) * group.world_size + writer;
  return reinterpret_cast<Vector*>(group.memory[owner] + kPeerControlBytes +
                                   index * kPeerSlotBytes);
}

__device__ uint64_t NextRound(const PeerGroup& group) {
  return *static_cast<const volatile uint64_t*>(&ControlOf(group, group.rank)->round) + 1;
}

// What this block has written to the others' memory becomes theirs, and what the same block of
// every other rank has written is seen when this returns. With an abort it returns early.
__device__ void ExchangeFlags(const PeerGroup& group, uint64_t round, int phase) {
  __syncthreads();
  const int peer = static_cast<int>(threadIdx.x);
  if (peer < group.world_size && peer != group.rank) {
    // A release is cumulative: it stands for all threads that were in the barrier before.
    StoreRelease(&ControlOf(group, peer)->written[phase][blockIdx.x][group.rank], round);
    const uint64_t* theirs = &ControlOf(group, group.rank)->written[phase][blockIdx.x][peer];
    for (int polls = 1; LoadAcquire(theirs) < round; ++polls) {
      if (polls % kPollsPerAbortCheck == 0 && LoadVolatile(group.abort_word) != 0) break;
    }
  }
  __syncthreads();
}

// The last block to come here ends the round for the next launch.
__device__ void EndRound(const PeerGroup& group, uint64_t round) {
  if (threadIdx.x != 0) return;
  PeerControl* control = ControlOf(group, group.rank);
  if (FetchAndAdd(&control->arrivals, 1) != NumBlocks() - 1) return;
  control->arrivals = 0;
  control->round = round;
}

// In units of Vector. The places that a thread reads and writes depend on nothing but count and the
// grid, which are the same on all ranks, so that blocks need not wait for each other's.
template <Exchange kExchange, typename Vector>
WINTSERVE_KERNEL(kThreads)
OneShotKernel(WINTSERVE_PARAMS PeerGroup group, const Vector* in, int64_t count, Vector* out) {
  WaitForPreviousKernel();
  LetNextKernelBegin();
  const uint64_t round = NextRound(group);
  const int64_t first = int64_t{BlockIndex()} * kThreads + ThreadIndex();
  const int64_t step = int64_t{NumBlocks()} * kThreads;
  if (kExchange != Exchange::kBroadcast || group.rank == 0) {
    for (int64_t i = first; i < count; i += step) {
      const Vector value = in[i];
      WINTSERVE_UNROLL
      for (int peer = 0; peer < kMaxPeerRanks; ++peer) {
        if (peer >= group.world_size || peer == group.rank) continue;
        SlotOf<Vector>(group, round, 0, peer, group.rank)[i] = value;
      }
    }
  }
  ExchangeFlags(group, round, 0);
  const auto part = [&](int rank, int64_t i) {
    return rank == group.rank ? in[i]
                              : __ldcg(SlotOf<Vector>(group, round, 0, group.rank, rank) + i);
  };
  for (int64_t i = first; i < count; i += step) {
    if constexpr (kExchange == Exchange::kAllReduce) {
      Vector sum = part(0, i);
      for (int rank = 1; rank < group.world_size; ++rank) sum = Sum(sum, part(rank, i));
      out[i] = sum;
    } else if constexpr (kExchange == Exchange::kAllGather) {
      for (int rank = 0; rank < group.world_size; ++rank) out[rank * count + i] = part(rank, i);
    } else if (group.rank != 0) {
      out[i] = part(0, i);
    }
  }
  EndRound(group, round);
}

// Rank p adds up places p * share … (p + 1) * share - 1.
template <typename Vector>
WINTSERVE_KERNEL(kThreads)
TwoShotKernel(WINTSERVE_PARAMS PeerGroup group, Vector* data, int64_t count) {
  WaitForPreviousKernel();
  LetNextKernelBegin();
  const uint64_t round = NextRound(group);
  const int64_t share = (count + group.world_size - 1) / group.world_size;
  const int64_t first = int64_t{BlockIndex()} * kThreads + ThreadIndex();
  const int64_t step = int64_t{NumBlocks()} * kThreads;
  for (int64_t j = first; j < share; j += step) {
    for (int peer = 0; peer < group.world_size; ++peer) {
      const int64_t i = peer * share + j;
      if (peer == group.rank || i >= count) continue;
      SlotOf<Vector>(group, round, 0, peer, group.rank)[j] = data[i];
    }
  }
  ExchangeFlags(group, round, 0);
  for (int64_t j = first; j < share; j += step) {
    const int64_t i = group.rank * share + j;
    if (i >= count) break;
    const auto part = [&](int rank) {
      return rank == group.rank ? data[i]
                                : __ldcg(SlotOf<Vector>(group, round, 0, group.rank, rank) + j);
    };
    Vector sum = part(0);
    for (int rank = 1; rank < group.world_size; ++rank) sum = Sum(sum, part(rank));
    data[i] = sum;
    for (int peer = 0; peer < group.world_size; ++peer) {
      if (peer != group.rank) SlotOf<Vector>(group, round, 1, peer, group.rank)[j] = sum;
    }
  }
  ExchangeFlags(group, round, 1);
  for (int64_t j = first; j < share; j += step) {
    for (int rank = 0; rank < group.world_size; ++rank) {
      const int64_t i = rank * share + j;
      if (rank == group.rank || i >= count) continue;
      data[i] = __ldcg(SlotOf<Vector>(group, round, 1, group.rank, rank) + j);
    }
  }
  EndRound(group, round);
}

LaunchShape ShapeFor(int64_t num_vectors) {
  const int64_t blocks = (num_vectors + kThreads - 1) / kThreads;
  return {.grid = static_cast<unsigned>(std::clamp<int64_t>(blocks, 1, kMaxPeerBlocks)),
          .block = kThreads,
          .overlaps_previous = true};
}

bool TakesVectors(const void* a, const void* b, int64_t count) {
  constexpr int64_t kWidth = sizeof(float4) / sizeof(float);
  return reinterpret_cast<uintptr_t>(a) % sizeof(float4) == 0 &&
         reinterpret_cast<uintptr_t>(b) % sizeof(float4) == 0 && count % kWidth == 0;
}

void CheckGroup(const PeerGroup& group, int64_t count, int64_t max_count) {
  CHECK(group.world_size >= 2 && group.world_size <= kMaxPeerRanks && group.rank >= 0 &&
            group.rank < group.world_size,
        "rank {} of {}", group.rank, group.world_size);
  CHECK(count >= 1 && count <= max_count, "count={} max_count={}", count, max_count);
}

constexpr int64_t kSlotFloats = kPeerSlotBytes / static_cast<int64_t>(sizeof(float));

template <Exchange kExchange>
void LaunchOneShot(const PeerGroup& group, const float* in, int64_t count, float* out,
                   cudaStream_t stream) {
  CheckGroup(group, count, kSlotFloats);
  if (TakesVectors(in, out, count)) {
    CUDA_LAUNCH((OneShotKernel<kExchange, float4>), ShapeFor(count / 4), stream, group,
                reinterpret_cast<const float4*>(in), count / 4, reinterpret_cast<float4*>(out));
  } else {
    CUDA_LAUNCH((OneShotKernel<kExchange, float>), ShapeFor(count), stream, group, in, count, out);
  }
}

template <typename... Params>
void Load(void (*kernel)(Params...)) {
  cudaFuncAttributes attributes;
  CUDA_CALL(cudaFuncGetAttributes, &attributes, reinterpret_cast<const void*>(kernel));
}

}  // namespace

void PreparePeerExchange() {
  Load(OneShotKernel<Exchange::kAllReduce, float4>);
  Load(OneShotKernel<Exchange::kAllReduce, float>);
  Load(OneShotKernel<Exchange::kAllGather, float4>);
  Load(OneShotKernel<Exchange::kAllGather, float>);
  Load(OneShotKernel<Exchange::kBroadcast, float4>);
  Load(OneShotKernel<Exchange::kBroadcast, float>);
  Load(TwoShotKernel<float4>);
  Load(TwoShotKernel<float>);
}

void LaunchPeerAllReduce(const PeerGroup& group, float* data, int64_t count, cudaStream_t stream) {
  LaunchOneShot<Exchange::kAllReduce>(group, data, count, data, stream);
}

void LaunchPeerTwoShotAllReduce(const PeerGroup& group, float* data, int64_t count,
                                cudaStream_t stream) {
  CheckGroup(group, count, group.world_size * kSlotFloats);
  const auto share = [&](int64_t num_vectors) {
    return (num_vectors + group.world_size - 1) / group.world_size;
  };
  if (TakesVectors(data, data, count)) {
    CUDA_LAUNCH((TwoShotKernel<float4>), ShapeFor(share(count / 4)), stream, group,
                reinterpret_cast<float4*>(data), count / 4);
  } else {
    CUDA_LAUNCH((TwoShotKernel<float>), ShapeFor(share(count)), stream, group, data, count);
  }
}

void LaunchPeerAllGather(const PeerGroup& group, const float* in, int64_t count, float* out,
                         cudaStream_t stream) {
  LaunchOneShot<Exchange::kAllGather>(group, in, count, out, stream);
}

void LaunchPeerBroadcast(const PeerGroup& group, float* data, int64_t count, cudaStream_t stream) {
  LaunchOneShot<Exchange::kBroadcast>(group, data, count, data, stream);
}

}  // namespace wintserve::kernels::cuda
