// Launches the kernels of a product on the emulated device, as matmul.cu does on a GPU.
#pragma once

#include <cstdint>
#include <functional>
#include <type_traits>

#include "common/check.h"
#include "kernels/cuda/emulation/emulated_device.h"
#include "kernels/cuda/matmul/cached_product.cuh"
#include "kernels/cuda/matmul/codecs.cuh"
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
  // row_threads: of a block that prepares a row or sorts; 0: as many as a GPU takes.
  EmulatedLauncher(uint32_t seed, int row_threads) : seed_(seed), row_threads_(row_threads) {}

  void Prepare(PrepareParams params, int64_t num_rows) {
    params.threads = RowThreads(params);
    Launch(static_cast<int>(num_rows), params.threads, kPrepareSharedBytes,
           [&] { PrepareRow(params, BlockIndex(), SharedMemory()); });
  }

  void SortAndPrepare(SortParams sort, PrepareParams prepare, int64_t num_rows) {
    prepare.threads = RowThreads(prepare);
    sort.threads = prepare.threads;
    Launch(
        static_cast<int>(num_rows) + sort.num_experts, prepare.threads, kSortAndPrepareSharedBytes,
        [&] { cuda::SortAndPrepare(sort, prepare, static_cast<int>(num_rows), SharedMemory()); });
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
    Launch(params.num_tokens * plan::DivideUp(params.columns, kRowThreads), kRowThreads, 16,
           [&] { cuda::AddSlices(params); });
  }

  void Combine(const CombineParams& params, int64_t num_rows) {
    Launch(static_cast<int>(num_rows) * plan::DivideUp(params.columns, kRowThreads), kRowThreads,
           kCombineSharedBytes, [&] { CombineExperts(params, SharedMemory()); });
  }

 private:
  int RowThreads(const PrepareParams& params) const {
    return row_threads_ == 0 ? PrepareThreads(params.chunks) : row_threads_;
  }

  void Launch(int num_blocks, int num_threads, int shared_bytes,
              const std::function<void()>& body) {
    Emulate({.num_blocks = num_blocks,
             .threads_per_block = num_threads,
             .shared_bytes = shared_bytes,
             .seed = seed_++},
            body);
  }

  template <class Codec>
  void ProductOf(const plan::ProductPlan& plan, const ProductParams& params) {
    const auto run = [&](const auto& body) {
      Launch(plan.grid_blocks, plan.block_threads(),
             plan::SharedBytes(plan, Codec::kFormat, params.num_experts), body);
    };
    if (plan.kernel == plan::ProductKernel::kResident) {
      if constexpr (Codec::kFormat == formats::WeightFormat::kWint2) {
        const auto resident = [&]<int kChunks>(std::integral_constant<int, kChunks>) {
          run([&] { ResidentProduct<Codec, kChunks>(params, SharedMemory()); });
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
    if (plan.kernel == plan::ProductKernel::kCached) {
      if constexpr (Codec::kFormat == formats::WeightFormat::kWint2) {
        if (plan.stage_chunks == 2) {
          return run([&] { CachedProduct<Codec, 2>(params, SharedMemory()); });
        }
        return run([&] { CachedProduct<Codec, 1>(params, SharedMemory()); });
      }
      CHECK(false, "a cached product of another format");
    }
    if (plan.kernel == plan::ProductKernel::kStream && plan.tiles_per_warp == 1) {
      run([&] { StreamProduct<Codec, 1>(params, SharedMemory()); });
    } else if (plan.kernel == plan::ProductKernel::kStream) {
      run([&] { StreamProduct<Codec, 2>(params, SharedMemory()); });
    } else if (plan.token_blocks == 2) {
      run([&] { TileProduct<Codec, 2>(params, SharedMemory()); });
    } else if (plan.token_blocks == 4) {
      run([&] { TileProduct<Codec, 4>(params, SharedMemory()); });
    } else {
      CHECK(plan.token_blocks == 8, "token_blocks={}", plan.token_blocks);
      run([&] { TileProduct<Codec, 8>(params, SharedMemory()); });
    }
  }

  template <class Codec>
  void WgmmaProductOf(const plan::WgmmaPlan& plan, const ProductParams& params) {
    const auto run = [&](const auto& body) {
      Launch(plan.grid_blocks, plan::kWgmmaThreads,
             plan::WgmmaSharedOf(Codec::kFormat, plan.tokens).SizeBytes(params.num_experts), body);
    };
    if constexpr (plan::HasSmallWgmma(Codec::kFormat)) {
      if (plan.tokens == plan::kSmallTokens) {
        return run(
            [&] { cuda::WgmmaProduct<Codec, plan::kSmallTokens>(params, SharedMemory()).Run(); });
      }
    }
    if constexpr (plan::HasWideWgmma(Codec::kFormat)) {
      if (plan.tokens == plan::kWideTokens) {
        return run(
            [&] { cuda::WgmmaProduct<Codec, plan::kWideTokens>(params, SharedMemory()).Run(); });
      }
    }
    CHECK(plan.tokens == plan::kNarrowTokens, "tokens={}", plan.tokens);
    run([&] { cuda::WgmmaProduct<Codec, plan::kNarrowTokens>(params, SharedMemory()).Run(); });
  }

  uint32_t seed_;
  const int row_threads_;
};

}  // namespace wintserve::kernels::cuda
