#include <cuda_bf16.h>

#include <algorithm>

#include "kernels/cuda/matmul/baselines_bench.h"
#include "kernels/cuda/matmul/product_kernels.cuh"

namespace wintserve::kernels::cuda {
namespace {

constexpr int kThreads = 256;

__device__ uint32_t Hash(uint32_t value) {  // "lowbias32"-like mixing
  value = (value ^ (value >> 16)) * 0x7FEB352Du;
  value = (value ^ (value >> 15)) * 0x846CA68Bu;
  return value ^ (value >> 16);
}

__device__ float UniformOf(uint32_t hash, float low, float high) {
  return low + (high - low) * (static_cast<float>(hash >> 8) * 0x1p-24f);
}

__global__ void ReadKernel(const uint4* data, int64_t count, float* sink) {
  constexpr int kLoads = 8;
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  uint4 sum = make_uint4(0, 0, 0, 0);
  int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  for (; i + (kLoads - 1) * stride < count; i += kLoads * stride) {
    uint4 words[kLoads];
#pragma unroll
    for (int j = 0; j < kLoads; ++j) words[j] = __ldcs(data + i + j * stride);
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      sum.x ^= words[j].x;
      sum.y ^= words[j].y;
      sum.z ^= words[j].z;
      sum.w ^= words[j].w;
    }
  }
  for (; i < count; i += stride) sum.x ^= __ldcs(data + i).x;
  // Never true for random data, but the compiler does not know.
  if ((sum.x ^ sum.y ^ sum.z ^ sum.w) == 0x12345678u) sink[0] = 1;
}

__global__ void FillUnitsKernel(uint4* units, int64_t count, uint32_t seed, bool halves) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= count) return;
  const auto base = static_cast<uint32_t>(i * 4) ^ Hash(seed);
  uint32_t words[4];
  for (int j = 0; j < 4; ++j) {
    words[j] = Hash(base + j);
    // Binary16 of magnitude 2^8 … 2^9 with 8 significant bits, as packed bfloat16 has.
    if (halves) words[j] = (words[j] & 0x8FF88FF8u) | 0x5C005C00u;
  }
  units[i] = make_uint4(words[0], words[1], words[2], words[3]);
}

__global__ void FillColumnsKernel(plan::ColumnInfo* columns, int64_t count, uint32_t seed,
                                  bool float_maps, float scale) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= count) return;
  const uint32_t hash = Hash(static_cast<uint32_t>(i) ^ Hash(seed + 1));
  const float code_scale = UniformOf(hash, 110.0f, 128.0f);
  const float code_zp = UniformOf(Hash(hash), 0.0f, 32767.0f - 255 * code_scale) + 0.5f;
  plan::ColumnInfo info;
  info.multiplier =
      float_maps ? __float_as_uint(code_scale) : static_cast<uint32_t>(code_scale * 131072.0f);
  info.offset = float_maps ? __float_as_uint(code_zp) : static_cast<uint32_t>(code_zp * 131072.0f);
  info.scale = scale * UniformOf(Hash(hash + 1), 0.5f, 2.0f);
  columns[i] = info;
}

__global__ void FillRowsKernel(float* rows, int64_t count, uint32_t seed) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= count) return;
  float sum = 0;  // of four uniforms: near enough to normal
  for (uint32_t j = 0; j < 4; ++j) {
    sum += UniformOf(Hash(static_cast<uint32_t>(i * 4) + j + Hash(seed + 2)), -1.0f, 1.0f);
  }
  rows[i] = sum;
}

__global__ void Bfloat16RowsKernel(uint16_t* values, int64_t count) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= count) return;
  values[i] = __bfloat16_as_ushort(__float2bfloat16_rn(__half2float(__ushort_as_half(values[i]))));
}

LaunchShape ShapeFor(int64_t count) {
  LaunchShape shape;
  shape.grid = static_cast<unsigned>((count + kThreads - 1) / kThreads);
  shape.block = kThreads;
  return shape;
}

// As MatrixMultiplyAddHalves.
WINTSERVE_DEVICE void MultiplyAddBfloat16(const uint32_t (&a)[4], const uint32_t (&b)[2],
                                          const float (&c)[4], float (&sum)[4]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
      : "=f"(sum[0]), "=f"(sum[1]), "=f"(sum[2]), "=f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]),
        "f"(c[2]), "f"(c[3]));
}

// The steps of FastDeploy's converter, written for this skeleton: 3 instructions a weight.
struct FastDeployWint2Codec {
  static constexpr formats::WeightFormat kFormat = formats::WeightFormat::kWint2;
  static constexpr bool kHasLocalScales = true;
  static constexpr bool kHasCorrections = false;

  using Constants = Wint2Codec::Constants;
  static WINTSERVE_DEVICE Constants MakeConstants(uint32_t zero) {
    Constants constants = Wint2Codec::MakeConstants(zero);
    constants.weight_base[0] = 0x43004300 + zero;  // bfloat16 128
    return constants;
  }

  using Packed = uint4;
  static WINTSERVE_DEVICE Packed LoadPacked(const uint8_t* lane_units) {
    return LoadAligned<uint4>(lane_units);
  }

  static WINTSERVE_DEVICE void Decode(const Packed& packed, int group, const LaneColumns& columns,
                                      const float (&scale)[2], const Constants& constants,
                                      uint32_t (&a)[4][4]) {
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
      // The super scale stays in the epilogue: as many instructions, as it is a product more there
      // and one less here.
      const __nv_bfloat162 weight_scale = __float2bfloat162_rn(scale[upper]);
      const uint32_t bytes =
          group == 0 ? (upper == 0 ? packed.x : packed.y) : (upper == 0 ? packed.z : packed.w);
      DecodePair<0>(bytes, columns, constants, weight_scale, upper, a);
      DecodePair<1>(bytes, columns, constants, weight_scale, upper, a);
    }
  }

  static WINTSERVE_DEVICE void LoadLocalScales(const uint8_t* row_scales,
                                               const Constants& constants, float (&scale)[2][2]) {
    Wint2Codec::LoadLocalScales(row_scales, constants, scale);
  }

  static WINTSERVE_DEVICE void Accumulate(const uint32_t (&a)[4][4], const uint32_t (&b)[4][2],
                                          const float (&)[4], const float (&)[2],
                                          float (&total)[4]) {
#pragma unroll
    for (int m = 0; m < 4; ++m) MultiplyAddBfloat16(a[m], b[m], total, total);
  }

 private:
  template <int kByte>
  static WINTSERVE_DEVICE uint32_t Code(uint32_t bytes, float code_scale, float code_offset) {
    const float byte = __uint_as_float(__byte_perm(bytes, 0x4B000000, 0x7540 + kByte)) - 8388608.0f;
    return static_cast<uint32_t>(__float2int_rd(__fmaf_rn(byte, code_scale, code_offset)));
  }

  static WINTSERVE_DEVICE uint32_t Weight(uint32_t field, uint32_t base,
                                          const __nv_bfloat162& weight_scale) {
    // 128 + field as bfloat16, less 160.
    const uint32_t biased = AndOr<0x003F003F>(field, base);
    __nv_bfloat162 value;
    memcpy(&value, &biased, sizeof(value));
    value = __hmul2(__hsub2(value, __float2bfloat162_rn(160.0f)), weight_scale);
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    return bits;
  }

  template <int kPair>
  static WINTSERVE_DEVICE void DecodePair(uint32_t bytes, const LaneColumns& columns,
                                          const Constants& constants,
                                          const __nv_bfloat162& weight_scale, int upper,
                                          uint32_t (&a)[4][4]) {
    const float code_scale = __uint_as_float(columns.multiplier[upper]);
    const float code_offset = __uint_as_float(columns.offset[upper]);
    const uint32_t codes = __byte_perm(Code<2 * kPair>(bytes, code_scale, code_offset),
                                       Code<2 * kPair + 1>(bytes, code_scale, code_offset), 0x5410);
    a[2 * kPair][upper] = Weight(codes, constants.weight_base[0], weight_scale);
    a[2 * kPair][2 + upper] = Weight(codes >> 3, constants.weight_base[0], weight_scale);
    a[2 * kPair + 1][upper] = Weight(codes >> 6, constants.weight_base[0], weight_scale);
    a[2 * kPair + 1][2 + upper] = Weight(codes >> 9, constants.weight_base[0], weight_scale);
  }
};

template <int kTiles>
__global__ void __launch_bounds__(plan::kProductThreads, 2)
    FastDeployKernel(const __grid_constant__ ProductParams params) {
  extern __shared__ __align__(16) uint8_t product_shared[];
  StreamProduct<FastDeployWint2Codec, kTiles>(params, product_shared);
}

template <int kChunks>
__global__ void __launch_bounds__(32 * plan::kResidentWarps)
    FastDeployResidentKernel(const __grid_constant__ ProductParams params) {
  extern __shared__ __align__(16) uint8_t product_shared[];
  ResidentProduct<FastDeployWint2Codec, kChunks>(params, product_shared);
}

template <int kStageChunks>
__global__ void __launch_bounds__(32 * plan::kCachedWarps, 1)
    FastDeployCachedKernel(const __grid_constant__ ProductParams params) {
  extern __shared__ __align__(16) uint8_t product_shared[];
  CachedProduct<FastDeployWint2Codec, kStageChunks>(params, product_shared);
}

using Kernel = void (*)(ProductParams);
constexpr Kernel kStreamKernels[] = {FastDeployKernel<1>, FastDeployKernel<2>};
constexpr Kernel kResidentKernels[] = {FastDeployResidentKernel<1>, FastDeployResidentKernel<2>,
                                       FastDeployResidentKernel<3>, FastDeployResidentKernel<4>};

constexpr Kernel kCachedKernels[] = {FastDeployCachedKernel<1>, FastDeployCachedKernel<2>};

}  // namespace

void LaunchRead(const void* data, int64_t size_bytes, int num_blocks, float* sink,
                cudaStream_t stream) {
  LaunchShape shape;
  shape.grid = num_blocks;
  shape.block = kThreads;
  CUDA_LAUNCH(ReadKernel, shape, stream, static_cast<const uint4*>(data), size_bytes / 16, sink);
}

void LaunchFillWeights(const plan::WeightLayout& layout, uint32_t seed, bool float_maps,
                       uint8_t* weights, cudaStream_t stream) {
  const bool halves = layout.format == formats::WeightFormat::kBfloat16;
  const int64_t columns = layout.tiles() * plan::kTileColumns;
  // Local scales and units are random bytes.
  const int64_t begin = layout.records_offset();
  const int64_t words = (layout.size_bytes() - begin) / 16;
  CUDA_LAUNCH(FillUnitsKernel, ShapeFor(words), stream, reinterpret_cast<uint4*>(weights + begin),
              words, seed, halves);
  const float scale = halves ? 1e-5f : 1.0f / (32 * 8 * 90);
  CUDA_LAUNCH(FillColumnsKernel, ShapeFor(columns), stream,
              reinterpret_cast<plan::ColumnInfo*>(weights), columns, seed, float_maps, scale);
}

void LaunchFillRows(float* rows, int64_t count, uint32_t seed, cudaStream_t stream) {
  CUDA_LAUNCH(FillRowsKernel, ShapeFor(count), stream, rows, count, seed);
}

void LaunchBfloat16Rows(PreparedRows rows, int64_t count, cudaStream_t stream) {
  CUDA_LAUNCH(Bfloat16RowsKernel, ShapeFor(count), stream, rows.values, count);
}

void LaunchFastDeployWint2(const plan::ProductPlan& plan, const ProductParams& params,
                           cudaStream_t stream) {
  const bool resident = plan.kernel == plan::ProductKernel::kResident;
  const bool cached = plan.kernel == plan::ProductKernel::kCached;
  const Kernel kernel = resident ? kResidentKernels[plan.slice_chunks - 1]
                        : cached ? kCachedKernels[plan.stage_chunks - 1]
                                 : kStreamKernels[plan.tiles_per_warp - 1];
  LaunchShape shape;
  shape.grid = plan.grid_blocks;
  shape.block = plan.block_threads();
  shape.shared_bytes = plan::SharedBytes(plan, formats::WeightFormat::kWint2, params.num_experts);
  shape.overlaps_previous = true;
  AllowSharedMemory(kernel, shape.shared_bytes);
  CUDA_LAUNCH(kernel, shape, stream, params);
}

}  // namespace wintserve::kernels::cuda
