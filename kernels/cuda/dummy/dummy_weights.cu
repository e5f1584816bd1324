#include <algorithm>

#include "common/check.h"
#include "kernels/cuda/dummy/dummy_weights.h"
#include "kernels/cuda/launch.h"
#include "kernels/plan/dummy_weights.h"

namespace wintserve::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 16;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    DummyRowsKernel(plan::DummyWeights weights, int64_t count, T* out) {
  const int64_t columns = weights.matrix().n;
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += step) {
    if constexpr (sizeof(T) == sizeof(float)) {
      out[i] = weights.Float32(i / columns, i % columns);
    } else {
      out[i] = weights.Bfloat16(i / columns, i % columns);
    }
  }
}

// A block for each tile. Only bfloat16 asks for the largest weight of a column.
__global__ void __launch_bounds__(kThreads)
    DummyColumnInfosKernel(plan::DummyWeights weights, plan::WeightLayout layout,
                           plan::DummyCodeMaps maps, plan::ColumnInfo* infos) {
  __shared__ uint32_t largest[plan::kTileColumns];
  const int64_t tile = blockIdx.x;
  const auto row = static_cast<int>(threadIdx.x) % plan::kTileColumns;
  const int64_t column = layout.ColumnOfTileRow(tile, row);
  if (threadIdx.x < plan::kTileColumns) largest[threadIdx.x] = 0;
  __syncthreads();
  if (layout.format == formats::WeightFormat::kBfloat16 && column >= 0) {
    uint32_t own = 0;
    for (int64_t k = threadIdx.x / plan::kTileColumns; k < layout.k;
         k += kThreads / plan::kTileColumns) {
      own = max(own, weights.Bfloat16(k, column) & 0x7FFFu);
    }
    atomicMax(&largest[row], own);
  }
  __syncthreads();
  if (threadIdx.x < plan::kTileColumns) {
    infos[tile * plan::kTileColumns + row] =
        plan::DummyColumnInfo(weights, maps, column, static_cast<uint16_t>(largest[row]));
  }
}

__global__ void __launch_bounds__(kThreads)
    DummyRecordsKernel(plan::DummyWeights weights, plan::WeightLayout layout,
                       const plan::ColumnInfo* infos, int64_t num_pieces, plan::Piece* out) {
  const int pieces = plan::PiecesPerRecord(layout.format);
  const int64_t chunks = layout.chunks();
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < num_pieces; i += step) {
    const int64_t record = i / pieces;
    out[i] = plan::DummyPiece(weights, layout, infos, record / chunks, record % chunks,
                              static_cast<int>(i % pieces));
  }
}

LaunchShape ShapeFor(int64_t count) {
  const int64_t blocks = std::min((count + kThreads - 1) / kThreads, kMaxBlocks);
  return {.grid = static_cast<unsigned>(blocks), .block = kThreads};
}

}  // namespace

void LaunchDummyRows(const formats::DummyMatrix& matrix, void* out, cudaStream_t stream) {
  const plan::DummyWeights weights(matrix);
  const int64_t count = matrix.k * matrix.n;
  if (matrix.format == formats::WeightFormat::kFloat32) {
    CUDA_LAUNCH(DummyRowsKernel<float>, ShapeFor(count), stream, weights, count,
                static_cast<float*>(out));
  } else {
    CHECK(matrix.format == formats::WeightFormat::kBfloat16, "format={}",
          static_cast<int>(matrix.format));
    CUDA_LAUNCH(DummyRowsKernel<uint16_t>, ShapeFor(count), stream, weights, count,
                static_cast<uint16_t*>(out));
  }
}

void LaunchDummyWeights(const formats::DummyMatrix& matrix, const plan::WeightLayout& layout,
                        uint8_t* out, cudaStream_t stream) {
  const plan::DummyWeights weights(matrix);
  auto* infos = reinterpret_cast<plan::ColumnInfo*>(out);
  const LaunchShape tiles = {.grid = static_cast<unsigned>(layout.tiles()), .block = kThreads};
  CUDA_LAUNCH(DummyColumnInfosKernel, tiles, stream, weights, layout, plan::SharedDummyCodeMaps(),
              infos);
  const int64_t num_pieces =
      layout.tiles() * layout.chunks() * plan::PiecesPerRecord(layout.format);
  CUDA_LAUNCH(DummyRecordsKernel, ShapeFor(num_pieces), stream, weights, layout, infos, num_pieces,
              reinterpret_cast<plan::Piece*>(out + layout.records_offset()));
}

}  // namespace wintserve::kernels::cuda
