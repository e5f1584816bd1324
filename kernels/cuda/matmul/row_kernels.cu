#include "common/check.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/matmul/launches.h"
#include "kernels/cuda/matmul/row_kernels.cuh"
#include "kernels/cuda/matmul/tile_product.cuh"

namespace wintserve::kernels::cuda {
namespace {

__global__ void __launch_bounds__(32 * kMaxRowWarps)
    PrepareRowsKernel(const __grid_constant__ PrepareParams params) {
  __shared__ __align__(16) uint8_t row_shared[kPrepareSharedBytes];
  BeginAfterPreviousKernel();
  PrepareRow(params, static_cast<int>(blockIdx.x), row_shared);
}

__global__ void __launch_bounds__(32 * kMaxRowWarps)
    SortAndPrepareKernel(const __grid_constant__ SortParams sort,
                         const __grid_constant__ PrepareParams prepare, int num_rows) {
  __shared__ __align__(16) uint8_t row_shared[kSortAndPrepareSharedBytes];
  BeginAfterPreviousKernel();
  SortAndPrepare(sort, prepare, num_rows, row_shared);
}

__global__ void __launch_bounds__(kRowThreads)
    CombineExpertsKernel(const __grid_constant__ CombineParams params) {
  __shared__ __align__(16) uint8_t row_shared[kCombineSharedBytes];
  CombineExperts(params, row_shared);
}

__global__ void __launch_bounds__(kRowThreads)
    AddSlicesKernel(const __grid_constant__ ProductParams params) {
  BeginAfterPreviousKernel();
  AddSlices(params);
}

LaunchShape RowShape(int64_t blocks, int threads, bool overlaps = true) {
  CHECK(blocks > 0 && blocks <= INT32_MAX, "blocks={}", blocks);
  return {.grid = static_cast<unsigned>(blocks),
          .block = static_cast<unsigned>(threads),
          .overlaps_previous = overlaps};
}

}  // namespace

void LaunchPrepareRows(PrepareParams params, int64_t num_rows, cudaStream_t stream, bool overlaps) {
  params.threads = PrepareThreads(params.chunks);
  CUDA_LAUNCH(PrepareRowsKernel, RowShape(num_rows, params.threads, overlaps), stream, params);
}

void LaunchSortAndPrepare(SortParams sort, PrepareParams prepare, int64_t num_rows,
                          cudaStream_t stream) {
  prepare.threads = PrepareThreads(prepare.chunks);
  sort.threads = prepare.threads;
  CUDA_LAUNCH(SortAndPrepareKernel, RowShape(num_rows + sort.num_experts, prepare.threads), stream,
              sort, prepare, static_cast<int>(num_rows));
}

void LaunchCombineExperts(const CombineParams& params, int64_t num_rows, cudaStream_t stream,
                          bool overlaps) {
  CHECK(params.top_k > 0 && params.top_k <= kMaxTopK, "top_k={}", params.top_k);
  const int64_t blocks = num_rows * plan::DivideUp(params.columns, kRowThreads);
  CUDA_LAUNCH(CombineExpertsKernel, RowShape(blocks, kRowThreads, overlaps), stream, params);
}

void LaunchAddSlices(const ProductParams& params, cudaStream_t stream) {
  const int64_t blocks = int64_t{params.num_tokens} * plan::DivideUp(params.columns, kRowThreads);
  CUDA_LAUNCH(AddSlicesKernel, RowShape(blocks, kRowThreads), stream, params);
}

}  // namespace wintserve::kernels::cuda
