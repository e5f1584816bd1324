// The product kernels of one codec on a GPU. Included by one source a format.
#pragma once

#include "common/check.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/matmul/cached_product.cuh"
#include "kernels/cuda/matmul/codecs.cuh"
#include "kernels/cuda/matmul/launches.h"
#include "kernels/cuda/matmul/resident_product.cuh"
#include "kernels/cuda/matmul/stream_product.cuh"
#include "kernels/cuda/matmul/tile_product.cuh"

namespace wintserve::kernels::cuda {

template <class Codec, int kTiles>
__global__ void __launch_bounds__(plan::kProductThreads, 2)
    StreamKernel(const __grid_constant__ ProductParams params) {
  extern __shared__ __align__(16) uint8_t product_shared[];
  StreamProduct<Codec, kTiles>(params, product_shared);
}

template <class Codec, int kChunks>
__global__ void __launch_bounds__(32 * plan::kResidentWarps)
    ResidentKernel(const __grid_constant__ ProductParams params) {
  extern __shared__ __align__(16) uint8_t product_shared[];
  ResidentProduct<Codec, kChunks>(params, product_shared);
}

template <class Codec, int kStageChunks>
__global__ void __launch_bounds__(32 * plan::kCachedWarps, 1)
    CachedKernel(const __grid_constant__ ProductParams params) {
  extern __shared__ __align__(16) uint8_t product_shared[];
  CachedProduct<Codec, kStageChunks>(params, product_shared);
}

template <class Codec, int kBlocks>
__global__ void __launch_bounds__(plan::kProductThreads,
                                  plan::BlocksPerMultiprocessor(plan::ProductKernel::kTile, kBlocks,
                                                                Codec::kFormat))
    TileKernel(const __grid_constant__ ProductParams params) {
  extern __shared__ __align__(16) uint8_t product_shared[];
  BeginAfterPreviousKernel();
  TileProduct<Codec, kBlocks>(params, product_shared);
}

template <class Codec>
class ProductKernels {
 public:
  static void AllowShared() {
    plan::ProductPlan plan;
    plan.kernel = plan::ProductKernel::kStream;
    plan.row_chunks = plan::kMaxStreamRowChunks;
    Allow(StreamKernel<Codec, 1>, plan);
    plan.tiles_per_warp = 2;
    if constexpr (kTwoTiles) Allow(StreamKernel<Codec, 2>, plan);
    if constexpr (kIsResident) {
      plan.kernel = plan::ProductKernel::kResident;
      plan.slices = plan::kResidentWarps;
      for (plan.slice_chunks = 1; plan.slice_chunks <= plan::kResidentChunks; ++plan.slice_chunks) {
        Allow(ResidentKernelFor(plan.slice_chunks), plan);
      }
      AllowSharedMemory(CachedKernel<Codec, 1>, MaxCachedBytes());
      AllowSharedMemory(CachedKernel<Codec, 2>, MaxCachedBytes());
    }
    plan.kernel = plan::ProductKernel::kTile;
    plan.token_blocks = 2;
    Allow(TileKernel<Codec, 2>, plan);
    plan.token_blocks = 4;
    Allow(TileKernel<Codec, 4>, plan);
    plan.token_blocks = 8;
    Allow(TileKernel<Codec, 8>, plan);
  }

  static void LaunchStream(const plan::ProductPlan& plan, const ProductParams& params,
                           cudaStream_t stream) {
    if constexpr (kIsResident) {
      if (plan.kernel == plan::ProductKernel::kResident) {
        return Launch(ResidentKernelFor(plan.slice_chunks), plan, params, stream);
      }
      if (plan.kernel == plan::ProductKernel::kCached) {
        return Launch(plan.stage_chunks == 2 ? CachedKernel<Codec, 2> : CachedKernel<Codec, 1>,
                      plan, params, stream);
      }
    }
    if constexpr (kTwoTiles) {
      if (plan.tiles_per_warp == 2) return Launch(StreamKernel<Codec, 2>, plan, params, stream);
    }
    CHECK(plan.tiles_per_warp == 1, "tiles_per_warp={}", plan.tiles_per_warp);
    Launch(StreamKernel<Codec, 1>, plan, params, stream);
  }

  static void LaunchTile(const plan::ProductPlan& plan, const ProductParams& params,
                         cudaStream_t stream) {
    switch (plan.token_blocks) {
      case 2:
        return Launch(TileKernel<Codec, 2>, plan, params, stream);
      case 4:
        return Launch(TileKernel<Codec, 4>, plan, params, stream);
      case 8:
        return Launch(TileKernel<Codec, 8>, plan, params, stream);
      default:
        CHECK(false, "token_blocks={}", plan.token_blocks);
    }
  }

 private:
  static constexpr bool kTwoTiles = plan::StreamsTwoTiles(Codec::kFormat);
  static constexpr bool kIsResident = plan::IsResident(Codec::kFormat, 1);
  using Kernel = void (*)(ProductParams);

  static Kernel ResidentKernelFor(int slice_chunks) {
    static_assert(plan::kResidentChunks == 4);
    switch (slice_chunks) {
      case 1:
        return ResidentKernel<Codec, 1>;
      case 2:
        return ResidentKernel<Codec, 2>;
      case 3:
        return ResidentKernel<Codec, 3>;
      case 4:
        return ResidentKernel<Codec, 4>;
      default:
        CHECK(false, "slice_chunks={}", slice_chunks);
    }
  }

  // What a cached plan may ask for on this device.
  static int64_t MaxCachedBytes() {
    int device = 0;
    int bytes = 0;
    CUDA_CALL(cudaGetDevice, &device);
    CUDA_CALL(cudaDeviceGetAttribute, &bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    return bytes < plan::kMaxHopperSharedBytes ? bytes : plan::kMaxHopperSharedBytes;
  }

  static void Allow(Kernel kernel, const plan::ProductPlan& plan) {
    AllowSharedMemory(kernel, plan::SharedBytes(plan, Codec::kFormat, plan::kMaxExperts));
  }

  static void Launch(Kernel kernel, const plan::ProductPlan& plan, const ProductParams& params,
                     cudaStream_t stream) {
    LaunchShape shape;
    shape.grid = plan.grid_blocks;
    shape.block = plan.block_threads();
    shape.overlaps_previous = plan.overlaps_previous;
    shape.shared_bytes = plan::SharedBytes(plan, Codec::kFormat, params.num_experts);
    CUDA_LAUNCH(kernel, shape, stream, params);
  }
};

template <class Codec>
const ProductLaunches& LaunchesOfCodec() {
  static constexpr ProductLaunches kLaunches = {ProductKernels<Codec>::AllowShared,
                                                ProductKernels<Codec>::LaunchStream,
                                                ProductKernels<Codec>::LaunchTile};
  return kLaunches;
}

}  // namespace wintserve::kernels::cuda
