#include "kernels/cuda/matmul/variants_bench.h"

#include <fmt/core.h>

#include <algorithm>

#include "kernels/cuda/matmul/launches.h"
#include "kernels/cuda/matmul/matmul.h"
#include "kernels/cuda/matmul/wgmma_launches.h"

namespace wintserve::kernels::cuda {

using formats::WeightFormat;
using plan::ProductKernel;
using plan::ProductPlan;
using plan::ProductShape;

namespace {

ProductPlan Plan(const DeviceProperties& gpu, const ProductShape& shape, ProductKernel kernel,
                 int token_blocks, int tiles_per_warp) {
  ProductPlan plan;
  plan.kernel = kernel;
  plan.token_blocks = token_blocks;
  plan.tiles_per_warp = tiles_per_warp;
  return plan::FinishPlan(shape, gpu.num_multiprocessors, plan);
}

std::string NameOf(const ProductPlan& plan) {
  return plan.kernel == ProductKernel::kResident ? "resident"
         : plan.kernel == ProductKernel::kCached ? fmt::format("cached {}", plan.stage_chunks)
         : plan.kernel == ProductKernel::kStream
             ? fmt::format("stream x{}", plan.tiles_per_warp)
             : fmt::format("tile {}{}", plan.token_tile(), plan.split_slices ? " split" : "");
}

std::string NameOf(const plan::WgmmaPlan& plan) {
  return fmt::format("wgmma {}{}", plan.tokens, plan.split_slices ? " split" : "");
}

// The WINT2 kernels that keep their activations, as far as they can.
std::vector<ProductPlan> SmallWint2Plans(const DeviceProperties& gpu, const ProductShape& shape) {
  std::vector<ProductPlan> plans;
  if (plan::IsResident(shape.format, shape.chunks)) {
    plans.push_back(plan::ResidentPlan(shape, gpu.num_multiprocessors));
  }
  for (const int stage_chunks : {1, 2}) {
    const ProductPlan plan = plan::CachedPlan(shape, gpu.num_multiprocessors, stage_chunks);
    if (plan::SharedBytes(plan, shape.format, shape.num_experts) <= plan::kMaxHopperSharedBytes) {
      plans.push_back(plan);
    }
  }
  return plans;
}

// The Hopper kernels that suit that many tokens an expert, and whether the first one is chosen.
std::vector<Variant> WgmmaVariantsFor(const DeviceProperties& gpu, const ProductShape& shape,
                                      int64_t tokens, bool* chosen) {
  *chosen = false;
  if (gpu.compute_capability() != 90 || tokens <= 8) return {};
  const int multiprocessors = gpu.num_multiprocessors;
  std::vector<plan::WgmmaPlan> plans;
  if (const auto plan = plan::PlanWgmmaProduct(shape, multiprocessors); plan.has_value()) {
    plans.push_back(*plan);
    *chosen = true;
  }
  for (const int of_tile : {plan::kSmallTokens, plan::kNarrowTokens, plan::kWideTokens}) {
    if (of_tile < plan::kNarrowTokens && (tokens > 64 || !plan::HasSmallWgmma(shape.format))) {
      continue;
    }
    if (of_tile == plan::kWideTokens &&
        (tokens < plan::kWideTokens || !plan::HasWideWgmma(shape.format))) {
      continue;
    }
    for (const bool split : {false, true}) {
      if (split && (shape.num_experts > 1 || tokens > 256)) continue;
      plan::WgmmaPlan plan;
      plan.tokens = of_tile;
      plan.split_slices = split;
      plan = plan::FinishWgmmaPlan(shape, multiprocessors, plan);
      if (!*chosen || NameOf(plan) != NameOf(plans.front())) plans.push_back(plan);
    }
  }
  std::vector<Variant> variants;
  for (const plan::WgmmaPlan& plan : plans) variants.push_back({NameOf(plan), {}, plan});
  return variants;
}

}  // namespace

void Variant::Launch(WeightFormat format, const ProductParams& params, cudaStream_t stream) const {
  if (wgmma.has_value()) {
    WgmmaLaunchesOf(format).product(*wgmma, params, stream);
  } else if (plan.kernel == ProductKernel::kTile) {
    LaunchesOf(format).tile(plan, params, stream);
  } else {
    LaunchesOf(format).stream(plan, params, stream);
  }
}

std::vector<Variant> VariantsFor(const DeviceProperties& gpu, const ProductShape& shape,
                                 int64_t tokens) {
  bool wgmma_chosen = false;
  std::vector<Variant> wgmma = WgmmaVariantsFor(gpu, shape, tokens, &wgmma_chosen);
  if (wgmma_chosen) wgmma.front().name += " *";
  const ProductPlan chosen = MatmulOptionsFor(gpu.num_multiprocessors, gpu.compute_capability())
                                 .planner(shape, gpu.num_multiprocessors);
  std::vector<ProductPlan> plans = {chosen};
  const auto add = [&](ProductKernel kernel, int token_blocks, int tiles_per_warp) {
    const ProductPlan plan = Plan(gpu, shape, kernel, token_blocks, tiles_per_warp);
    if (NameOf(plan) != NameOf(chosen)) plans.push_back(plan);
  };
  if (tokens <= 16) add(ProductKernel::kStream, 1, 1);
  if (tokens <= 16 && plan::StreamsTwoTiles(shape.format)) {
    add(ProductKernel::kStream, 1, 2);
    for (const ProductPlan& plan : SmallWint2Plans(gpu, shape)) {
      if (NameOf(plan) != NameOf(chosen)) plans.push_back(plan);
    }
  }
  if (tokens > 4 && tokens <= 64) add(ProductKernel::kTile, 2, 2);
  if (tokens > 16 && tokens <= 64) add(ProductKernel::kTile, 4, 2);
  if (tokens > 32) add(ProductKernel::kTile, 8, 2);
  std::vector<Variant> variants;
  for (const ProductPlan& plan : plans) {
    const bool marked = variants.empty() && !wgmma_chosen;
    variants.push_back({NameOf(plan) + (marked ? " *" : ""), plan, std::nullopt});
  }
  variants.insert(variants.end(), wgmma.begin(), wgmma.end());
  return variants;
}

std::vector<Variant> BaselinesFor(const DeviceProperties& gpu, const ProductShape& shape) {
  std::vector<ProductPlan> plans = SmallWint2Plans(gpu, shape);
  for (const int tiles_per_warp : {1, 2}) {
    ProductPlan plan;
    plan.tiles_per_warp = tiles_per_warp;
    plan.slices = plan::StreamSlices(shape.chunks);
    const int64_t items = plan::MaxTokenTiles(shape, plan.token_tile()) *
                          plan::DivideUp(shape.tiles, plan::TilesPerBlock(plan));
    plan.grid_blocks = static_cast<int>(std::min<int64_t>(items, 2 * gpu.num_multiprocessors));
    plans.push_back(plan);
  }
  std::vector<Variant> variants;
  for (const ProductPlan& plan : plans) variants.push_back({NameOf(plan), plan, std::nullopt});
  return variants;
}

}  // namespace wintserve::kernels::cuda
