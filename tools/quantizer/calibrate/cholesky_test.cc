#include "tools/quantizer/calibrate/cholesky.h"

#include <gtest/gtest.h>

#include "Eigen/Cholesky"
#include "tools/quantizer/calibrate/calibration_test_util.h"
#include "tools/quantizer/calibrate/double_product.h"

namespace wintserve::quantizer::calibrate {
namespace {

using kernels::cpu::ThreadPool;

Eigen::MatrixXd Random(int64_t rows, int64_t columns, std::mt19937& rng) {
  return GaussianMatrix(rows, columns, rng).cast<double>();
}

// Every count of rows beside whole blocks, and depths beside whole parts. A sum of `depth` products
// is off by at most (depth + 1) 2^-53 of the sum of magnitudes, here and in the reference.
TEST(SubtractProduct, IsTheProductWhateverTheShape) {
  using RowMajor = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  std::mt19937 rng(3);
  for (const int64_t rows : {1, 2, 5, 6, 7, 12, 64}) {
    for (const int64_t depth : {0, 1, 127, 128, 129, 300}) {
      const RowMajor x = Random(rows, depth + 3, rng);  // its row stride is more than its depth
      const RowMajor panel = Random(depth, kPanelColumns, rng);
      const RowMajor before = Random(rows, kPanelColumns + 5, rng);
      RowMajor out = before;
      SubtractProduct(x.data(), x.cols(), rows, depth, panel.data(), out.data(), out.cols());
      RowMajor wanted = before;
      wanted.leftCols(kPanelColumns) -= x.leftCols(depth) * panel;
      RowMajor magnitude = before.cwiseAbs();
      magnitude.leftCols(kPanelColumns) += x.leftCols(depth).cwiseAbs() * panel.cwiseAbs();
      const double unit = 2 * static_cast<double>(depth + 1) * 0x1p-53;
      EXPECT_TRUE(((out - wanted).array().abs() <= unit * magnitude.array()).all())
          << rows << " x " << depth;
      EXPECT_EQ(out.rightCols(5), before.rightCols(5));
    }
  }
}

class Cholesky : public testing::TestWithParam<int64_t> {
 protected:
  // Of condition number below 100 or so.
  Eigen::MatrixXd Positive() {
    const int64_t size = GetParam();
    const Eigen::MatrixXd x = Random(2 * size, size, rng_);
    return x.transpose() * x / static_cast<double>(size) +
           0.1 * Eigen::MatrixXd::Identity(size, size);
  }
  std::mt19937 rng_{4};
};

// |L L^T - A| <= (size + 1) 2^-53 |L| |L|^T to first order (Higham, Accuracy and Stability, theorem
// 10.3), and as much for multiplying again.
TEST_P(Cholesky, FactorsWithoutReadingTheUpperHalf) {
  const Eigen::MatrixXd a = Positive();
  Eigen::MatrixXd factored = a;
  factored.triangularView<Eigen::StrictlyUpper>().setConstant(1e300);
  ThreadPool pool(2);
  ASSERT_TRUE(FactorInPlace(factored, pool));
  const Eigen::MatrixXd l = factored.triangularView<Eigen::Lower>();
  const Eigen::MatrixXd magnitude = l.cwiseAbs() * l.cwiseAbs().transpose();
  const double unit = 2 * static_cast<double>(GetParam() + 1) * 0x1p-53;
  EXPECT_TRUE(((l * l.transpose() - a).array().abs() <= unit * magnitude.array()).all());

  Eigen::MatrixXd alone = a;
  ThreadPool one(1);
  ASSERT_TRUE(FactorInPlace(alone, one));
  EXPECT_EQ(Eigen::MatrixXd(alone.triangularView<Eigen::Lower>()), l);
}

// A X is off by at most 2 (size + 1) 2^-53 |L| |L|^T |X| (theorem 10.4, with both solutions), and
// as much again for the factor and for multiplying.
TEST_P(Cholesky, Solves) {
  const int64_t size = GetParam();
  const Eigen::MatrixXd a = Positive();
  const Eigen::MatrixXd b = Random(size, kPanelColumns, rng_);
  Eigen::MatrixXd factored = a;
  ThreadPool pool(2);
  ASSERT_TRUE(FactorInPlace(factored, pool));
  MirrorLower(factored, pool);
  ASSERT_EQ(factored, factored.transpose());
  Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor> x = b;
  SolvePanel(factored, x.data());
  const Eigen::MatrixXd l = factored.triangularView<Eigen::Lower>();
  const Eigen::MatrixXd magnitude = l.cwiseAbs() * (l.cwiseAbs().transpose() * x.cwiseAbs());
  const double unit = 4 * static_cast<double>(size + 1) * 0x1p-53;
  EXPECT_TRUE(((a * x - b).array().abs() <= unit * magnitude.array()).all());
}

TEST_P(Cholesky, TellsWhatIsNotPositiveDefinite) {
  Eigen::MatrixXd a = Positive();
  a(GetParam() - 1, GetParam() - 1) = -1;
  ThreadPool pool(2);
  EXPECT_FALSE(FactorInPlace(a, pool));
}

// Within a block, whole blocks, and what is left beside blocks and panels.
INSTANTIATE_TEST_SUITE_P(All, Cholesky, testing::Values(1, 48, 128, 192, 256, 300, 448),
                         testing::PrintToStringParamName());

}  // namespace
}  // namespace wintserve::quantizer::calibrate
