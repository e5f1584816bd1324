// The kernels that a benchmark of the weight products compares.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "kernels/cuda/device.h"
#include "kernels/cuda/matmul/product_params.h"
#include "kernels/formats/matrix.h"
#include "kernels/plan/product_plan.h"
#include "kernels/plan/wgmma_plan.h"

namespace wintserve::kernels::cuda {

// One kernel: the Hopper kernel if `wgmma` is set.
struct Variant {
  std::string name;
  plan::ProductPlan plan;
  std::optional<plan::WgmmaPlan> wgmma;

  int slices() const { return wgmma.has_value() ? wgmma->slices : plan.slices; }
  bool split_slices() const { return wgmma.has_value() ? wgmma->split_slices : plan.split_slices; }
  int64_t split_sum_floats(const plan::ProductShape& shape) const {
    return wgmma.has_value() ? plan::SplitSumFloats(shape, *wgmma)
                             : plan::SplitSumFloats(shape, plan);
  }
  void Launch(formats::WeightFormat format, const ProductParams& params, cudaStream_t stream) const;
};

// Every kernel that suits that many tokens an expert; what the planners choose is marked.
std::vector<Variant> VariantsFor(const DeviceProperties& gpu, const plan::ProductShape& shape,
                                 int64_t tokens);

// Both skeletons for small batches, the stream kernel's with one and two tiles a warp.
std::vector<Variant> BaselinesFor(const DeviceProperties& gpu, const plan::ProductShape& shape);

}  // namespace wintserve::kernels::cuda
