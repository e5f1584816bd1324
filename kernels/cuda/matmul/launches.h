// One function a kernel of a product: grid, shared memory and the instantiation that a plan names.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/cuda/matmul/product_params.h"
#include "kernels/formats/matrix.h"
#include "kernels/plan/product_plan.h"

namespace wintserve::kernels::cuda {

// overlaps: LaunchShape::overlaps_previous.
void LaunchPrepareRows(PrepareParams params, int64_t num_rows, cudaStream_t stream,
                       bool overlaps = true);
// Both in one launch: neither reads what the other writes.
void LaunchSortAndPrepare(SortParams sort, PrepareParams prepare, int64_t num_rows,
                          cudaStream_t stream);
void LaunchCombineExperts(const CombineParams& params, int64_t num_rows, cudaStream_t stream,
                          bool overlaps = true);
void LaunchAddSlices(const ProductParams& params, cudaStream_t stream);

// Both kernels of one format, each in a source of its own because they take long to compile.
struct ProductLaunches {
  void (*allow_shared_memory)();
  void (*stream)(const plan::ProductPlan& plan, const ProductParams& params, cudaStream_t stream);
  void (*tile)(const plan::ProductPlan& plan, const ProductParams& params, cudaStream_t stream);
};
const ProductLaunches& Wint2Launches();
const ProductLaunches& Wint4Launches();
const ProductLaunches& Wint8Launches();
const ProductLaunches& Bfloat16Launches();

const ProductLaunches& LaunchesOf(formats::WeightFormat format);

}  // namespace wintserve::kernels::cuda
