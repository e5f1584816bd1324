#include "tools/quantizer/calibrate/cholesky.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "Eigen/Cholesky"
#include "tools/quantizer/calibrate/double_product.h"

namespace wintserve::quantizer::calibrate {
namespace {

constexpr int64_t kBlock = 128;
static_assert(kBlock % kPanelColumns == 0);

int64_t BlockSize(int64_t begin, int64_t end) { return std::min(kBlock, end - begin); }

// Item `item` of the blocks (row >= column) of a triangle, row by row.
std::pair<int64_t, int64_t> TriangleBlock(int64_t item) {
  int64_t row = 0;
  while (item > row) item -= ++row;
  return {row, item};
}

// Both factors of an update as SubtractProduct takes them.
struct UpdateScratch {
  std::vector<double> left = std::vector<double>(kBlock * kBlock);
  std::vector<double> panel = std::vector<double>(kBlock * kPanelColumns);
};

// The block at (row, column) less the product of what is factored, columns [begin, begin + kBlock),
// at its rows and at its columns. A column of the block is a row of SubtractProduct's.
void UpdateBlock(Eigen::MatrixXd& matrix, int64_t row, int64_t column, int64_t begin,
                 UpdateScratch& scratch) {
  const int64_t size = matrix.rows();
  const int64_t height = BlockSize(row, size);
  const int64_t columns = BlockSize(column, size);
  double* const data = matrix.data();
  for (int64_t i = 0; i < kBlock; ++i) {
    const double* from = data + (begin + i) * size + column;
    for (int64_t c = 0; c < columns; ++c) scratch.left[c * kBlock + i] = from[c];
  }
  int64_t done = 0;
  for (; done + kPanelColumns <= height; done += kPanelColumns) {
    for (int64_t i = 0; i < kBlock; ++i) {
      std::copy_n(data + (begin + i) * size + row + done, kPanelColumns,
                  scratch.panel.data() + i * kPanelColumns);
    }
    SubtractProduct(scratch.left.data(), kBlock, columns, kBlock, scratch.panel.data(),
                    data + column * size + row + done, size);
  }
  if (done == height) return;
  matrix.block(row + done, column, height - done, columns).noalias() -=
      matrix.block(row + done, begin, height - done, kBlock) *
      matrix.block(column, begin, columns, kBlock).transpose();
}

void DivideRow(double divisor, double* row) {
  for (int64_t c = 0; c < kPanelColumns; ++c) row[c] /= divisor;
}

}  // namespace

bool FactorInPlace(Eigen::MatrixXd& matrix, kernels::cpu::ThreadPool& pool) {
  const int64_t size = matrix.rows();
  std::vector<UpdateScratch> scratch(pool.num_threads());
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
             [&](int64_t item, int thread) {
               const auto [i, j] = TriangleBlock(item);
               UpdateBlock(matrix, rest + i * kBlock, rest + j * kBlock, begin, scratch[thread]);
             });
  }
  return true;
}

void MirrorLower(Eigen::MatrixXd& matrix, kernels::cpu::ThreadPool& pool) {
  const int64_t size = matrix.rows();
  const int64_t num_blocks = (size + kBlock - 1) / kBlock;
  pool.Run(num_blocks * (num_blocks + 1) / 2, size * size, [&](int64_t item, int) {
    const auto [i, j] = TriangleBlock(item);
    const int64_t row = i * kBlock;
    const int64_t column = j * kBlock;
    const int64_t height = BlockSize(row, size);
    const int64_t width = BlockSize(column, size);
    if (i != j) {
      matrix.block(column, row, width, height) =
          matrix.block(row, column, height, width).transpose();
      return;
    }
    for (int64_t c = column; c < column + width; ++c) {
      for (int64_t r = c + 1; r < row + height; ++r) matrix(c, r) = matrix(r, c);
    }
  });
}

void SolvePanel(const Eigen::MatrixXd& mirrored, double* tile) {
  constexpr int64_t kRows = 64;
  const int64_t size = mirrored.rows();
  // L[r, i] with i <= r lies at r * size + i, and L[i, r] with i >= r as well.
  const double* const data = mirrored.data();
  const auto row_of = [&](int64_t row) { return tile + row * kPanelColumns; };
  for (int64_t begin = 0; begin < size; begin += kRows) {
    const int64_t end = std::min(begin + kRows, size);
    SubtractProduct(data + begin * size, size, end - begin, begin, tile, row_of(begin),
                    kPanelColumns);
    for (int64_t r = begin; r < end; ++r) {
      SubtractProduct(data + r * size + begin, size, 1, r - begin, row_of(begin), row_of(r),
                      kPanelColumns);
      DivideRow(data[r * size + r], row_of(r));
    }
  }
  for (int64_t end = size; end > 0; end = (end - 1) / kRows * kRows) {
    const int64_t begin = (end - 1) / kRows * kRows;
    SubtractProduct(data + begin * size + end, size, end - begin, size - end, row_of(end),
                    row_of(begin), kPanelColumns);
    for (int64_t r = end - 1; r >= begin; --r) {
      SubtractProduct(data + r * size + r + 1, size, 1, end - r - 1, row_of(r + 1), row_of(r),
                      kPanelColumns);
      DivideRow(data[r * size + r], row_of(r));
    }
  }
}

}  // namespace wintserve::quantizer::calibrate
