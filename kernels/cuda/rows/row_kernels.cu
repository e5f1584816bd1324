#include <algorithm>
#include <cstdint>

#include "common/check.h"
#include "kernels/cuda/device_ops.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/rows/row_kernels.h"

namespace wintserve::kernels::cuda {
namespace {

constexpr int kWarpThreads = 32;

__device__ float FromBfloat16(uint16_t bits) {
  return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

// Four columns at a time where everything is aligned to that, else one.
bool IsAligned(const void* pointer, int64_t stride) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && stride % 4 == 0;
}

constexpr int kEmbedThreads = 256;

// kWidth numbers of the table and of x, aligned as a whole.
template <typename T, int kWidth>
struct TableNumbers;
template <>
struct TableNumbers<uint16_t, 1> {
  static __device__ void Copy(const uint16_t* from, float* to) { *to = FromBfloat16(*from); }
};
template <>
struct TableNumbers<uint16_t, 4> {
  static __device__ void Copy(const uint16_t* from, float* to) {
    const uint2 pairs = *reinterpret_cast<const uint2*>(from);
    *reinterpret_cast<float4*>(to) = make_float4(LowBfloat16(pairs.x), HighBfloat16(pairs.x),
                                                 LowBfloat16(pairs.y), HighBfloat16(pairs.y));
  }
};
template <>
struct TableNumbers<float, 1> {
  static __device__ void Copy(const float* from, float* to) { *to = *from; }
};
template <>
struct TableNumbers<float, 4> {
  static __device__ void Copy(const float* from, float* to) {
    *reinterpret_cast<float4*>(to) = *reinterpret_cast<const float4*>(from);
  }
};

// Block: kWidth * kEmbedThreads columns of token blockIdx.x.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kEmbedThreads)
    EmbedKernel(const T* table, int64_t vocab_size, int64_t columns, const int32_t* tokens,
                Rows x) {
  BeginAfterPreviousKernel();
  const int64_t c = (int64_t{blockIdx.y} * kEmbedThreads + threadIdx.x) * kWidth;
  if (c >= columns) return;
  const int64_t token = min(static_cast<int64_t>(max(tokens[blockIdx.x], 0)), vocab_size - 1);
  TableNumbers<T, kWidth>::Copy(table + token * columns + c, x.data + blockIdx.x * x.stride + c);
}

template <typename T>
void LaunchEmbedFrom(const T* table, const EmbedArgs& args, cudaStream_t stream) {
  constexpr int kWidth = 4;
  const bool is_aligned =
      args.columns % kWidth == 0 && IsAligned(args.x.data, args.x.stride) && IsAligned(table, 0);
  const int64_t block_columns = int64_t{kEmbedThreads} * (is_aligned ? kWidth : 1);
  const LaunchShape shape = {
      .grid = dim3(static_cast<unsigned>(args.num_tokens),
                   static_cast<unsigned>((args.columns + block_columns - 1) / block_columns)),
      .block = kEmbedThreads,
      .overlaps_previous = true};
  if (is_aligned) {
    CUDA_LAUNCH((EmbedKernel<T, kWidth>), shape, stream, table, args.vocab_size, args.columns,
                args.tokens, args.x);
  } else {
    CUDA_LAUNCH((EmbedKernel<T, 1>), shape, stream, table, args.vocab_size, args.columns,
                args.tokens, args.x);
  }
}

// The sum over a block's threads, the same on each: over the lanes of every warp, then over warps.
__device__ float BlockSum(float value) {
  __shared__ float warp_sums[kWarpThreads];
  for (int distance = kWarpThreads / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xFFFFFFFFu, value, distance);
  }
  const int warp = static_cast<int>(threadIdx.x) / kWarpThreads;
  const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
  if (lane == 0) warp_sums[warp] = value;
  __syncthreads();
  const int num_warps = static_cast<int>(blockDim.x) / kWarpThreads;
  float sum = lane < num_warps ? warp_sums[lane] : 0.0f;
  for (int distance = kWarpThreads / 2; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(0xFFFFFFFFu, sum, distance);
  }
  return sum;
}

__device__ float Add(float a, float b) { return a + b; }
__device__ float4 Add(float4 a, float4 b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}
__device__ float SumOfSquares(float a) { return a * a; }
__device__ float SumOfSquares(float4 a) { return a.x * a.x + a.y * a.y + a.z * a.z + a.w * a.w; }
__device__ float Scale(float a, float factor, float gain) { return a * factor * gain; }
__device__ float4 Scale(float4 a, float factor, float4 gain) {
  return make_float4(a.x * factor * gain.x, a.y * factor * gain.y, a.z * factor * gain.z,
                     a.w * factor * gain.w);
}

constexpr int kNormThreads = 1024;
constexpr int kNormVectors = 8;  // of one thread, kept in registers between the two passes
// Of which so many are loaded before the first is stored; for most rows that is all of them.
constexpr int kNormAtOnce = 2;
static_assert(kMaxNormColumns == kNormThreads * kNormVectors * sizeof(float4) / sizeof(float));

__device__ float Zero(float /*like*/) { return 0.0f; }
__device__ float4 Zero(float4 /*like*/) { return make_float4(0.0f, 0.0f, 0.0f, 0.0f); }

template <typename Vector>
__global__ void __launch_bounds__(kNormThreads) AddRmsNormKernel(AddRmsNormArgs args) {
  constexpr int kWidth = sizeof(Vector) / sizeof(float);
  const auto* gain = reinterpret_cast<const Vector*>(args.gain);
  const int num_vectors = static_cast<int>(args.columns / kWidth);
  const auto place = [](int i) { return static_cast<int>(threadIdx.x + i * blockDim.x); };
  Vector first_gains[kNormAtOnce];
#pragma unroll
  for (int i = 0; i < kNormAtOnce; ++i) {
    if (place(i) < num_vectors) first_gains[i] = LoadConstantEarly(gain + place(i));
  }
  BeginAfterPreviousKernel();
  const int64_t row = args.row_ids == nullptr ? blockIdx.x : args.row_ids[blockIdx.x];
  auto* x = reinterpret_cast<Vector*>(args.x.data + row * args.x.stride);
  const auto* delta = reinterpret_cast<const Vector*>(args.delta.data + row * args.delta.stride);
  auto* out = reinterpret_cast<Vector*>(args.out.data + blockIdx.x * args.out.stride);

  Vector values[kNormVectors];
  float squares = 0;
#pragma unroll
  for (int first = 0; first < kNormVectors; first += kNormAtOnce) {
    if (place(first) >= num_vectors) break;
    Vector deltas[kNormAtOnce];
#pragma unroll
    for (int i = 0; i < kNormAtOnce; ++i) {
      const bool exists = place(first + i) < num_vectors;
      values[first + i] = exists ? LoadFresh(x + place(first + i)) : Zero(Vector());
      if (args.delta.data != nullptr) {
        deltas[i] = exists ? LoadFresh(delta + place(first + i)) : Zero(Vector());
      }
    }
#pragma unroll
    for (int i = 0; i < kNormAtOnce; ++i) {
      Vector& value = values[first + i];
      if (args.delta.data != nullptr) {
        value = Add(value, deltas[i]);
        if (place(first + i) < num_vectors) x[place(first + i)] = value;
      }
      squares += SumOfSquares(value);
    }
  }
  const float sum = BlockSum(squares);
  const float factor = 1.0f / sqrtf(sum / static_cast<float>(args.columns) + args.epsilon);
#pragma unroll
  for (int i = 0; i < kNormVectors; ++i) {
    if (place(i) >= num_vectors) break;
    out[place(i)] = Scale(values[i], factor, i < kNormAtOnce ? first_gains[i] : gain[place(i)]);
  }
}

template <typename Vector>
void LaunchNorm(const AddRmsNormArgs& args, cudaStream_t stream) {
  constexpr int64_t kWidth = sizeof(Vector) / sizeof(float);
  const int64_t num_vectors = args.columns / kWidth;
  CHECK(num_vectors <= int64_t{kNormThreads} * kNormVectors, "columns={}", args.columns);
  // Two vectors a thread where that fills warps, more only for long rows. The choice depends on the
  // columns alone, so that a row's bits do too.
  const int64_t threads =
      std::clamp<int64_t>((num_vectors + 63) / 64 * kWarpThreads, kWarpThreads, kNormThreads);
  const LaunchShape shape = {.grid = static_cast<unsigned>(args.num_rows),
                             .block = static_cast<unsigned>(threads),
                             .overlaps_previous = true};
  CUDA_LAUNCH(AddRmsNormKernel<Vector>, shape, stream, args);
}

constexpr int kAngleThreads = 256;
constexpr int kAngleTokens = 16;  // of one block
constexpr int kMaxHalfDim = 256;

__global__ void __launch_bounds__(kAngleThreads) RopeAnglesKernel(RopeAnglesArgs args) {
  __shared__ float frequencies[kMaxHalfDim];
  const int half = args.head_dim / 2;
  const auto thread = static_cast<int>(threadIdx.x);
  for (int j = thread; j < half; j += kAngleThreads) {
    frequencies[j] = static_cast<float>(pow(double{args.theta}, -2.0 * j / args.head_dim));
  }
  BeginAfterPreviousKernel();
  __syncthreads();
  const int64_t first = int64_t{blockIdx.x} * kAngleTokens;
  const auto tokens = static_cast<int>(min(int64_t{kAngleTokens}, args.num_tokens - first));
  for (int i = thread; i < tokens * half; i += kAngleThreads) {
    const int64_t token = first + i / half;
    const int j = i % half;
    const float position = static_cast<float>(args.positions[token]) / args.compression_ratio;
    // In float64, whose error vanishes in the rounding: the fast float32 functions are off by some
    // units for the large angles of long contexts.
    double sine, cosine;
    sincos(double{position * frequencies[j]}, &sine, &cosine);
    float* out = args.cos_sin.data + token * args.cos_sin.stride;
    out[j] = static_cast<float>(cosine);
    out[half + j] = static_cast<float>(sine);
  }
}

constexpr int kSwiGluThreads = 256;

__global__ void __launch_bounds__(kSwiGluThreads)
    SwiGluKernel(ConstRows gate_up, int64_t width, Rows out) {
  BeginAfterPreviousKernel();
  const float* gate = gate_up.data + blockIdx.x * gate_up.stride;
  float* row = out.data + blockIdx.x * out.stride;
  for (int64_t c = threadIdx.x; c < width; c += kSwiGluThreads) {
    row[c] = gate[c] / (1.0f + expf(-gate[c])) * gate[width + c];
  }
}

}  // namespace

void LaunchEmbed(const EmbedArgs& args, cudaStream_t stream) {
  if (args.num_tokens == 0) return;
  args.is_bfloat16 ? LaunchEmbedFrom(static_cast<const uint16_t*>(args.table), args, stream)
                   : LaunchEmbedFrom(static_cast<const float*>(args.table), args, stream);
}

void LaunchAddRmsNorm(const AddRmsNormArgs& args, cudaStream_t stream) {
  if (args.num_rows == 0) return;
  const bool is_aligned = args.columns % 4 == 0 && IsAligned(args.x.data, args.x.stride) &&
                          IsAligned(args.delta.data, args.delta.stride) &&
                          IsAligned(args.gain, 0) && IsAligned(args.out.data, args.out.stride);
  is_aligned ? LaunchNorm<float4>(args, stream) : LaunchNorm<float>(args, stream);
}

void LaunchRopeAngles(const RopeAnglesArgs& args, cudaStream_t stream) {
  if (args.num_tokens == 0) return;
  CHECK(args.head_dim % 2 == 0 && args.head_dim / 2 <= kMaxHalfDim, "head_dim={}", args.head_dim);
  const LaunchShape shape = {
      .grid = static_cast<unsigned>((args.num_tokens + kAngleTokens - 1) / kAngleTokens),
      .block = kAngleThreads,
      .overlaps_previous = true};
  CUDA_LAUNCH(RopeAnglesKernel, shape, stream, args);
}

void LaunchSwiGlu(ConstRows gate_up, int64_t num_rows, int64_t width, Rows out,
                  cudaStream_t stream) {
  if (num_rows == 0) return;
  const LaunchShape shape = {
      .grid = static_cast<unsigned>(num_rows), .block = kSwiGluThreads, .overlaps_previous = true};
  CUDA_LAUNCH(SwiGluKernel, shape, stream, gate_up, width, out);
}

}  // namespace wintserve::kernels::cuda
