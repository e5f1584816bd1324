// Launches the kernels of a product on the emulated device, as matmul.cu does on a GPU.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/check.h"
#include "kernels/cuda/matmul/codecs.cuh"
#include "kernels/cuda/matmul/emulated_device_test_util.h"
#include "kernels/cuda/matmul/product_params.h"
#include "kernels/cuda/matmul/resident_product.cuh"
#include "kernels/cuda/matmul/row_kernels.cuh"
#include "kernels/cuda/matmul/stream_product.cuh"
#include "kernels/cuda/matmul/tile_product.cuh"
#include "kernels/cuda/matmul/wgmma_product.cuh"
#include "kernels/plan/product_plan.h"
#include "kernels/plan/wgmma_plan.h"

namespace wintserve::kernels::cuda {

class EmulatedLauncher {
 public:
  // cached_floats: as PrepareParams.
  EmulatedLauncher(uint32_t seed, int cached_floats) : seed_(seed), cached_floats_(cached_floats) {}

  void Prepare(PrepareParams params, int64_t num_rows) {
    params.cached_floats = cached_floats_;
    EmulatedDevice::Launch(static_cast<int>(num_rows), kRowThreads,
                           kPrepareReductionBytes + cached_floats_ * 4, seed_++,
                           [&](uint8_t* shared) { PrepareRow<EmulatedDevice>(params, shared); });
  }

  void Product(const plan::ProductPlan& plan, const ProductParams& params,
               formats::WeightFormat format) {
    switch (format) {
      case formats::WeightFormat::kWint2:
        return ProductOf<Wint2Codec>(plan, params);
      case formats::WeightFormat::kWint4:
        return ProductOf<Wint4Codec>(plan, params);
      case formats::WeightFormat::kWint8:
        return ProductOf<Wint8Codec>(plan, params);
      default:
        return ProductOf<Bfloat16Codec>(plan, params);
    }
  }

  void WgmmaProduct(const plan::WgmmaPlan& plan, const ProductParams& params,
                    formats::WeightFormat format) {
    switch (format) {
      case formats::WeightFormat::kWint2:
        return WgmmaProductOf<Wint2Codec>(plan, params);
      case formats::WeightFormat::kWint4:
        return WgmmaProductOf<Wint4Codec>(plan, params);
      case formats::WeightFormat::kWint8:
        return WgmmaProductOf<Wint8Codec>(plan, params);
      default:
        return WgmmaProductOf<Bfloat16Codec>(plan, params);
    }
  }

  void AddSlices(const ProductParams& params) {
    EmulatedDevice::Launch(params.num_tokens * plan::DivideUp(params.columns, kRowThreads),
                           kRowThreads, 16, seed_++,
                           [&](uint8_t*) { cuda::AddSlices<EmulatedDevice>(params); });
  }

  void Sort(const SortParams& params) {
    EmulatedDevice::Launch(params.num_experts, kRowThreads, kSortSharedBytes, seed_++,
                           [&](uint8_t* shared) { SortPairs<EmulatedDevice>(params, shared); });
  }

  void Combine(const CombineParams& params, int64_t num_rows) {
    EmulatedDevice::Launch(static_cast<int>(num_rows) * plan::DivideUp(params.columns, kRowThreads),
                           kRowThreads, kCombineSharedBytes, seed_++, [&](uint8_t* shared) {
                             CombineExperts<EmulatedDevice>(params, shared);
                           });
  }

 private:
  template <class Codec>
  void ProductOf(const plan::ProductPlan& plan, const ProductParams& params) {
    const auto run = [&](const auto& body) {
      EmulatedDevice::Launch(plan.grid_blocks, plan.block_threads(),
                             plan::SharedBytes(plan, Codec::kFormat, params.num_experts), seed_++,
                             body);
    };
    if (plan.kernel == plan::ProductKernel::kResident) {
      if constexpr (Codec::kFormat == formats::WeightFormat::kWint2) {
        const auto resident = [&]<int kChunks>(std::integral_constant<int, kChunks>) {
          run([&](uint8_t* shared) {
            ResidentProduct<EmulatedDevice, Codec, kChunks>(params, shared);
          });
        };
        switch (plan.slice_chunks) {
          case 1:
            return resident(std::integral_constant<int, 1>());
          case 2:
            return resident(std::integral_constant<int, 2>());
          case 3:
            return resident(std::integral_constant<int, 3>());
          case 4:
            return resident(std::integral_constant<int, 4>());
          default:
            break;
        }
      }
      CHECK(false, "slice_chunks={}", plan.slice_chunks);
    }
    if (plan.kernel == plan::ProductKernel::kStream && plan.tiles_per_warp == 1) {
      run([&](uint8_t* shared) { StreamProduct<EmulatedDevice, Codec, 1>(params, shared); });
    } else if (plan.kernel == plan::ProductKernel::kStream) {
      run([&](uint8_t* shared) { StreamProduct<EmulatedDevice, Codec, 2>(params, shared); });
    } else if (plan.token_blocks == 2) {
      run([&](uint8_t* shared) { TileProduct<EmulatedDevice, Codec, 2>(params, shared); });
    } else if (plan.token_blocks == 4) {
      run([&](uint8_t* shared) { TileProduct<EmulatedDevice, Codec, 4>(params, shared); });
    } else {
      CHECK(plan.token_blocks == 8, "token_blocks={}", plan.token_blocks);
      run([&](uint8_t* shared) { TileProduct<EmulatedDevice, Codec, 8>(params, shared); });
    }
  }

  template <class Codec>
  void WgmmaProductOf(const plan::WgmmaPlan& plan, const ProductParams& params) {
    const auto run = [&](const auto& body) {
      EmulatedDevice::Launch(
          plan.grid_blocks, plan::kWgmmaThreads,
          plan::WgmmaSharedOf(Codec::kFormat, plan.tokens).SizeBytes(params.num_experts), seed_++,
          body);
    };
    if constexpr (plan::HasWideWgmma(Codec::kFormat)) {
      if (plan.tokens == plan::kWideTokens) {
        return run([&](uint8_t* shared) {
          cuda::WgmmaProduct<EmulatedWgmmaDevice, Codec, plan::kWideTokens>(params, shared).Run();
        });
      }
    }
    CHECK(plan.tokens == plan::kNarrowTokens, "tokens={}", plan.tokens);
    run([&](uint8_t* shared) {
      cuda::WgmmaProduct<EmulatedWgmmaDevice, Codec, plan::kNarrowTokens>(params, shared).Run();
    });
  }

  uint32_t seed_;
  const int cached_floats_;
};

}  // namespace wintserve::kernels::cuda
