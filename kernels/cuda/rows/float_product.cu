#include <cstdint>

#include "common/check.h"
#include "kernels/cuda/device_ops.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/rows/float_product.h"

namespace wintserve::kernels::cuda {
namespace {

using plan::kFloatColumns;
using plan::kFloatSectionSlices;
using plan::kFloatSliceRows;
using plan::kFloatThreads;

constexpr int kWarpThreads = 32;
constexpr int kWarps = kFloatThreads / kWarpThreads;
constexpr int kWidth = 4;  // k rows, and columns, of one thread's part of a slice
constexpr int kQuads = kFloatColumns / kWidth;
static_assert(kFloatThreads == kQuads * (kFloatSliceRows / kWidth) && kWarpThreads == 2 * kQuads);
constexpr int kRowsAtOnce = plan::kFewRows;
// Of the kRowsAtOnce x kFloatColumns sums: row thread / kFloatColumns + kOwnedStride * i.
constexpr int kOwned = kRowsAtOnce * kFloatColumns / kFloatThreads;
constexpr int kOwnedStride = kFloatThreads / kFloatColumns;

// What a thread knows of its part: weights [first_k + 0 … 3, column + 0 … 3] of each slice.
// kVector: k and n are multiples of 4 and all rows aligned to 16 bytes.
template <bool kVector>
struct FloatPart {
  const FloatProductArgs& args;
  int64_t column;

  __device__ void LoadWeights(int64_t first_k, float (&weights)[kWidth][kWidth]) const {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const int64_t k = first_k + i;
      const float* w = args.w + k * args.n + column;
      if constexpr (kVector) {
        float4 four = {};
        if (k < args.k && column < args.n) {
          four = LoadConstantEarly(reinterpret_cast<const float4*>(w));
        }
        weights[i][0] = four.x;
        weights[i][1] = four.y;
        weights[i][2] = four.z;
        weights[i][3] = four.w;
      } else {
#pragma unroll
        for (int c = 0; c < kWidth; ++c) {
          weights[i][c] = k < args.k && column + c < args.n ? LoadConstant(w + c) : 0.0f;
        }
      }
    }
  }

  // Starts copies of a slice of rows first_row … to shared memory [kRows][kFloatSliceRows]; behind
  // the last row it again, behind the last k zeros.
  template <int kRows>
  __device__ void CopyRows(int64_t first_row, int64_t slice_k, float4 (*tile)[kQuads]) const {
#pragma unroll
    for (int begin = 0; begin < kRows * kQuads; begin += kFloatThreads) {
      const int i = begin + static_cast<int>(threadIdx.x);
      if (i >= kRows * kQuads) break;
      const int64_t row = min(first_row + i / kQuads, args.num_rows - 1);
      const int64_t k = slice_k + i % kQuads * kWidth;
      const float* from = args.x.data + row * args.x.stride + k;
      if constexpr (kVector) {
        CopyToShared(SharedAddressOf(&tile[i / kQuads][i % kQuads]), from, k < args.k ? 16 : 0);
      } else {
        const auto at = [&](int c) { return k + c < args.k ? from[c] : 0.0f; };
        tile[i / kQuads][i % kQuads] = make_float4(at(0), at(1), at(2), at(3));
      }
    }
    CommitCopies();
  }
};

// Block (its slices, row block, column block). The weights of a slice lie in the block's registers;
// the threads' parts of eight rows at a time meet in shared memory.
template <int kRows, bool kVector>
__global__ void __launch_bounds__(kFloatThreads, 2)
    FloatProductKernel(FloatProductArgs args, plan::FloatProductPlan plan) {
  // In two buffers in turn: the one that is written was read before the last barrier.
  __shared__ float4 parts[2][kWarps][kRowsAtOnce][kQuads];
  __shared__ float4 tiles[2][kRows][kQuads];  // rows of a slice
  constexpr int kBatches = kRows / kRowsAtOnce;

  const auto thread = static_cast<int>(threadIdx.x);
  const int quad = thread % kQuads;
  const int group = thread / kQuads;  // of k
  const int warp = thread / kWarpThreads;
  const bool is_upper = thread % kWarpThreads >= kQuads;  // the later k of the warp's two parts
  const FloatPart<kVector> part = {args, int64_t{blockIdx.z} * kFloatColumns + quad * kWidth};
  const int64_t first_row = int64_t{blockIdx.y} * kRows;
  const auto rows = static_cast<int>(min(int64_t{kRows}, args.num_rows - first_row));
  const int first_slice = static_cast<int>(blockIdx.x) * plan.slices_per_block;
  const int end_slice = min(first_slice + plan.slices_per_block, plan.num_slices);
  const int64_t first_k = int64_t{first_slice} * kFloatSliceRows + group * kWidth;

  float weights[kWidth][kWidth];
  part.LoadWeights(first_k, weights);
  BeginAfterPreviousKernel();

  part.template CopyRows<kRows>(first_row, int64_t{first_slice} * kFloatSliceRows, tiles[0]);
  float sections[kBatches][kOwned] = {};
  float totals[kBatches][kOwned] = {};
  for (int slice = first_slice; slice < end_slice; ++slice) {
    const float4(*tile)[kQuads] = tiles[(slice - first_slice) % 2];
    if (slice + 1 < end_slice) {
      part.template CopyRows<kRows>(first_row, int64_t{slice + 1} * kFloatSliceRows,
                                    tiles[(slice + 1 - first_slice) % 2]);
      WaitForCopies<1>();
    } else {
      WaitForCopies<0>();
    }
    __syncthreads();
#pragma unroll
    for (int batch = 0; batch < kBatches; ++batch) {
      float sums[kRowsAtOnce][kWidth] = {};
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) {
        const float4 four = tile[batch * kRowsAtOnce + r][group];
        const float x[kWidth] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
#pragma unroll
          for (int c = 0; c < kWidth; ++c) sums[r][c] = fmaf(x[i], weights[i][c], sums[r][c]);
        }
      }
      // The lower lanes add up the first rows of both parts, the upper ones the others.
      const int buffer = (slice * kBatches + batch) % 2;
#pragma unroll
      for (int r = 0; r < kRowsAtOnce / 2; ++r) {
        float both[kWidth];
#pragma unroll
        for (int c = 0; c < kWidth; ++c) {
          const float low = sums[r][c];
          const float high = sums[r + kRowsAtOnce / 2][c];
          both[c] = (is_upper ? high : low) + ShuffleXor(is_upper ? low : high, kQuads);
        }
        parts[buffer][warp][is_upper ? r + kRowsAtOnce / 2 : r][quad] =
            make_float4(both[0], both[1], both[2], both[3]);
      }
      if (batch + 1 == kBatches && slice + 1 < end_slice) {
        part.LoadWeights(first_k + int64_t{slice + 1 - first_slice} * kFloatSliceRows, weights);
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kOwned; ++i) {
        const int row = thread / kFloatColumns + kOwnedStride * i;
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
          sum += reinterpret_cast<const float*>(parts[buffer][w][row])[thread % kFloatColumns];
        }
        sections[batch][i] += sum;
      }
    }
    if ((slice + 1) % kFloatSectionSlices != 0 && slice + 1 != end_slice) continue;
#pragma unroll
    for (int batch = 0; batch < kBatches; ++batch) {
#pragma unroll
      for (int i = 0; i < kOwned; ++i) {
        totals[batch][i] += sections[batch][i];
        sections[batch][i] = 0.0f;
      }
    }
  }
  const int64_t column = int64_t{blockIdx.z} * kFloatColumns + thread % kFloatColumns;
  if (column >= args.n) return;
#pragma unroll
  for (int batch = 0; batch < kBatches; ++batch) {
#pragma unroll
    for (int i = 0; i < kOwned; ++i) {
      const int row = batch * kRowsAtOnce + thread / kFloatColumns + kOwnedStride * i;
      if (row >= rows) break;
      if (plan.is_split()) {
        args.partials[(int64_t{blockIdx.x} * args.num_rows + first_row + row) * args.n + column] =
            totals[batch][i];
      } else {
        args.y.data[(first_row + row) * args.y.stride + column] = totals[batch][i];
      }
    }
  }
}

// Of sums `stride` floats apart, those of one section; all are asked for at once.
__device__ float SumOfSection(const float* sums, int64_t stride, int section, int sums_per_section,
                              int num_sums) {
  const int first = section * sums_per_section;
  const int end = min(first + sums_per_section, num_sums);
  float values[kFloatSectionSlices];
#pragma unroll
  for (int i = 0; i < kFloatSectionSlices; ++i) {
    // Behind the last one the first again, which costs nothing.
    values[i] = LoadFresh(sums + (first + i < end ? first + i : first) * stride);
  }
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kFloatSectionSlices; ++i) sum += first + i < end ? values[i] : 0.0f;
  return sum;
}

__host__ __device__ constexpr int NumSections(int num_sums, int sums_per_section) {
  return (num_sums + sums_per_section - 1) / sums_per_section;
}

constexpr int kRowThreads = 256;

__global__ void __launch_bounds__(kRowThreads)
    AddPartialsKernel(const float* partials, plan::FloatProductPlan plan, int64_t num_rows,
                      int64_t n, Rows y) {
  BeginAfterPreviousKernel();
  const int64_t row = blockIdx.x;
  const int num_sections = NumSections(plan.num_sums, plan.sums_per_section());
  for (int64_t c = threadIdx.x; c < n; c += kRowThreads) {
    float sum = 0.0f;
    for (int section = 0; section < num_sections; ++section) {
      sum += SumOfSection(partials + row * n + c, num_rows * n, section, plan.sums_per_section(),
                          plan.num_sums);
    }
    y.data[row * y.stride + c] = sum;
  }
}

constexpr int kMaxSelectThreads = 1024;
constexpr int kLaneExperts = kMaxRoutedExperts / kWarpThreads;
constexpr int kSectionFloats = 4096;  // sums of sections that are in shared memory at a time
static_assert(kSectionFloats >= kMaxRoutedExperts && kMaxSelectThreads >= kMaxRoutedExperts);

__device__ float WarpMax(float value) {
  for (int distance = kWarpThreads / 2; distance > 0; distance /= 2) {
    value = fmaxf(value, ShuffleXor(value, distance));
  }
  return value;
}

__device__ float WarpSum(float value) {
  for (int distance = kWarpThreads / 2; distance > 0; distance /= 2) {
    value += ShuffleXor(value, distance);
  }
  return value;
}

// A row's logit of expert `thread`. sections: shared memory [kSectionFloats]
__device__ float AddUpLogit(const SelectExpertsArgs& args, int64_t row, float* sections) {
  const int num_experts = args.shape.num_experts;
  const auto thread = static_cast<int>(threadIdx.x);
  const int num_sections = NumSections(args.num_sums, args.sums_per_section);
  const int at_once = kSectionFloats / num_experts;
  float logit = 0.0f;
  for (int first = 0; first < num_sections; first += at_once) {
    const int count = min(at_once, num_sections - first);
    if (first > 0) __syncthreads();  // the sections before have been read
    for (int i = thread; i < count * num_experts; i += static_cast<int>(blockDim.x)) {
      const int section = i / num_experts;
      const int expert = i - section * num_experts;
      sections[i] =
          SumOfSection(args.logits + row * num_experts + expert, args.num_rows * num_experts,
                       first + section, args.sums_per_section, args.num_sums);
    }
    __syncthreads();
    if (thread >= num_experts) continue;
#pragma unroll 16
    for (int section = 0; section < count; ++section) {
      logit += sections[section * num_experts + thread];
    }
  }
  return logit;
}

// The softmax of the row's logits [num_experts] at `expert`. For all lanes of a warp.
__device__ float ProbabilityOf(const float* logits, int num_experts, float logit) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
  float maximum = -INFINITY;
#pragma unroll
  for (int i = 0; i < kLaneExperts; ++i) {
    const int other = lane + i * kWarpThreads;
    if (other < num_experts) maximum = fmaxf(maximum, logits[other]);
  }
  maximum = WarpMax(maximum);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kLaneExperts; ++i) {
    const int other = lane + i * kWarpThreads;
    if (other < num_experts) sum += expf(logits[other] - maximum);
  }
  return expf(logit - maximum) / WarpSum(sum);
}

// How many experts are better: have a higher score or, of the same, a lower index. scores
// [num_experts rounded up to 4], what is too much minus infinity.
__device__ int RankOf(const float* scores, int num_experts, int expert, float score) {
  int rank = 0;
#pragma unroll 8
  for (int other = 0; other < num_experts; other += 4) {
    const float4 four = *reinterpret_cast<const float4*>(scores + other);
    rank += four.x > score || (four.x == score && other < expert) ? 1 : 0;
    rank += four.y > score || (four.y == score && other + 1 < expert) ? 1 : 0;
    rank += four.z > score || (four.z == score && other + 2 < expert) ? 1 : 0;
    rank += four.w > score || (four.w == score && other + 3 < expert) ? 1 : 0;
  }
  return rank;
}

// A block a row, with a thread for each expert and, where there are so many sums, more to add up.
__global__ void __launch_bounds__(kMaxSelectThreads, 1)
    SelectExpertsKernel(SelectExpertsArgs args) {
  __shared__ float sections[kSectionFloats];
  __shared__ float logits[kMaxRoutedExperts];
  __shared__ __align__(16) float scores[kMaxRoutedExperts];
  __shared__ float chosen[kMaxChosenExperts];
  const int64_t row = blockIdx.x;
  const auto expert = static_cast<int>(threadIdx.x);
  const int num_experts = args.shape.num_experts;
  const int top_k = args.shape.top_k;
  const float bias =
      args.bias != nullptr && expert < num_experts ? LoadConstantEarly(args.bias + expert) : 0.0f;
  const int64_t logit_row = args.route_as == nullptr ? row : args.route_as[row];
  BeginAfterPreviousKernel();

  const float logit = AddUpLogit(args, logit_row, sections);
  if (expert < num_experts) logits[expert] = logit;
  __syncthreads();
  const bool is_busy = expert / kWarpThreads * kWarpThreads < num_experts;  // its whole warp
  float probability = 0.0f;
  float score = -INFINITY;
  if (is_busy) {
    probability = ProbabilityOf(logits, num_experts, logit);
    // A plain addition: a bias near 40 has a spacing of 4e-6, and near-ties depend on it.
    const float sum = args.bias == nullptr ? probability : __fadd_rn(probability, bias);
    // A NaN is worst, so that ids stay distinct.
    if (expert < num_experts && !isnan(sum)) score = sum;
    scores[expert] = score;  // is_busy ends at a multiple of 32
  }
  __syncthreads();
  if (expert < num_experts) {
    const int rank = RankOf(scores, num_experts, expert, score);
    if (rank < top_k) {
      chosen[rank] = probability;
      args.expert_ids[row * top_k + rank] = expert;
    }
  }
  __syncthreads();
  if (expert >= top_k) return;
  float sum = 0.0f;
  for (int i = 0; i < top_k; ++i) sum += chosen[i];
  args.expert_weights[row * top_k + expert] = chosen[expert] / fmaxf(sum, args.shape.norm_min);
}

template <bool kVector>
void LaunchProduct(const plan::FloatProductPlan& plan, const FloatProductArgs& args,
                   cudaStream_t stream) {
  const LaunchShape shape = {
      .grid = dim3(plan.num_sums, plan.grid_row_blocks, plan.grid_column_blocks),
      .block = kFloatThreads,
      .overlaps_previous = true};
  if (plan.block_rows == plan::kManyRows) {
    CUDA_LAUNCH((FloatProductKernel<plan::kManyRows, kVector>), shape, stream, args, plan);
  } else {
    CHECK(plan.block_rows == plan::kFewRows, "block_rows={}", plan.block_rows);
    CUDA_LAUNCH((FloatProductKernel<plan::kFewRows, kVector>), shape, stream, args, plan);
  }
}

bool IsAligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace

void LaunchFloatProduct(const plan::FloatProductPlan& plan, const FloatProductArgs& args,
                        cudaStream_t stream) {
  if (args.num_rows == 0) return;
  const bool is_aligned = args.k % 4 == 0 && args.n % 4 == 0 && args.x.stride % 4 == 0 &&
                          IsAligned(args.x.data) && IsAligned(args.w);
  is_aligned ? LaunchProduct<true>(plan, args, stream) : LaunchProduct<false>(plan, args, stream);
}

void LaunchAddPartials(const plan::FloatProductPlan& plan, const float* partials, int64_t num_rows,
                       int64_t n, Rows y, cudaStream_t stream) {
  if (num_rows == 0) return;
  const LaunchShape shape = {
      .grid = static_cast<unsigned>(num_rows), .block = kRowThreads, .overlaps_previous = true};
  CUDA_LAUNCH(AddPartialsKernel, shape, stream, partials, plan, num_rows, n, y);
}

void LaunchSelectExperts(const SelectExpertsArgs& args, cudaStream_t stream) {
  const RouterShape& router = args.shape;
  CHECK(router.num_experts <= kMaxRoutedExperts && router.top_k <= kMaxChosenExperts &&
            router.top_k >= 1 && router.top_k <= router.num_experts,
        "num_experts={} top_k={}", router.num_experts, router.top_k);
  if (args.num_rows == 0) return;
  // A thread for each sum of a section, unless rows fill the machine.
  constexpr int64_t kManyRows = 128;
  const int64_t sums =
      int64_t{NumSections(args.num_sums, args.sums_per_section)} * router.num_experts;
  const int64_t wanted = args.num_rows > kManyRows ? router.num_experts : sums;
  const int64_t threads = (wanted + kWarpThreads - 1) / kWarpThreads * kWarpThreads;
  const LaunchShape shape = {
      .grid = static_cast<unsigned>(args.num_rows),
      .block = static_cast<unsigned>(threads < kMaxSelectThreads ? threads : kMaxSelectThreads),
      .overlaps_previous = true};
  CUDA_LAUNCH(SelectExpertsKernel, shape, stream, args);
}

}  // namespace wintserve::kernels::cuda
