#include "tools/quantizer/calibrate/feedback_factor.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "kernels/formats/wint2.h"
#include "tools/quantizer/calibrate/calibration_test_util.h"

namespace wintserve::quantizer {
namespace {

using formats::WeightFormat;
using kernels::cpu::ThreadPool;
using testing::HasSubstr;

Eigen::MatrixXd AsMatrix(const float* data, int64_t k, int64_t stride) {
  return Eigen::Map<const FloatArray, 0, Eigen::OuterStride<>>(data, k, k, {stride}).cast<double>();
}

Eigen::MatrixXd Hessian(const FeedbackFactor& factor) {
  return AsMatrix(factor.hessian(), factor.k(), factor.hessian_stride());
}

Eigen::MatrixXd Factor(const FeedbackFactor& factor) {
  return AsMatrix(factor.factor(), factor.k(), factor.k());
}

FeedbackFactor MakeFactor(const Moments& moments, const FactorOptions& options) {
  ThreadPool pool(2);
  auto factor = FeedbackFactor::Make(moments, options, pool);
  EXPECT_TRUE(factor.ok()) << factor.status();
  return *std::move(factor);
}

struct OrderCase {
  const char* name;
  FactorOptions options;
};

class FeedbackFactorOrder : public testing::TestWithParam<OrderCase> {};

TEST_P(FeedbackFactorOrder, FactorsTheDampedHessianOfTheEncodingOrder) {
  constexpr int64_t kInputs = 192;
  std::mt19937 rng(1);
  const Moments moments = MomentsOf(CorrelatedInputs(300, kInputs, 1.0, rng));
  const FeedbackFactor factor = MakeFactor(moments, GetParam().options);

  const Eigen::MatrixXd h = AsMatrix(moments.hessian.data(), kInputs, kInputs);
  const double mean = h.diagonal().mean();
  EXPECT_DOUBLE_EQ(factor.unit(), mean);
  Eigen::MatrixXd wanted(kInputs, kInputs);
  for (int64_t i = 0; i < kInputs; ++i) {
    for (int64_t j = 0; j < kInputs; ++j) {
      wanted(i, j) = h(factor.true_row()[i], factor.true_row()[j]) / mean +
                     (i == j ? GetParam().options.damping : 0);
    }
  }
  // Two roundings to float32 of each entry.
  const double rounding = std::ldexp(1.0, -23);
  EXPECT_LE((Hessian(factor) - wanted).norm(), rounding * wanted.norm());
  const Eigen::MatrixXd m = Factor(factor);
  EXPECT_TRUE(m.isLowerTriangular(0));
  // M is rounded to float32 as well: twice ||M|| times its error, and ||M||^2 = trace(H).
  EXPECT_LE((m.transpose() * m - wanted).norm(), 2 * rounding * m.squaredNorm());
}

TEST_P(FeedbackFactorOrder, VisitsEveryRowOnceAndKeepsBytesAndGroupsTogether) {
  constexpr int64_t kInputs = 192;
  std::mt19937 rng(2);
  const FactorOptions& options = GetParam().options;
  const FeedbackFactor factor =
      MakeFactor(MomentsOf(CorrelatedInputs(300, kInputs, 1.0, rng)), options);
  const auto rows = factor.stored_row();
  std::vector<int32_t> sorted(rows.begin(), rows.end());
  std::sort(sorted.begin(), sorted.end());
  for (int32_t i = 0; i < kInputs; ++i) ASSERT_EQ(sorted[i], i);
  for (int64_t i = 0; i < kInputs; ++i) {
    const int64_t row = rows[i];
    if (options.format != WeightFormat::kWint2) {
      EXPECT_EQ(factor.true_row()[i], row);
      continue;
    }
    EXPECT_EQ(row % 4, i % 4);
    EXPECT_EQ(row / 64, rows[i / 64 * 64] / 64);
    EXPECT_EQ(row / 4, rows[i / 4 * 4] / 4);
    EXPECT_EQ(factor.true_row()[i],
              row / 64 * 64 + formats::Wint2TrueRow(static_cast<int>(row % 64), options.k_order));
  }
}

INSTANTIATE_TEST_SUITE_P(
    All, FeedbackFactorOrder,
    testing::Values(OrderCase{"Mma64", {.important_first = false}},
                    OrderCase{"Mma64ImportantFirst", {.important_first = true}},
                    OrderCase{"Natural",
                              {.k_order = formats::KOrder::kNatural, .important_first = true}},
                    OrderCase{"Wint4", {.damping = 1e-3, .format = WeightFormat::kWint4}},
                    OrderCase{"Wint8", {.format = WeightFormat::kWint8, .important_first = false}}),
    [](const auto& info) { return info.param.name; });

// More rows than the blocks in which it is factored, the last one partly filled.
TEST(FeedbackFactor, FactorsManyRowsAlikeOnAnyNumberOfThreads) {
  constexpr int64_t kInputs = 576;
  std::mt19937 rng(6);
  const Moments moments = MomentsOf(CorrelatedInputs(700, kInputs, 1.0, rng));
  ThreadPool one(1);
  ThreadPool three(3);
  const auto factor = FeedbackFactor::Make(moments, {}, one);
  const auto other = FeedbackFactor::Make(moments, {}, three);
  ASSERT_TRUE(factor.ok() && other.ok());
  const Eigen::MatrixXd h = Hessian(*factor);
  const Eigen::MatrixXd m = Factor(*factor);
  EXPECT_LE((m.transpose() * m - h).norm(), std::ldexp(1.0, -22) * m.squaredNorm());
  EXPECT_EQ(m, Factor(*other));
}

TEST(FeedbackFactor, PutsTheRowsWithTheLargestInputsFirst) {
  Moments moments = MakeMoments(128, false);
  for (int64_t row = 0; row < 128; ++row) {
    moments.hessian[row * 128 + row] = row == 100 ? 50.0f : row < 64 ? 0.5f : 1.0f;
  }
  const FeedbackFactor wint4 =
      MakeFactor(moments, {.format = WeightFormat::kWint4, .important_first = true});
  EXPECT_EQ(wint4.true_row()[0], 100);
  EXPECT_EQ(wint4.true_row()[1], 64);
  EXPECT_EQ(wint4.true_row()[64], 0);
  const FeedbackFactor wint2 = MakeFactor(moments, {.important_first = true});
  const auto first_byte = wint2.true_row().first(4);
  EXPECT_TRUE(std::find(first_byte.begin(), first_byte.end(), 100) != first_byte.end());
  EXPECT_LT(wint2.true_row()[64], 64);
}

TEST(FeedbackFactor, TakesAHessianOfZerosForTheIdentity) {
  const FeedbackFactor factor = MakeFactor(MakeMoments(64, false), {});
  EXPECT_EQ(factor.unit(), 1);
  EXPECT_TRUE(Hessian(factor).isIdentity(0));
  EXPECT_TRUE(Factor(factor).isIdentity(0));
}

// Fewer rows than inputs, and inputs that are always zero.
TEST(FeedbackFactor, FactorsASingularHessian) {
  std::mt19937 rng(4);
  FloatArray x = CorrelatedInputs(10, 128, 1.0, rng);
  x.col(5).setZero();
  const FeedbackFactor factor = MakeFactor(MomentsOf(x), {.damping = kSmallestDamping});
  const Eigen::MatrixXd m = Factor(factor);
  EXPECT_TRUE(m.allFinite());
  EXPECT_GT(m.diagonal().minCoeff(), 0);
}

TEST(FeedbackFactor, NamesWhatIsWrong) {
  ThreadPool pool(1);
  const auto message = [&](const Moments& moments, double damping) {
    return FeedbackFactor::Make(moments, {.damping = damping}, pool).status().ToString();
  };
  EXPECT_THAT(message(MakeMoments(96, false), 0.1),
              HasSubstr("96 inputs, must have a multiple of 64"));
  EXPECT_THAT(message(MakeMoments(64, false), 0), HasSubstr("damping is 0"));
  Moments moments = MakeMoments(64, false);
  moments.hessian[0] = moments.hessian[65] = 1;
  moments.hessian[1] = moments.hessian[64] = 2;  // no sum of squares: 1 1 < 2 2
  EXPECT_THAT(message(moments, 0.01), HasSubstr("not positive definite"));
}

}  // namespace
}  // namespace wintserve::quantizer
