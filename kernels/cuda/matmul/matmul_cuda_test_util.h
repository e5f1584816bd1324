// What the tests of the weight products on a GPU share: the device, plans that force each kernel,
// matrices with what their references need, and the references.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <optional>
#include <random>
#include <vector>

#include "kernels/cuda/device.h"
#include "kernels/cuda/matmul/device_array_test_util.h"
#include "kernels/cuda/matmul/matmul.h"
#include "kernels/cuda/matmul/reference_products_test_util.h"
#include "kernels/formats/matrix.h"
#include "kernels/plan/product_plan.h"
#include "kernels/plan/wgmma_plan.h"

namespace wintserve::kernels::cuda {

struct Gpu {
  DeviceProperties properties;
  Stream stream;
};

// One device for all tests.
const Gpu& TheGpu();
cudaStream_t TheStream();
bool HasWgmma();

template <plan::ProductKernel kKernel, int kTokenBlocks, int kTilesPerWarp, bool kSplit>
plan::ProductPlan ForcedPlan(const plan::ProductShape& shape, int num_multiprocessors) {
  plan::ProductPlan plan;
  plan.kernel = kKernel;
  plan.token_blocks = kTokenBlocks;
  plan.tiles_per_warp = kTilesPerWarp;
  plan.split_slices = kSplit;
  return plan::FinishPlan(shape, num_multiprocessors, plan);
}

template <int kTokens, bool kSplit>
std::optional<plan::WgmmaPlan> ForcedWgmma(const plan::ProductShape& shape,
                                           int num_multiprocessors) {
  plan::WgmmaPlan plan;
  const bool exists = kTokens < plan::kNarrowTokens ? plan::HasSmallWgmma(shape.format)
                                                    : plan::HasWideWgmma(shape.format);
  plan.tokens = exists ? kTokens : plan::kNarrowTokens;
  plan.split_slices = kSplit && shape.num_experts == 1;
  return plan::FinishWgmmaPlan(shape, num_multiprocessors, plan);
}

struct NamedPlanner {
  const char* name;
  decltype(MatmulOptions::planner) planner;
  plan::WgmmaPlanner wgmma_planner = nullptr;  // null: the portable kernels

  bool IsOfThisGpu() const { return wgmma_planner == nullptr || HasWgmma(); }
};
inline constexpr NamedPlanner kForcedPlanners[] = {
    {"stream", ForcedPlan<plan::ProductKernel::kStream, 1, 1, false>},
    {"tile of 16", ForcedPlan<plan::ProductKernel::kTile, 2, 2, false>},
    {"tile of 32", ForcedPlan<plan::ProductKernel::kTile, 4, 2, false>},
    {"tile of 64", ForcedPlan<plan::ProductKernel::kTile, 8, 2, false>},
    {"tile of 16, split", ForcedPlan<plan::ProductKernel::kTile, 2, 2, true>},
    {"tile of 64, split", ForcedPlan<plan::ProductKernel::kTile, 8, 2, true>},
    {"portable", plan::PlanProduct},
    {"wgmma of 32", plan::PlanProduct, ForcedWgmma<plan::kSmallTokens, false>},
    {"wgmma of 64", plan::PlanProduct, ForcedWgmma<plan::kNarrowTokens, false>},
    {"wgmma of 64, split", plan::PlanProduct, ForcedWgmma<plan::kNarrowTokens, true>},
    {"wgmma of 128", plan::PlanProduct, ForcedWgmma<plan::kWideTokens, false>},
    {"wgmma of 128, split", plan::PlanProduct, ForcedWgmma<plan::kWideTokens, true>},
};

// What the backend uses on this GPU.
MatmulOptions OptionsFor();
MatmulOptions OptionsFor(const NamedPlanner& planner);

// A matrix on the device, and what its references need, [k, n].
struct TestMatrix {
  formats::HostMatrix host;
  DeviceArray<uint8_t> bytes{0};
  DeviceWeights device;
  std::vector<double> weights;  // unrounded
  std::vector<float> units;     // size of a code step: local scale * channel scale
  std::vector<float> rounded;   // as FastDeploy rounds
};

TestMatrix MakeTestMatrix(formats::HostMatrix host, bool gate_up);

std::vector<float> RandomRows(int64_t count, std::mt19937* rng);

// Rows as the products see them: values of a binary16 under a power of two of the row.
std::vector<double> RoundToFloat16Rows(const std::vector<float>& x, int64_t k);
std::vector<float> RoundToBfloat16Rows(std::vector<float> x);

struct Reference {
  std::vector<double> value;
  std::vector<double> magnitude;
  std::vector<double> unit_magnitude;
};

Reference ReferenceProduct(const ReferenceTokens& tokens, const DeviceArray<double>& x,
                           const DeviceArray<double>& w, const DeviceArray<float>& units, int64_t k,
                           int64_t n);
// With FastDeploy's roundings.
std::vector<float> RoundedProduct(const ReferenceTokens& tokens, const DeviceArray<float>& x,
                                  const DeviceArray<float>& w, int64_t k, int64_t n);

struct Errors {
  double root_mean_square = 0;
  double largest = 0;
};

Errors ErrorsOf(const std::vector<float>& got, const std::vector<double>& expected);

}  // namespace wintserve::kernels::cuda
