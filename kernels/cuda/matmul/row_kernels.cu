#include "common/check.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/matmul/launches.h"
#include "kernels/cuda/matmul/row_kernels.cuh"
#include "kernels/cuda/matmul/tile_product.cuh"

namespace wintserve::kernels::cuda {
namespace {

// Shared memory that a kernel has without asking; a longer row is read from memory twice.
constexpr int kMaxCachedBytes = 48 * 1024 - kPrepareReductionBytes;

// What they read has just been written.
__device__ __forceinline__ void BeginAfterPrevious() {
  WaitForPreviousKernel();
  LetNextKernelBegin();
}

__global__ void __launch_bounds__(kRowThreads)
    PrepareRowsKernel(const __grid_constant__ PrepareParams params) {
  extern __shared__ __align__(16) uint8_t row_shared[];
  BeginAfterPrevious();
  PrepareRow(params, row_shared);
}

__global__ void __launch_bounds__(kRowThreads)
    SortPairsKernel(const __grid_constant__ SortParams params) {
  extern __shared__ __align__(16) uint8_t row_shared[];
  BeginAfterPrevious();
  SortPairs(params, row_shared);
}

__global__ void __launch_bounds__(kRowThreads)
    CombineExpertsKernel(const __grid_constant__ CombineParams params) {
  extern __shared__ __align__(16) uint8_t row_shared[];
  BeginAfterPrevious();
  CombineExperts(params, row_shared);
}

__global__ void __launch_bounds__(kRowThreads)
    AddSlicesKernel(const __grid_constant__ ProductParams params) {
  BeginAfterPrevious();
  AddSlices(params);
}

LaunchShape RowShape(int64_t blocks, int shared_bytes) {
  CHECK(blocks > 0 && blocks <= INT32_MAX, "blocks={}", blocks);
  LaunchShape shape;
  shape.grid = static_cast<unsigned>(blocks);
  shape.block = kRowThreads;
  shape.shared_bytes = shared_bytes;
  shape.overlaps_previous = true;
  return shape;
}

}  // namespace

void LaunchPrepareRows(PrepareParams params, int64_t num_rows, cudaStream_t stream) {
  const int floats = params.chunks * plan::kChunkRows;
  params.cached_floats = floats * 4 <= kMaxCachedBytes ? floats : 0;
  CUDA_LAUNCH(PrepareRowsKernel,
              RowShape(num_rows, kPrepareReductionBytes + params.cached_floats * 4), stream,
              params);
}

void LaunchSortPairs(const SortParams& params, cudaStream_t stream) {
  CUDA_LAUNCH(SortPairsKernel, RowShape(params.num_experts, kSortSharedBytes), stream, params);
}

void LaunchCombineExperts(const CombineParams& params, int64_t num_rows, cudaStream_t stream) {
  CHECK(params.top_k > 0 && params.top_k <= kMaxTopK, "top_k={}", params.top_k);
  const int64_t blocks = num_rows * plan::DivideUp(params.columns, kRowThreads);
  CUDA_LAUNCH(CombineExpertsKernel, RowShape(blocks, kCombineSharedBytes), stream, params);
}

void LaunchAddSlices(const ProductParams& params, cudaStream_t stream) {
  const int64_t blocks = int64_t{params.num_tokens} * plan::DivideUp(params.columns, kRowThreads);
  CUDA_LAUNCH(AddSlicesKernel, RowShape(blocks, 0), stream, params);
}

}  // namespace wintserve::kernels::cuda
