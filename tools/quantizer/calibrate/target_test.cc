#include "tools/quantizer/calibrate/target.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "Eigen/Eigenvalues"
#include "Eigen/QR"
#include "tools/quantizer/calibrate/calibration_test_util.h"

namespace wintserve::quantizer {
namespace {

using kernels::cpu::ThreadPool;
using testing::HasSubstr;

constexpr int64_t kInputs = 300;  // more than the terms that float32 sums up
constexpr int64_t kOutputs = 70;  // more than a tile of columns, and part of a second one
constexpr int64_t kRows = 700;

// Rows with weights, both kinds of inputs and extra outputs, and their moments.
struct Problem {
  Eigen::VectorXd root_weight;  // [kRows]
  Eigen::MatrixXd x_full;
  Eigen::MatrixXd x_quantized;
  Eigen::MatrixXd extra;
  FloatArray w;
  Moments moments;
};

Problem MakeProblem(bool with_extra) {
  std::mt19937 rng(7);
  Problem p;
  p.x_full = CorrelatedInputs(kRows, kInputs, 1.0, rng).cast<double>();
  p.x_quantized = p.x_full + 0.3 * GaussianMatrix(kRows, kInputs, rng).cast<double>();
  p.extra = with_extra ? Eigen::MatrixXd(GaussianMatrix(kRows, kOutputs, rng).cast<double>())
                       : Eigen::MatrixXd::Zero(kRows, kOutputs);
  p.root_weight = GaussianMatrix(kRows, 1, rng).cast<double>().cwiseAbs();
  p.w = GaussianMatrix(kInputs, kOutputs, rng);
  const Eigen::MatrixXd left =
      p.x_quantized.transpose() * p.root_weight.cwiseAbs2().asDiagonal();  // [k, rows]
  p.moments = MakeMoments(kInputs, true);
  p.moments.num_rows = kRows;
  p.moments.weight = p.root_weight.squaredNorm();
  Eigen::Map<FloatArray>(p.moments.hessian.data(), kInputs, kInputs) =
      (left * p.x_quantized).cast<float>();
  Eigen::Map<FloatArray>(p.moments.cross.data(), kInputs, kInputs) =
      (left * (p.x_full - p.x_quantized)).cast<float>();
  if (with_extra) {
    p.moments.cross_output.resize(kInputs * kOutputs);
    Eigen::Map<FloatArray>(p.moments.cross_output.data(), kInputs, kOutputs) =
        (left * p.extra).cast<float>();
  }
  return p;
}

// The minimum from the rows themselves, by QR in float64: no normal equations.
Eigen::MatrixXd LeastSquares(const Problem& p, double ridge) {
  const double mean = (p.root_weight.asDiagonal() * p.x_quantized).squaredNorm() / kInputs;
  Eigen::MatrixXd left(kRows + kInputs, kInputs);
  Eigen::MatrixXd right(kRows + kInputs, kOutputs);
  const Eigen::MatrixXd w = p.w.cast<double>();
  left << p.root_weight.asDiagonal() * p.x_quantized,
      std::sqrt(ridge * mean) * Eigen::MatrixXd::Identity(kInputs, kInputs);
  right << p.root_weight.asDiagonal() * (p.x_full * w + p.extra), std::sqrt(ridge * mean) * w;
  return left.householderQr().solve(right);
}

// What rounding the moments to float32 may change: an error of 2^-24 in each entry of H moves the
// solution X of A X = B by at most ||A^-1|| (||dH|| ||X|| + ||dB||) (to first order), and the
// result itself is rounded.
double Bound(const Problem& p, double ridge, const Eigen::MatrixXd& correction) {
  using ConstMap = Eigen::Map<const FloatArray>;
  Eigen::MatrixXd a = ConstMap(p.moments.hessian.data(), kInputs, kInputs).cast<double>();
  const double hessian_norm = a.norm();
  a.diagonal().array() += ridge * a.diagonal().mean();
  const double inverse_norm =
      1 / Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd>(a).eigenvalues().minCoeff();
  double side_norm = ConstMap(p.moments.cross.data(), kInputs, kInputs).norm() * p.w.norm();
  if (!p.moments.cross_output.empty()) {
    side_norm += ConstMap(p.moments.cross_output.data(), kInputs, kOutputs).norm();
  }
  const double rounding = std::ldexp(1.0, -24);
  return rounding * (inverse_norm * (hessian_norm * (1 + ridge) * correction.norm() + side_norm) +
                     p.w.norm() + correction.norm());
}

class SolveTargetTest : public testing::TestWithParam<bool> {};

TEST_P(SolveTargetTest, IsTheLeastSquaresSolutionOverTheRows) {
  const Problem p = MakeProblem(GetParam());
  ThreadPool pool(2);
  for (const double ridge : {0.001, 0.03, 1.0}) {
    const auto target = SolveTarget(View(p.w), p.moments, {.ridge = ridge}, pool);
    ASSERT_TRUE(target.ok()) << target.status();
    const Eigen::MatrixXd wanted = LeastSquares(p, ridge);
    const Eigen::MatrixXd got =
        Eigen::Map<const FloatArray>(target->data(), kInputs, kOutputs).cast<double>();
    const Eigen::MatrixXd correction = wanted - p.w.cast<double>();
    const double bound = Bound(p, ridge, correction);
    // The bound would let nothing pass that leaves the correction out.
    ASSERT_LT(bound, 1e-3 * correction.norm());
    EXPECT_LT((got - wanted).norm(), bound) << "ridge " << ridge;
  }
}

INSTANTIATE_TEST_SUITE_P(All, SolveTargetTest, testing::Bool(), [](const auto& info) {
  return info.param ? "WithExtraOutput" : "InputsAlone";
});

TEST(SolveTarget, IsTheMatrixItselfWithoutDifferences) {
  std::mt19937 rng(3);
  const FloatArray w = GaussianMatrix(8, 5, rng);
  ThreadPool pool(1);
  for (const Moments& moments :
       {MomentsOf(GaussianMatrix(20, 8, rng)), MakeMoments(8, false), MakeMoments(8, true)}) {
    const auto target = SolveTarget(View(w), moments, {}, pool);
    ASSERT_TRUE(target.ok()) << target.status();
    EXPECT_EQ(*target, LargeVector(w.data(), w.data() + w.size()));
  }
}

// Fewer rows than inputs, and an input that is always zero: what no row tells stays as it is.
TEST(SolveTarget, KeepsWeightsOfInputsThatAreAlwaysZero) {
  std::mt19937 rng(5);
  FloatArray x = GaussianMatrix(3, 8, rng);
  x.col(2).setZero();
  Moments moments = MomentsOf(x);
  moments.cross.assign(64, 0);
  Eigen::Map<FloatArray>(moments.cross.data(), 8, 8) = x.transpose() * GaussianMatrix(3, 8, rng);
  const FloatArray w = GaussianMatrix(8, 5, rng);
  ThreadPool pool(1);
  const auto target = SolveTarget(View(w), moments, {}, pool);
  ASSERT_TRUE(target.ok()) << target.status();
  for (int64_t column = 0; column < 5; ++column) {
    EXPECT_EQ((*target)[2 * 5 + column], w(2, column));
    EXPECT_NE((*target)[3 * 5 + column], w(3, column));
  }
}

TEST(SolveTarget, NamesWhatDoesNotFit) {
  std::mt19937 rng(3);
  const FloatArray w = GaussianMatrix(8, 5, rng);
  ThreadPool pool(1);
  const auto message = [&](const Moments& moments, double ridge) {
    return SolveTarget(View(w), moments, {.ridge = ridge}, pool).status().ToString();
  };
  EXPECT_THAT(message(MakeMoments(7, true), 0.1), HasSubstr("of 7 inputs, the matrix has 8"));
  EXPECT_THAT(message(MakeMoments(8, true), 0), HasSubstr("ridge is 0"));
  Moments extra = MakeMoments(8, true);
  extra.cross_output.assign(8 * 4, 0);
  EXPECT_THAT(message(extra, 0.1), HasSubstr("cross_output has 32 values, the matrix has 8 x 5"));
}

}  // namespace
}  // namespace wintserve::quantizer
