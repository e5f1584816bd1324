#include <cstdint>

#include "common/check.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/rows/float_product.h"

namespace wintserve::kernels::cuda {
namespace {

using plan::kFloatColumns;
using plan::kFloatSliceRows;
using plan::kFloatThreads;
using plan::kSubslices;

constexpr int kWarpThreads = 32;
constexpr int kStep = 4;  // k rows that a thread takes at once: one 16-byte read of the activations
constexpr int kStride = kSubslices * kStep;

// Block (slice or 0, row block, column block). Thread `column`, `subslice` adds up its column for
// all rows of the block over the k rows kStride * i + kStep * subslice + 0 … kStep - 1.
template <int kRows>
__global__ void __launch_bounds__(kFloatThreads)
    FloatProductKernel(FloatProductArgs args, int num_slices, bool split) {
  // First the activations [kRows][kFloatSliceRows], then the sums
  // [kSubslices][kRows][kFloatColumns].
  constexpr int kTileFloats = kRows * kFloatSliceRows;
  static_assert(kSubslices * kRows * kFloatColumns <= kTileFloats);
  static_assert(kRows % kSubslices == 0);
  __shared__ __align__(16) float tile[kTileFloats];

  const auto thread = static_cast<int>(threadIdx.x);
  const int lane_column = thread % kFloatColumns;
  const int subslice = thread / kFloatColumns;
  const int64_t column = int64_t{blockIdx.z} * kFloatColumns + lane_column;
  const int64_t first_row = int64_t{blockIdx.y} * kRows;
  const auto rows = static_cast<int>(min(int64_t{kRows}, args.num_rows - first_row));
  const int first_slice = split ? static_cast<int>(blockIdx.x) : 0;
  const int end_slice = split ? first_slice + 1 : num_slices;

  // Sums of the rows subslice, subslice + kSubslices, … over the slices so far.
  float totals[kRows / kSubslices] = {};
  for (int slice = first_slice; slice < end_slice; ++slice) {
    const int64_t first_k = int64_t{slice} * kFloatSliceRows;
    const auto num_k = static_cast<int>(min(int64_t{kFloatSliceRows}, args.k - first_k));
    __syncthreads();  // the sums of the slice before have been read
    for (int i = thread; i < kTileFloats; i += kFloatThreads) {
      const int row = i / kFloatSliceRows;
      const int k = i % kFloatSliceRows;
      tile[i] = row < rows && k < num_k
                    ? args.x.data[(first_row + row) * args.x.stride + first_k + k]
                    : 0.0f;
    }
    __syncthreads();

    float sums[kRows] = {};
    const float* w = args.w + first_k * args.n + column;
    for (int k = kStep * subslice; k < num_k; k += kStride) {
      float weights[kStep];
#pragma unroll
      for (int i = 0; i < kStep; ++i) {
        weights[i] = column < args.n && k + i < num_k ? w[(k + i) * args.n] : 0.0f;
      }
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        const float4 x = *reinterpret_cast<const float4*>(&tile[row * kFloatSliceRows + k]);
        sums[row] = fmaf(x.x, weights[0], sums[row]);
        sums[row] = fmaf(x.y, weights[1], sums[row]);
        sums[row] = fmaf(x.z, weights[2], sums[row]);
        sums[row] = fmaf(x.w, weights[3], sums[row]);
      }
    }
    __syncthreads();  // the activations have been read
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      tile[(subslice * kRows + row) * kFloatColumns + lane_column] = sums[row];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kRows / kSubslices; ++i) {
      const int row = subslice + i * kSubslices;
      float sum = 0.0f;
#pragma unroll
      for (int s = 0; s < kSubslices; ++s) {
        sum += tile[(s * kRows + row) * kFloatColumns + lane_column];
      }
      totals[i] += sum;
    }
  }
  if (column >= args.n) return;
#pragma unroll
  for (int i = 0; i < kRows / kSubslices; ++i) {
    const int row = subslice + i * kSubslices;
    if (row >= rows) break;
    if (split) {
      args.partials[(int64_t{blockIdx.x} * args.num_rows + first_row + row) * args.n + column] =
          totals[i];
    } else {
      args.y.data[(first_row + row) * args.y.stride + column] = totals[i];
    }
  }
}

constexpr int kRowThreads = 256;

__global__ void __launch_bounds__(kRowThreads)
    AddPartialsKernel(const float* partials, int num_slices, int64_t num_rows, int64_t n, Rows y) {
  const int64_t row = blockIdx.x;
  for (int64_t c = threadIdx.x; c < n; c += kRowThreads) {
    float sum = 0.0f;
    for (int slice = 0; slice < num_slices; ++slice) {
      sum += partials[(slice * num_rows + row) * n + c];
    }
    y.data[row * y.stride + c] = sum;
  }
}

constexpr int kSelectWarps = 4;
constexpr int kLaneExperts = kMaxRoutedExperts / kWarpThreads;

__device__ float WarpMax(float value) {
  for (int distance = kWarpThreads / 2; distance > 0; distance /= 2) {
    value = fmaxf(value, __shfl_xor_sync(0xFFFFFFFFu, value, distance));
  }
  return value;
}

__device__ float WarpSum(float value) {
  for (int distance = kWarpThreads / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xFFFFFFFFu, value, distance);
  }
  return value;
}

// Orders candidates: the higher score, then the lower index.
struct Candidate {
  float score;
  int expert;
};
__device__ bool IsBetter(const Candidate& a, const Candidate& b) {
  return a.score > b.score || (a.score == b.score && a.expert < b.expert);
}

__device__ Candidate WarpBest(Candidate best) {
  for (int distance = kWarpThreads / 2; distance > 0; distance /= 2) {
    const Candidate other = {__shfl_xor_sync(0xFFFFFFFFu, best.score, distance),
                             __shfl_xor_sync(0xFFFFFFFFu, best.expert, distance)};
    if (IsBetter(other, best)) best = other;
  }
  return best;
}

// A warp a row; lane l holds the experts l, l + 32, … .
__global__ void __launch_bounds__(kSelectWarps* kWarpThreads)
    SelectExpertsKernel(SelectExpertsArgs args) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
  const int64_t row =
      int64_t{blockIdx.x} * kSelectWarps + static_cast<int>(threadIdx.x) / kWarpThreads;
  if (row >= args.num_rows) return;
  const int num_experts = args.shape.num_experts;
  const int64_t logit_row = args.route_as == nullptr ? row : args.route_as[row];

  float probabilities[kLaneExperts];
  float maximum = -INFINITY;
#pragma unroll
  for (int i = 0; i < kLaneExperts; ++i) {
    const int expert = lane + i * kWarpThreads;
    if (expert >= num_experts) break;
    float logit = 0.0f;
    for (int slice = 0; slice < args.num_slices; ++slice) {
      logit += args.logits[(slice * args.num_rows + logit_row) * num_experts + expert];
    }
    probabilities[i] = logit;
    maximum = fmaxf(maximum, logit);
  }
  maximum = WarpMax(maximum);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kLaneExperts; ++i) {
    if (lane + i * kWarpThreads >= num_experts) break;
    probabilities[i] = expf(probabilities[i] - maximum);
    sum += probabilities[i];
  }
  sum = WarpSum(sum);

  // Scores of experts that are not chosen yet; a NaN is worst, so that ids stay distinct.
  float scores[kLaneExperts];
#pragma unroll
  for (int i = 0; i < kLaneExperts; ++i) {
    const int expert = lane + i * kWarpThreads;
    if (expert >= num_experts) break;
    probabilities[i] /= sum;
    // A plain addition: a bias near 40 has a spacing of 4e-6, and near-ties depend on it.
    const float score =
        args.bias == nullptr ? probabilities[i] : __fadd_rn(probabilities[i], args.bias[expert]);
    scores[i] = isnan(score) ? -INFINITY : score;
  }
  uint32_t chosen = 0;              // bit i: probabilities[i] was chosen
  float chosen_probability = 0.0f;  // of the slot that is this lane's
  float chosen_sum = 0.0f;
  for (int slot = 0; slot < args.shape.top_k; ++slot) {
    Candidate best = {-INFINITY, kMaxRoutedExperts};
#pragma unroll
    for (int i = 0; i < kLaneExperts; ++i) {
      const int expert = lane + i * kWarpThreads;
      if (expert >= num_experts) break;
      const Candidate candidate = {scores[i], expert};
      if ((chosen >> i & 1) == 0 && IsBetter(candidate, best)) best = candidate;
    }
    best = WarpBest(best);
    float probability = 0.0f;
#pragma unroll
    for (int i = 0; i < kLaneExperts; ++i) {
      if (lane + i * kWarpThreads != best.expert) continue;
      chosen |= 1u << i;
      probability = probabilities[i];
    }
    probability = __shfl_sync(0xFFFFFFFFu, probability, best.expert % kWarpThreads);
    chosen_sum += probability;
    if (lane == slot) {
      chosen_probability = probability;
      args.expert_ids[row * args.shape.top_k + slot] = best.expert;
    }
  }
  if (lane < args.shape.top_k) {
    args.expert_weights[row * args.shape.top_k + lane] =
        chosen_probability / fmaxf(chosen_sum, args.shape.norm_min);
  }
}

}  // namespace

void LaunchFloatProduct(const plan::FloatProductPlan& plan, const FloatProductArgs& args,
                        cudaStream_t stream) {
  if (args.num_rows == 0) return;
  const LaunchShape shape = {
      .grid = dim3(plan.grid_slices, plan.grid_row_blocks, plan.grid_column_blocks),
      .block = kFloatThreads};
  if (plan.block_rows == plan::kManyRows) {
    CUDA_LAUNCH(FloatProductKernel<plan::kManyRows>, shape, stream, args, plan.num_slices,
                plan.split);
  } else {
    CHECK(plan.block_rows == plan::kFewRows, "block_rows={}", plan.block_rows);
    CUDA_LAUNCH(FloatProductKernel<plan::kFewRows>, shape, stream, args, plan.num_slices,
                plan.split);
  }
}

void LaunchAddPartials(const float* partials, int num_slices, int64_t num_rows, int64_t n, Rows y,
                       cudaStream_t stream) {
  if (num_rows == 0) return;
  const LaunchShape shape = {.grid = static_cast<unsigned>(num_rows), .block = kRowThreads};
  CUDA_LAUNCH(AddPartialsKernel, shape, stream, partials, num_slices, num_rows, n, y);
}

void LaunchSelectExperts(const SelectExpertsArgs& args, cudaStream_t stream) {
  const RouterShape& router = args.shape;
  CHECK(router.num_experts <= kMaxRoutedExperts && router.top_k <= kMaxChosenExperts &&
            router.top_k >= 1 && router.top_k <= router.num_experts,
        "num_experts={} top_k={}", router.num_experts, router.top_k);
  if (args.num_rows == 0) return;
  const LaunchShape shape = {
      .grid = static_cast<unsigned>((args.num_rows + kSelectWarps - 1) / kSelectWarps),
      .block = kSelectWarps * kWarpThreads};
  CUDA_LAUNCH(SelectExpertsKernel, shape, stream, args);
}

}  // namespace wintserve::kernels::cuda
