#include "tools/quantizer/calibrate/cholesky.h"

#include <algorithm>

#include "Eigen/Cholesky"

namespace wintserve::quantizer::calibrate {
namespace {

constexpr int64_t kBlock = 256;

int64_t BlockSize(int64_t begin, int64_t end) { return std::min(kBlock, end - begin); }

// Item `item` of the blocks (row >= column) of a triangle, row by row.
std::pair<int64_t, int64_t> TriangleBlock(int64_t item) {
  int64_t row = 0;
  while (item > row) item -= ++row;
  return {row, item};
}

}  // namespace

bool FactorInPlace(Eigen::MatrixXd& matrix, kernels::cpu::ThreadPool& pool) {
  const int64_t size = matrix.rows();
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const int64_t width = BlockSize(begin, size);
    Eigen::Ref<Eigen::MatrixXd> diagonal = matrix.block(begin, begin, width, width);
    const Eigen::LLT<Eigen::Ref<Eigen::MatrixXd>> factor(diagonal);
    if (factor.info() != Eigen::Success) return false;

    const int64_t rest = begin + width;
    const int64_t num_blocks = (size - rest + kBlock - 1) / kBlock;
    pool.Run(num_blocks, (size - rest) * width * width / 2, [&](int64_t item, int) {
      const int64_t row = rest + item * kBlock;
      auto block = matrix.block(row, begin, BlockSize(row, size), width);
      diagonal.triangularView<Eigen::Lower>().transpose().solveInPlace<Eigen::OnTheRight>(block);
    });
    pool.Run(num_blocks * (num_blocks + 1) / 2, (size - rest) * (size - rest) * width / 2,
             [&](int64_t item, int) {
               const auto [i, j] = TriangleBlock(item);
               const int64_t row = rest + i * kBlock;
               const int64_t column = rest + j * kBlock;
               const int64_t height = BlockSize(row, size);
               const int64_t columns = BlockSize(column, size);
               matrix.block(row, column, height, columns).noalias() -=
                   matrix.block(row, begin, height, width) *
                   matrix.block(column, begin, columns, width).transpose();
             });
  }
  return true;
}

}  // namespace wintserve::quantizer::calibrate
