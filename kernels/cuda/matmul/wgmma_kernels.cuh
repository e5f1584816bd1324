// The Hopper kernels of one codec. Included by one source a format.
#pragma once

#include "common/check.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/matmul/wgmma_launches.h"
#include "kernels/cuda/matmul/wgmma_product.cuh"

namespace wintserve::kernels::cuda {

template <class Codec, int kTokens>
__global__ void __launch_bounds__(plan::kWgmmaThreads,
                                  plan::WgmmaTileOf(Codec::kFormat, kTokens).blocks)
    WgmmaKernel(const __grid_constant__ ProductParams params) {
  // Other architectures, for which the source is compiled too, have no wgmma: nobody launches this.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) uint8_t wgmma_shared[];
  WgmmaProduct<Codec, kTokens>(params, wgmma_shared).Run();
#endif
}

template <class Codec>
class WgmmaKernels {
 public:
  static void AllowShared() {
    Allow(WgmmaKernel<Codec, plan::kNarrowTokens>, plan::kNarrowTokens);
    if constexpr (kHasSmall) {
      Allow(WgmmaKernel<Codec, plan::kSmallTokens>, plan::kSmallTokens);
    }
    if constexpr (kHasWide) Allow(WgmmaKernel<Codec, plan::kWideTokens>, plan::kWideTokens);
  }

  static void LaunchProduct(const plan::WgmmaPlan& plan, const ProductParams& params,
                            cudaStream_t stream) {
    // Offsets of rows are 32 bits; a row is at most one of the tokens.
    CHECK(int64_t{params.num_tokens} * params.chunks * plan::kChunkRows * 2 < int64_t{1} << 32,
          "num_tokens={} chunks={}", params.num_tokens, params.chunks);
    LaunchShape shape;
    shape.grid = plan.grid_blocks;
    shape.block = plan::kWgmmaThreads;
    shape.shared_bytes =
        plan::WgmmaSharedOf(Codec::kFormat, plan.tokens).SizeBytes(params.num_experts);
    if constexpr (kHasSmall) {
      if (plan.tokens == plan::kSmallTokens) {
        CUDA_LAUNCH((WgmmaKernel<Codec, plan::kSmallTokens>), shape, stream, params);
        return;
      }
    }
    if constexpr (kHasWide) {
      if (plan.tokens == plan::kWideTokens) {
        CUDA_LAUNCH((WgmmaKernel<Codec, plan::kWideTokens>), shape, stream, params);
        return;
      }
    }
    CHECK(plan.tokens == plan::kNarrowTokens, "tokens={}", plan.tokens);
    CUDA_LAUNCH((WgmmaKernel<Codec, plan::kNarrowTokens>), shape, stream, params);
  }

 private:
  static constexpr bool kHasSmall = plan::HasSmallWgmma(Codec::kFormat);
  static constexpr bool kHasWide = plan::HasWideWgmma(Codec::kFormat);

  static void Allow(void (*kernel)(ProductParams), int tokens) {
    AllowSharedMemory(kernel,
                      plan::WgmmaSharedOf(Codec::kFormat, tokens).SizeBytes(plan::kMaxExperts));
  }
};

template <class Codec>
const WgmmaLaunches& WgmmaLaunchesOfCodec() {
  static constexpr WgmmaLaunches kLaunches = {WgmmaKernels<Codec>::AllowShared,
                                              WgmmaKernels<Codec>::LaunchProduct};
  return kLaunches;
}

}  // namespace wintserve::kernels::cuda
