#include "tools/quantizer/calibrate/error_feedback.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>

#include "Eigen/Cholesky"
#include "kernels/formats/bf16.h"
#include "kernels/formats/wint2.h"
#include "tools/quantizer/calibrate/calibration_test_util.h"

namespace wintserve::quantizer {
namespace {

using formats::HostMatrix;
using formats::KOrder;
using formats::WeightFormat;
using kernels::cpu::ThreadPool;
using testing::HasSubstr;

struct Encoding {
  const char* name;
  WeightFormat format = WeightFormat::kWint2;
  KOrder k_order = KOrder::kMma64;
  bool important_first = false;
};

FeedbackResult Encode(const Encoding& encoding, const FloatArray& target, const Moments& moments,
                      FeedbackOptions options = {}, int num_threads = 2) {
  ThreadPool pool(num_threads);
  options.k_order = encoding.k_order;
  options.important_first = encoding.important_first;
  auto result =
      encoding.format == WeightFormat::kWint2
          ? EncodeWint2WithFeedback(View(target), moments, options, pool)
          : EncodePerChannelWithFeedback(encoding.format, View(target), moments, options, pool);
  EXPECT_TRUE(result.ok()) << result.status();
  return *std::move(result);
}

HostMatrix EncodeNearest(const Encoding& encoding, const FloatArray& target) {
  ThreadPool pool(2);
  auto matrix = encoding.format == WeightFormat::kWint2
                    ? EncodeWint2(View(target), {}, {.k_order = encoding.k_order}, pool)
                    : EncodePerChannel(encoding.format, View(target), pool);
  EXPECT_TRUE(matrix.ok()) << matrix.status();
  return *std::move(matrix);
}

Eigen::MatrixXd Decode(const HostMatrix& matrix) {
  const std::vector<float> values = DecodeToFloat(matrix);
  return Eigen::Map<const FloatArray>(values.data(), matrix.k, matrix.n).cast<double>();
}

Eigen::MatrixXd DampedHessian(const Moments& moments, double damping) {
  Eigen::MatrixXd h =
      Eigen::Map<const FloatArray>(moments.hessian.data(), moments.k, moments.k).cast<double>();
  if (h.isZero(0))
    h.setIdentity();
  else
    h.diagonal().array() += damping * h.diagonal().mean();
  return h;
}

double Error(const FloatArray& target, const Eigen::MatrixXd& decoded, const Eigen::MatrixXd& h) {
  const Eigen::MatrixXd e = target.cast<double>() - decoded;
  return (e.transpose() * h * e).trace();
}

// What float32 may change in an error. The gradient is a float32 sum of at most
// k (2 + 2 num_sweeps) products for each weight, of weights or steps between codes, which are not
// larger than twice the weights.
double Rounding(const FloatArray& target, const Eigen::MatrixXd& h,
                const FeedbackOptions& options) {
  const Eigen::MatrixXd w = target.cast<double>().cwiseAbs();
  const double terms = static_cast<double>(target.rows()) * (2 + 2 * options.num_sweeps);
  return terms * std::ldexp(1.0, -24) * 4 * (w.transpose() * h.cwiseAbs() * w).trace();
}

class ErrorFeedback : public testing::TestWithParam<Encoding> {};

TEST_P(ErrorFeedback, ReportsTheErrorOfTheDecodedMatrix) {
  std::mt19937 rng(11);
  const FloatArray w = GaussianMatrix(256, 36, rng);  // part of a third strip
  const Moments moments = MomentsOf(CorrelatedInputs(600, 256, 1.0, rng));
  for (const int num_sweeps : {0, 1, 4}) {
    const FeedbackOptions options = {.num_sweeps = num_sweeps};
    const FeedbackResult result = Encode(GetParam(), w, moments, options);
    const Eigen::MatrixXd h = DampedHessian(moments, options.damping);
    ASSERT_EQ(result.errors.size(), num_sweeps + 1);
    const double rounding = Rounding(w, h, options);
    const double error = Error(w, Decode(result.matrix), h);
    EXPECT_NEAR(result.errors.back(), error, std::min(rounding, 0.01 * error));
    EXPECT_NEAR(result.zero_error, Error(w, Eigen::MatrixXd::Zero(256, 36), h), rounding);
  }
}

TEST_P(ErrorFeedback, SweepsNeverRaiseTheErrorAndTheFirstLowersIt) {
  std::mt19937 rng(12);
  const FloatArray w = GaussianMatrix(256, 40, rng);
  const Moments moments = MomentsOf(CorrelatedInputs(600, 256, 1.0, rng));
  for (const bool refit_scale : {false, true}) {
    const FeedbackOptions options = {.num_sweeps = 6, .least_gain = 0, .refit_scale = refit_scale};
    const std::vector<double> errors = Encode(GetParam(), w, moments, options).errors;
    EXPECT_LT(errors[1], errors[0]);
    for (size_t i = 1; i < errors.size(); ++i) {
      // A step counts only if it lowers the error by the gradient in float32.
      EXPECT_LE(errors[i], errors[i - 1] * (1 + 1e-5)) << "sweep " << i;
    }
  }
}

// With errors e of independent rows, each of the same size s as rounding to nearest makes, the
// output error is s^2 trace(H) without and s^2 sum of M_ii^2 with feedback (arXiv:2307.13304),
// where M is the triangular factor: for a block the trace of M_RR M_RR^T. The choice of scales by
// the output's error gains beyond that; what a column loses is that feedback makes its weights
// larger and so coarser, by less than the error's share of the weights: a fifth for four bits or
// less.
TEST_P(ErrorFeedback, GainsWhatTheFactorOfCorrelatedInputsPromises) {
  std::mt19937 rng(13);
  const FloatArray w = GaussianMatrix(256, 64, rng);
  const Moments moments = MomentsOf(CorrelatedInputs(1000, 256, 1.5, rng));
  ThreadPool pool(2);
  const FactorOptions factor_options = {.format = GetParam().format,
                                        .k_order = GetParam().k_order,
                                        .important_first = GetParam().important_first};
  const auto factor = FeedbackFactor::Make(moments, factor_options, pool);
  ASSERT_TRUE(factor.ok()) << factor.status();
  const int64_t block = GetParam().format == WeightFormat::kWint2 ? 4 : 1;
  double with_feedback = 0;
  double without = 0;
  for (int64_t row = 0; row < 256; ++row) {
    without += factor->hessian()[row * factor->hessian_stride() + row];
    for (int64_t i = row / block * block; i <= row; ++i) {
      with_feedback += std::pow(factor->factor()[row * 256 + i], 2);
    }
  }
  const double promised = with_feedback / without;
  ASSERT_LT(promised, 0.6);

  const Eigen::MatrixXd h = DampedHessian(moments, factor_options.damping);
  const double nearest = Error(w, Decode(EncodeNearest(GetParam(), w)), h);
  const FeedbackResult result = Encode(GetParam(), w, moments);
  EXPECT_LT(result.errors.front() / nearest, 1.2 * promised);
  EXPECT_LT(result.errors.back(), result.errors.front());
}

TEST_P(ErrorFeedback, IsNeverWorseThanNearestRoundingWithoutCalibrationRows) {
  std::mt19937 rng(14);
  const FloatArray w = GaussianMatrix(256, 40, rng);
  const FeedbackResult result = Encode(GetParam(), w, MakeMoments(256, false));
  const Eigen::MatrixXd h = Eigen::MatrixXd::Identity(256, 256);
  const double nearest = Error(w, Decode(EncodeNearest(GetParam(), w)), h);
  EXPECT_LE(Error(w, Decode(result.matrix), h), nearest);
  // Nor are uncorrelated inputs worse by more than one in fifty, where feedback has to find the
  // scales on its own.
  Moments moments = MakeMoments(256, false);
  for (int64_t row = 0; row < 256; ++row) moments.hessian[row * 257] = 2;
  EXPECT_LE(Error(w, Decode(Encode(GetParam(), w, moments).matrix), h), 1.02 * nearest);
}

TEST_P(ErrorFeedback, TakesSingularMomentsAndInputsThatAreAlwaysZero) {
  std::mt19937 rng(15);
  FloatArray x = CorrelatedInputs(10, 128, 1.0, rng);
  x.middleCols(40, 5).setZero();
  const FloatArray w = GaussianMatrix(128, 20, rng);
  const FeedbackResult result = Encode(GetParam(), w, MomentsOf(x));
  const Eigen::MatrixXd decoded = Decode(result.matrix);
  ASSERT_TRUE(decoded.allFinite());
  // Ten rows leave 118 directions free, in which outputs do not change.
  EXPECT_LT(result.errors.back(), 0.5 * Error(w, Decode(EncodeNearest(GetParam(), w)),
                                              DampedHessian(MomentsOf(x), 0.03)));
  // Weights of the zero inputs decode to something nearer to them than zeros: nothing else's error
  // shows in them.
  const double kept = (w.middleRows(40, 5).cast<double>() - decoded.middleRows(40, 5)).norm();
  EXPECT_LT(kept, w.middleRows(40, 5).cast<double>().norm());
}

TEST_P(ErrorFeedback, DecodesColumnsAndGroupsOfZerosToZeros) {
  std::mt19937 rng(16);
  FloatArray w = GaussianMatrix(128, 20, rng);
  w.col(3).setZero();
  const Moments moments = MomentsOf(CorrelatedInputs(300, 128, 1.0, rng));
  const FeedbackResult result = Encode(GetParam(), w, moments);
  EXPECT_TRUE(Decode(result.matrix).col(3).isZero(0));
  EXPECT_FALSE(Decode(result.matrix).col(4).isZero(0));
  const FeedbackResult zeros = Encode(GetParam(), FloatArray::Zero(128, 20), moments);
  EXPECT_TRUE(Decode(zeros.matrix).isZero(0));
  EXPECT_EQ(zeros.errors.back(), 0);
}

TEST_P(ErrorFeedback, DoesNotDependOnTheNumberOfThreads) {
  std::mt19937 rng(17);
  const FloatArray w = GaussianMatrix(128, 100, rng);
  const Moments moments = MomentsOf(CorrelatedInputs(300, 128, 1.0, rng));
  // So much gain that some columns are swept once and others more often.
  for (const double least_gain : {0.001, 0.05}) {
    const FeedbackOptions options = {.least_gain = least_gain};
    const FeedbackResult one = Encode(GetParam(), w, moments, options, 1);
    // Tiles of 64, 32 and 16 columns.
    for (const int num_threads : {3, 8}) {
      const FeedbackResult several = Encode(GetParam(), w, moments, options, num_threads);
      EXPECT_EQ(one.errors, several.errors);
      EXPECT_EQ(one.zero_error, several.zero_error);
      EXPECT_EQ(one.matrix.codes_u8, several.matrix.codes_u8);
      EXPECT_EQ(one.matrix.codes_i8, several.matrix.codes_i8);
      EXPECT_EQ(one.matrix.local_scale, several.matrix.local_scale);
      EXPECT_EQ(one.matrix.channel_scale, several.matrix.channel_scale);
      EXPECT_EQ(one.matrix.code_zp, several.matrix.code_zp);
    }
  }
}

TEST_P(ErrorFeedback, KeepsWithinTheFormat) {
  std::mt19937 rng(18);
  FloatArray w = GaussianMatrix(128, 24, rng);
  w.col(1) *= 1e30f;
  w.col(2) *= 1e-30f;
  w.row(77) *= 100;
  const HostMatrix matrix =
      Encode(GetParam(), w, MomentsOf(CorrelatedInputs(300, 128, 1.0, rng))).matrix;
  EXPECT_TRUE(Decode(matrix).allFinite());
  EXPECT_EQ(matrix.k_order, GetParam().k_order);
  const int largest_code = GetParam().format == WeightFormat::kWint4 ? 7 : 127;
  EXPECT_THAT(matrix.codes_i8,
              testing::Each(testing::AllOf(testing::Ge(-largest_code), testing::Le(largest_code))));
  EXPECT_THAT(matrix.local_scale, testing::Each(testing::Le(15)));
  for (const float scale : matrix.channel_scale) {
    EXPECT_EQ(scale, formats::RoundToBfloat16(scale));
    EXPECT_GT(scale, 0);
  }
}

INSTANTIATE_TEST_SUITE_P(
    All, ErrorFeedback,
    testing::Values(Encoding{.name = "Wint2"},
                    Encoding{.name = "Wint2ImportantFirst", .important_first = true},
                    Encoding{.name = "Wint2Natural", .k_order = KOrder::kNatural},
                    Encoding{.name = "Wint4", .format = WeightFormat::kWint4},
                    Encoding{.name = "Wint4ImportantFirst",
                             .format = WeightFormat::kWint4,
                             .important_first = true},
                    Encoding{.name = "Wint8", .format = WeightFormat::kWint8}),
    [](const auto& info) { return info.param.name; });

// The search takes S q for the decoded value, which is bf16(S q): a relative error of 2^-8 at most.
// So the byte it takes may be worse than the best one by what that changes in both their errors.
TEST(EncodeWint2WithFeedback, EndsWhereNoByteAloneCanLowerTheError) {
  constexpr int64_t kInputs = 128;
  std::mt19937 rng(21);
  const FloatArray w = GaussianMatrix(kInputs, 6, rng);
  const Moments moments = MomentsOf(CorrelatedInputs(300, kInputs, 1.0, rng));
  const FeedbackOptions options = {.num_sweeps = 60, .num_mixed_searches = 0, .least_gain = 0};
  const FeedbackResult result = Encode({.name = "Wint2"}, w, moments, options);
  // The last sweeps changed nothing, so it has come to its end.
  ASSERT_EQ(result.errors[59], result.errors[60]);

  const Eigen::MatrixXd h = DampedHessian(moments, options.damping);
  const Eigen::MatrixXd error = w.cast<double>() - Decode(result.matrix);
  const Eigen::MatrixXd gradient = h * error;
  int num_tried = 0;
  for (int64_t column = 0; column < 6; ++column) {
    for (int64_t byte_row = 0; byte_row < kInputs / 4; ++byte_row) {
      const int64_t group = byte_row / 16;
      const float scale = formats::RoundToBfloat16(result.matrix.local_scale[group * 6 + column] *
                                                   result.matrix.channel_scale[column]);
      std::vector<int64_t> rows;
      for (int slot = 0; slot < 4; ++slot) {
        rows.push_back(
            group * 64 +
            formats::Wint2TrueRow(static_cast<int>(byte_row % 16) * 4 + slot, KOrder::kMma64));
      }
      const Eigen::MatrixXd block = h(rows, rows);
      const Eigen::VectorXd old = error(rows, column);
      const Eigen::VectorXd slope = gradient(rows, column);
      for (int byte = 0; byte < 256; ++byte) {
        const int32_t code =
            formats::Wint2Code(static_cast<uint8_t>(byte), result.matrix.code_scale[column],
                               result.matrix.code_zp[column]);
        Eigen::VectorXd changed(4);
        double largest = 0;
        for (int slot = 0; slot < 4; ++slot) {
          const float value = formats::RoundToBfloat16(formats::Wint2Value(code, slot) * scale);
          changed(slot) = w(rows[slot], column) - value;
          largest = std::max(largest, std::abs(32.0 * scale));
        }
        const Eigen::VectorXd step = changed - old;
        const double change = step.dot(2 * slope + block * step);
        // 2 |A r| |A d| for each of the two, d the difference by rounding, plus the square of it.
        const double d = std::ldexp(largest, -9) * 2 * std::sqrt(block.norm());
        const Eigen::VectorXd ideal = block.ldlt().solve(slope);
        const double residual = std::sqrt(std::max(0.0, ideal.dot(block * ideal)));
        ASSERT_GE(change, -4 * d * (residual + d)) << "column " << column << " byte " << byte_row;
        ++num_tried;
      }
    }
  }
  EXPECT_EQ(num_tried, 6 * 32 * 256);
}

TEST(EncodeWint2WithFeedback, MixedSearchesLowerTheErrorFurther) {
  std::mt19937 rng(24);
  const FloatArray w = GaussianMatrix(256, 64, rng);
  const Moments moments = MomentsOf(CorrelatedInputs(600, 256, 1.0, rng));
  std::vector<double> errors;
  for (const int num_mixed_searches : {0, 1, 3}) {
    const FeedbackOptions options = {.num_mixed_searches = num_mixed_searches, .least_gain = 0};
    errors.push_back(Encode({.name = "Wint2"}, w, moments, options).errors.back());
  }
  EXPECT_LT(errors[1], errors[0]);
  EXPECT_LT(errors[2], errors[1]);
}

TEST(EncodeWint2WithFeedback, MoreMapsNeverRaiseTheErrorOfTheFeedback) {
  std::mt19937 rng(22);
  const FloatArray w = GaussianMatrix(128, 48, rng);
  const Moments moments = MomentsOf(CorrelatedInputs(300, 128, 1.0, rng));
  std::vector<double> errors;
  for (const size_t num_maps : {1, 2, 3, 4}) {
    const FeedbackOptions options = {.maps = DefaultCodeMaps().first(num_maps), .num_sweeps = 0};
    errors.push_back(Encode({.name = "Wint2"}, w, moments, options).errors[0]);
  }
  EXPECT_LT(errors[1], errors[0]);
  EXPECT_LT(errors[2], errors[1]);
  EXPECT_LT(errors[3], errors[2]);
}

TEST(EncodeWint2WithFeedback, NamesWhatIsWrong) {
  std::mt19937 rng(23);
  ThreadPool pool(1);
  const auto message = [&](int64_t k, int64_t moments_k, const FeedbackOptions& options) {
    return EncodeWint2WithFeedback(View(FloatArray::Ones(k, 8)), MakeMoments(moments_k, false),
                                   options, pool)
        .status()
        .ToString();
  };
  EXPECT_THAT(message(192, 192, {}), HasSubstr("192 inputs, must have a positive multiple of 128"));
  EXPECT_THAT(message(128, 256, {}), HasSubstr("of 256 inputs, the matrix has 128"));
  EXPECT_THAT(message(128, 128, {.maps = {}}), HasSubstr("no code map"));
  EXPECT_THAT(message(128, 128, {.num_sweeps = -1}), HasSubstr("num_sweeps is -1"));
  EXPECT_THAT(message(128, 128, {.least_gain = 1}), HasSubstr("least_gain is 1"));
  EXPECT_THAT(message(128, 128, {.local_scale_radius = 8}), HasSubstr("local_scale_radius is 8"));
  EXPECT_THAT(message(128, 128, {.num_mixed_searches = -1}), HasSubstr("num_mixed_searches is -1"));
  EXPECT_THAT(message(128, 128, {.damping = -1}), HasSubstr("damping is -1"));
  FloatArray w = FloatArray::Ones(128, 8);
  w(5, 2) = std::numeric_limits<float>::infinity();
  EXPECT_EQ(EncodeWint2WithFeedback(View(w), MakeMoments(128, false), {}, pool).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST(EncodePerChannelWithFeedback, NamesWhatIsWrong) {
  ThreadPool pool(1);
  const auto message = [&](WeightFormat format, int64_t n, const FeedbackOptions& options) {
    return EncodePerChannelWithFeedback(format, View(FloatArray::Ones(64, n)),
                                        MakeMoments(64, false), options, pool)
        .status()
        .ToString();
  };
  EXPECT_THAT(message(WeightFormat::kWint4, 6, {}),
              HasSubstr("6 outputs, must have a positive multiple of 4"));
  EXPECT_THAT(message(WeightFormat::kWint8, 3, {}),
              HasSubstr("3 outputs, must have a positive multiple of 2"));
  EXPECT_THAT(message(WeightFormat::kWint4, 8, {.smallest_scale_factor = 0}),
              HasSubstr("smallest_scale_factor is 0"));
}

}  // namespace
}  // namespace wintserve::quantizer
