// Linear layers, MLPs, the router and mixtures of experts.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>

#include "kernels/backend_suite/suite_test_util.h"

namespace wintserve::kernels {
namespace {

using formats::KOrder;
using formats::WeightFormat;

std::string FormatName(WeightFormat format) {
  switch (format) {
    case WeightFormat::kFloat32:
      return "Float32";
    case WeightFormat::kBfloat16:
      return "Bfloat16";
    case WeightFormat::kWint8:
      return "Wint8";
    case WeightFormat::kWint4:
      return "Wint4";
    case WeightFormat::kWint2:
      return "Wint2";
  }
  return "?";
}

HostRows Multiply(const TestMatrix& w, const HostRows& x) {
  const DeviceRows device_x(x);
  const DeviceRows y(x.rows, w.n());
  TheBackend().Linear(device_x.rows(), x.rows, w.packed(), y.rows());
  return y.ToHost();
}

// Mean of the squared differences from the float64 product, and FastDeploy's.
struct SquaredErrors {
  double actual = 0;
  double fast_deploy = 0;
};

void ExpectProduct(const TestMatrix& w, const HostRows& x, const HostRows& y,
                   SquaredErrors* squared) {
  for (int64_t r = 0; r < x.rows; ++r) {
    SCOPED_TRACE(r);
    const std::vector<Bounded> expected = w.Product(Exactly(x.row(r), w.k()));
    const std::vector<double> fast_deploy = w.FastDeployProduct(x.row(r));
    for (int64_t c = 0; c < w.n(); ++c) {
      ExpectWithin(expected[c], y.at(r, c));
      squared->actual += std::pow(y.at(r, c) - expected[c].value, 2);
      squared->fast_deploy += std::pow(fast_deploy[c] - expected[c].value, 2);
    }
  }
}

class LinearTest : public testing::TestWithParam<WeightFormat> {};

TEST_P(LinearTest, StaysWithinItsBoundAndBelowFastDeploysError) {
  std::mt19937 rng(std::random_device{}());
  struct Shape {
    int64_t k;
    int64_t n;
  };
  SquaredErrors squared;
  for (const Shape& shape : {Shape{64, 8}, {128, 48}, {192, 100}, {384, 64}, {1024, 16}}) {
    for (const KOrder order : {KOrder::kMma64, KOrder::kNatural}) {
      if (order == KOrder::kNatural && GetParam() != WeightFormat::kWint2) continue;
      const TestMatrix w(GetParam(), shape.k, shape.n, MatrixUse::kLinear, &rng, order);
      for (const int64_t rows : {1, 2, 5, 8, 9, 17, 40, 65}) {
        SCOPED_TRACE(testing::Message() << shape.k << " x " << shape.n << ", " << rows << " rows");
        const HostRows x = RandomRows(rows, shape.k, &rng);
        ExpectProduct(w, x, Multiply(w, x), &squared);
      }
    }
  }
  EXPECT_LE(squared.actual, squared.fast_deploy);
}

TEST_P(LinearTest, RowsOfVeryDifferentSizeDoNotDisturbEachOther) {
  std::mt19937 rng(std::random_device{}());
  const TestMatrix w(GetParam(), 128, 32, MatrixUse::kLinear, &rng);
  HostRows x = RandomRows(3, 128, &rng);
  for (int64_t c = 0; c < 128; ++c) {
    x.row(0)[c] *= 1e-12f;
    x.row(1)[c] *= 1e12f;
    x.row(2)[c] *= c == 5 ? 1e4f : 1.0f;
  }
  SquaredErrors squared;
  ExpectProduct(w, x, Multiply(w, x), &squared);
}

TEST_P(LinearTest, ARowHasTheSameBitsInAnyBatch) {
  std::mt19937 rng(std::random_device{}());
  const TestMatrix w(GetParam(), 384, 80, MatrixUse::kLinear, &rng);
  const HostRows x = RandomRows(300, 384, &rng);
  const HostRows all = Multiply(w, x);
  for (const auto& [first, rows] :
       {std::pair<int64_t, int64_t>{0, 1}, {77, 1}, {5, 3}, {40, 9}, {100, 40}, {20, 130}}) {
    HostRows part = {rows, 384, {x.row(first), x.row(first + rows)}};
    const HostRows y = Multiply(w, part);
    EXPECT_TRUE(std::equal(y.values.begin(), y.values.end(), all.row(first)))
        << first << " " << rows;
  }
}

INSTANTIATE_TEST_SUITE_P(Formats, LinearTest,
                         testing::Values(WeightFormat::kFloat32, WeightFormat::kBfloat16,
                                         WeightFormat::kWint8, WeightFormat::kWint4,
                                         WeightFormat::kWint2),
                         [](const auto& info) { return FormatName(info.param); });

class SwiGluMlpTest : public testing::TestWithParam<WeightFormat> {};

TEST_P(SwiGluMlpTest, StaysWithinThePropagatedBound) {
  std::mt19937 rng(std::random_device{}());
  struct Shape {
    int64_t hidden;
    int64_t width;
  };
  for (const Shape& shape : {Shape{128, 64}, {64, 64}, {192, 128}}) {
    const TestMlp mlp(GetParam(), shape.hidden, shape.width, &rng);
    for (const int64_t rows : {1, 9, 33}) {
      SCOPED_TRACE(testing::Message() << shape.hidden << ", " << shape.width << ", " << rows);
      const HostRows x = RandomRows(rows, shape.hidden, &rng);
      const DeviceRows device_x(x);
      const DeviceRows y(rows, shape.hidden);
      TheBackend().SwiGluMlp(device_x.rows(), rows, mlp.weights(), y.rows());
      const HostRows got = y.ToHost();
      for (int64_t r = 0; r < rows; ++r) {
        const std::vector<Bounded> expected = mlp.Output(x.row(r));
        for (int64_t c = 0; c < shape.hidden; ++c) ExpectWithin(expected[c], got.at(r, c));
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Formats, SwiGluMlpTest,
                         testing::Values(WeightFormat::kFloat32, WeightFormat::kBfloat16,
                                         WeightFormat::kWint8, WeightFormat::kWint4,
                                         WeightFormat::kWint2),
                         [](const auto& info) { return FormatName(info.param); });

// Experts and weights of rows.
struct Routing {
  std::vector<int32_t> ids;
  std::vector<float> weights;
};

Routing RouteRows(const HostRows& x, const formats::HostMatrix& router,
                  const std::vector<float>& bias, const RouterShape& shape,
                  const std::vector<int32_t>& route_as = {}) {
  const auto packed = Must(TheBackend().Pack(router, MatrixUse::kRouter));
  const DeviceRows device_x(x);
  const DeviceArray<float> device_bias(bias);
  const DeviceArray<int32_t> device_route_as(route_as);
  const DeviceArray<int32_t> ids(std::vector<int32_t>(x.rows * shape.top_k, -1));
  const DeviceArray<float> weights(std::vector<float>(x.rows * shape.top_k, std::nanf("")));
  TheBackend().Route(device_x.rows(), x.rows, *packed, bias.empty() ? nullptr : device_bias.data(),
                     shape, ids.data(), weights.data(),
                     route_as.empty() ? nullptr : device_route_as.data());
  return {ids.ToHost(), weights.ToHost()};
}

formats::HostMatrix RandomRouter(int64_t k, int64_t n, std::mt19937* rng) {
  formats::HostMatrix router = formats::MakeHostMatrix(WeightFormat::kFloat32, k, n);
  router.values_f32 = RandomRows(k, n, rng, 2.0f / std::sqrt(static_cast<float>(k))).values;
  return router;
}

TEST(Route, ChoosesTheBestByBiasedProbabilityAndWeighsByPlainProbability) {
  std::mt19937 rng(std::random_device{}());
  struct Shape {
    int64_t k;
    int experts;
    int top_k;
  };
  // The shapes of the demo model, the 21B and the 300B, and odd ones.
  for (const Shape& shape :
       {Shape{384, 16, 4}, {2560, 64, 6}, {8192, 64, 8}, {100, 5, 3}, {260, 200, 32}, {64, 1, 1}}) {
    const formats::HostMatrix router = RandomRouter(shape.k, shape.experts, &rng);
    const std::vector<float> bias = RandomRows(1, shape.experts, &rng, 0.01f).values;
    for (const int64_t rows : {1, 7, 33}) {
      SCOPED_TRACE(testing::Message() << shape.k << " x " << shape.experts << ", " << rows);
      const HostRows x = RandomRows(rows, shape.k, &rng);
      const Routing got = RouteRows(x, router, bias, {shape.experts, shape.top_k, 1e-12f});
      for (int64_t r = 0; r < rows; ++r) {
        std::vector<double> logits(shape.experts);
        double logit_error = 0;
        for (int e = 0; e < shape.experts; ++e) {
          double magnitudes = 0;
          for (int64_t i = 0; i < shape.k; ++i) {
            const double term = double{x.at(r, i)} * router.values_f32[i * shape.experts + e];
            logits[e] += term;
            magnitudes += std::fabs(term);
          }
          // True float32 on every backend, not the product's rounding.
          const double n = static_cast<double>(shape.k) + 2;
          logit_error = std::max(logit_error, n * 0x1p-24 / (1 - n * 0x1p-24) * magnitudes);
        }
        const double largest = *std::max_element(logits.begin(), logits.end());
        double sum = 0;
        for (const double logit : logits) sum += std::exp(logit - largest);
        std::vector<double> scores(shape.experts);
        for (int e = 0; e < shape.experts; ++e) {
          scores[e] = std::exp(logits[e] - largest) / sum + bias[e];
        }
        // Of a probability: twice the logits' error and some roundings; the bias adds one.
        const double relative = std::expm1(2 * logit_error) + (shape.experts + 8) * 0x1p-24;
        const double score_error = relative + 0x1p-24;

        const int32_t* ids = &got.ids[r * shape.top_k];
        const std::vector<int32_t> chosen(ids, ids + shape.top_k);
        double chosen_sum = 0;
        for (int i = 0; i < shape.top_k; ++i) {
          ASSERT_TRUE(chosen[i] >= 0 && chosen[i] < shape.experts);
          chosen_sum += scores[chosen[i]] - bias[chosen[i]];
          // Nothing that is not chosen before is better.
          for (int e = 0; e < shape.experts; ++e) {
            if (std::find(chosen.begin(), chosen.begin() + i, e) != chosen.begin() + i) {
              EXPECT_NE(chosen[i], e);
              continue;
            }
            EXPECT_GE(scores[chosen[i]], scores[e] - 2 * score_error);
          }
        }
        for (int i = 0; i < shape.top_k; ++i) {
          const double expected = (scores[chosen[i]] - bias[chosen[i]]) / chosen_sum;
          ExpectWithin({expected, expected * (2 * relative + (shape.top_k + 2) * 0x1p-24)},
                       got.weights[r * shape.top_k + i]);
        }
      }
    }
  }
}

struct RouterCase {
  std::string name;
  std::vector<float> logits;
  std::vector<float> bias;
  std::vector<int32_t> ids;
  std::vector<float> weights;
  float norm_min = 1e-12f;
};

class RouterRule : public testing::TestWithParam<RouterCase> {};

TEST_P(RouterRule, Holds) {
  const RouterCase& c = GetParam();
  const auto num_experts = static_cast<int>(c.logits.size());
  // x is (1, 0, …): the logits are the first row of the router.
  constexpr int64_t kRows = 64;
  formats::HostMatrix router = formats::MakeHostMatrix(WeightFormat::kFloat32, kRows, num_experts);
  std::copy(c.logits.begin(), c.logits.end(), router.values_f32.begin());
  HostRows x = {1, kRows, std::vector<float>(kRows)};
  x.values[0] = 1;
  const Routing got =
      RouteRows(x, router, c.bias, {num_experts, static_cast<int>(c.ids.size()), c.norm_min});
  EXPECT_EQ(got.ids, c.ids);
  for (size_t i = 0; i < c.weights.size(); ++i) EXPECT_NEAR(got.weights[i], c.weights[i], 1e-6f);
}

INSTANTIATE_TEST_SUITE_P(
    All, RouterRule,
    testing::Values(
        RouterCase{"BestFirst", {0, 1, 2, 3}, {}, {3, 2}, {0.7310586f, 0.2689414f}},
        RouterCase{
            "TiesGoToTheLowerIndex", {5, 5, 5, 5}, {}, {0, 1, 2}, {1 / 3.f, 1 / 3.f, 1 / 3.f}},
        RouterCase{"TiesBeyondAWarp", std::vector<float>(70, 1.0f), {}, {0, 1, 2, 3}, {}},
        RouterCase{"BiasDecidesButDoesNotWeigh", {0, 0, 0, 3}, {1, 0, 1, -1}, {0, 2}, {0.5f, 0.5f}},
        // At 40 the spacing is 3.8e-6: probabilities closer than that tie after the addition.
        RouterCase{"TheSumWithTheBiasIsRoundedToFloat32",
                   {0, 1e-7f, 2e-7f, 3e-7f},
                   {40, 40, 40, 40},
                   {0, 1},
                   {0.5f, 0.5f}},
        RouterCase{"SharpLogitsDoNotOverflow", {-1000, 1000}, {}, {1, 0}, {1, 0}},
        RouterCase{"DividesByNormMinAtLeast", {0, 0}, {}, {0}, {0.125f}, 4.0f}),
    [](const auto& info) { return info.param.name; });

TEST(Route, ARowHasTheSameBitsInAnyBatch) {
  std::mt19937 rng(std::random_device{}());
  const formats::HostMatrix router = RandomRouter(2560, 64, &rng);
  const std::vector<float> bias = RandomRows(1, 64, &rng, 0.01f).values;
  const RouterShape shape = {64, 6, 1e-12f};
  constexpr int64_t kRows = 5000;  // more than one pass
  const HostRows x = RandomRows(kRows, 2560, &rng);
  const Routing all = RouteRows(x, router, bias, shape);
  for (const auto& [first, rows] :
       {std::pair<int64_t, int64_t>{0, 1}, {4999, 1}, {42, 9}, {1000, 200}}) {
    const Routing part =
        RouteRows({rows, 2560, {x.row(first), x.row(first + rows)}}, router, bias, shape);
    EXPECT_TRUE(std::equal(part.ids.begin(), part.ids.end(), all.ids.begin() + first * 6));
    EXPECT_TRUE(
        std::equal(part.weights.begin(), part.weights.end(), all.weights.begin() + first * 6));
  }
}

TEST(Route, ARowTakesTheExpertsOfAnotherWhereItIsTold) {
  std::mt19937 rng(std::random_device{}());
  const formats::HostMatrix router = RandomRouter(384, 16, &rng);
  const std::vector<float> bias = RandomRows(1, 16, &rng, 0.01f).values;
  constexpr int kTopK = 4;
  const RouterShape shape = {16, kTopK, 1e-12f};
  const std::vector<int32_t> route_as = {0, 1, 2, 0, 0, 4};
  const HostRows x = RandomRows(std::ssize(route_as), 384, &rng);
  const Routing own = RouteRows(x, router, bias, shape);
  const Routing told = RouteRows(x, router, bias, shape, route_as);
  for (size_t r = 0; r < route_as.size(); ++r) {
    for (int i = 0; i < kTopK; ++i) {
      EXPECT_EQ(told.ids[r * kTopK + i], own.ids[route_as[r] * kTopK + i]) << "row " << r;
      EXPECT_EQ(told.weights[r * kTopK + i], own.weights[route_as[r] * kTopK + i]) << "row " << r;
    }
  }
}

struct MoeCase {
  WeightFormat format;
  bool shared;
};

class MoeMlpTest : public testing::TestWithParam<MoeCase> {
 protected:
  static constexpr int64_t kHidden = 128;
  static constexpr int64_t kWidth = 64;
  static constexpr int kExperts = 6;
  static constexpr int kTopK = 3;

  MoeMlpTest() : shared_(WeightFormat::kWint8, kHidden, 2 * kWidth, &rng_) {
    std::vector<MlpWeights> views;
    for (int e = 0; e < kExperts; ++e) {
      experts_.push_back(std::make_unique<TestMlp>(GetParam().format, kHidden, kWidth, &rng_));
      views.push_back(experts_.back()->weights());
    }
    group_ = Must(TheBackend().GroupExperts(views));
  }

  // Expert 5 gets no row.
  Routing RandomRouting(int64_t rows) {
    Routing routing;
    for (int64_t r = 0; r < rows; ++r) {
      std::vector<int32_t> order = {0, 1, 2, 3, 4};
      std::shuffle(order.begin(), order.end(), rng_);
      routing.ids.insert(routing.ids.end(), order.begin(), order.begin() + kTopK);
      for (int i = 0; i < kTopK; ++i) {
        routing.weights.push_back(std::uniform_real_distribution<float>(0, 1)(rng_));
      }
    }
    return routing;
  }

  // begins_shared: as a model does that routes in between.
  HostRows Run(const HostRows& x, const Routing& routing, bool begins_shared = false) {
    const DeviceRows device_x(x);
    const DeviceRows y(x.rows, kHidden);
    const DeviceArray<int32_t> ids(routing.ids);
    const DeviceArray<float> weights(routing.weights);
    const MlpWeights shared = shared_.weights();
    if (begins_shared && GetParam().shared) {
      TheBackend().BeginSharedExperts(device_x.rows(), x.rows, shared);
    }
    TheBackend().MoeMlp(device_x.rows(), x.rows, *group_, kTopK, ids.data(), weights.data(),
                        GetParam().shared ? &shared : nullptr, y.rows());
    return y.ToHost();
  }

  std::mt19937 rng_{std::random_device{}()};
  std::vector<std::unique_ptr<TestMlp>> experts_;
  TestMlp shared_;
  std::unique_ptr<ExpertGroup> group_;
};

TEST_P(MoeMlpTest, StaysWithinThePropagatedBound) {
  for (const int64_t rows : {1, 2, 11, 40}) {
    SCOPED_TRACE(rows);
    const HostRows x = RandomRows(rows, kHidden, &rng_);
    const Routing routing = RandomRouting(rows);
    const HostRows y = Run(x, routing);
    EXPECT_EQ(Run(x, routing, /*begins_shared=*/true).values, y.values);
    for (int64_t r = 0; r < rows; ++r) {
      std::vector<Bounded> expected(kHidden);
      std::vector<double> magnitudes(kHidden);
      const auto add = [&](const TestMlp& mlp, double weight) {
        const std::vector<Bounded> share = mlp.Output(x.row(r));
        for (int64_t c = 0; c < kHidden; ++c) {
          expected[c].value += weight * share[c].value;
          expected[c].error += weight * share[c].error;
          magnitudes[c] += weight * (std::fabs(share[c].value) + share[c].error);
        }
      };
      for (int i = 0; i < kTopK; ++i) {
        add(*experts_[routing.ids[r * kTopK + i]], routing.weights[r * kTopK + i]);
      }
      if (GetParam().shared) add(shared_, 1);
      for (int64_t c = 0; c < kHidden; ++c) {
        expected[c].error += Gamma(kTopK + 2) * magnitudes[c];
        ExpectWithin(expected[c], y.at(r, c));
      }
    }
  }
}

TEST_P(MoeMlpTest, ARowHasTheSameBitsInAnyBatch) {
  constexpr int64_t kRows = 600;
  const HostRows x = RandomRows(kRows, kHidden, &rng_);
  const Routing routing = RandomRouting(kRows);
  const HostRows all = Run(x, routing);
  for (const auto& [first, rows] :
       {std::pair<int64_t, int64_t>{0, 1}, {77, 1}, {5, 2}, {100, 17}, {300, 90}}) {
    const Routing part = {
        {routing.ids.begin() + first * kTopK, routing.ids.begin() + (first + rows) * kTopK},
        {routing.weights.begin() + first * kTopK,
         routing.weights.begin() + (first + rows) * kTopK}};
    const HostRows y = Run({rows, kHidden, {x.row(first), x.row(first + rows)}}, part);
    EXPECT_TRUE(std::equal(y.values.begin(), y.values.end(), all.row(first))) << first;
  }
}

INSTANTIATE_TEST_SUITE_P(All, MoeMlpTest,
                         testing::Values(MoeCase{WeightFormat::kWint2, false},
                                         MoeCase{WeightFormat::kWint2, true},
                                         MoeCase{WeightFormat::kWint4, false},
                                         MoeCase{WeightFormat::kWint8, true},
                                         MoeCase{WeightFormat::kBfloat16, true}),
                         [](const auto& info) {
                           return FormatName(info.param.format) +
                                  (info.param.shared ? "WithSharedExperts" : "RoutedOnly");
                         });

TEST(GroupExperts, ExpertsOfTwoShapesAreNamed) {
  std::mt19937 rng(std::random_device{}());
  const TestMlp small(WeightFormat::kWint4, 128, 64, &rng);
  const TestMlp large(WeightFormat::kWint4, 128, 128, &rng);
  const std::vector<MlpWeights> experts = {small.weights(), small.weights(), large.weights()};
  const auto group = TheBackend().GroupExperts(experts);
  EXPECT_EQ(group.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(group.status().message()), testing::HasSubstr("expert 2"));
}

}  // namespace
}  // namespace wintserve::kernels
