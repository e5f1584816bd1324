// Linear layers on a GPU. References are float64 sums over the unrounded weights:
//   - with the activations as a binary16 has them: every output within the bound of the kernels'
//     float32 roundings, so that a single wrong weight of thousands shows;
//   - with the activations as they are: root mean square and largest error at most those of
//     FastDeploy's rounding scheme on the same inputs.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "fmt/format.h"
#include "kernels/cuda/matmul/matmul_cuda_test_util.h"
#include "kernels/plan/random_weights_test_util.h"

namespace wintserve::kernels::cuda {
namespace {

using formats::HostMatrix;
using formats::KOrder;
using formats::WeightFormat;
using plan::ProductKernel;

constexpr double kEpsilon = 0x1p-24;

// y of `rows` rows of x from `first` on, dense; checks that nothing beside them is written.
std::vector<float> RunLinear(const MatmulOptions& options, const TestMatrix& w,
                             const DeviceArray<float>& x, int64_t first, int64_t rows) {
  const int64_t n = w.host.n;
  const int64_t stride = n + 3;
  DeviceArray<float> y(rows * stride);
  y.Poison(TheStream());
  DeviceArray<uint8_t> workspace(LinearWorkspaceBytes(options, w.device.layout, rows));
  workspace.Poison(TheStream());
  LinearArgs args;
  args.x = {x.data() + first * w.host.k, w.host.k};
  args.num_rows = rows;
  args.w = &w.device;
  args.y = {y.data(), stride};
  LaunchLinear(options, args, workspace.data(), TheStream());
  const std::vector<float> strided = y.Download(TheStream());
  std::vector<float> dense(rows * n);
  for (int64_t r = 0; r < rows; ++r) {
    std::copy_n(&strided[r * stride], n, &dense[r * n]);
    for (int64_t c = n; c < stride; ++c) EXPECT_TRUE(std::isnan(strided[r * stride + c])) << r;
  }
  return dense;
}

struct Case {
  std::string name;
  WeightFormat format;
  KOrder k_order = KOrder::kMma64;
};

class LinearTest : public testing::TestWithParam<Case> {};

constexpr int64_t kMostRows = 1025;

void ExpectWithinRoundings(const std::vector<float>& y, const Reference& reference,
                           const HostMatrix& m) {
  const plan::Offsets offsets = plan::OffsetsOf(m.format);
  const double offset = std::max(offsets.b0, offsets.b1);
  const double groups = std::ceil(static_cast<double>(m.k) / 64);
  const double of_group = m.format == WeightFormat::kWint2 ? 1 : 1 + 4 * 4;
  for (size_t i = 0; i < y.size(); ++i) {
    // As in the emulation's test, but an addition inside an mma may truncate to 23 bits below the
    // largest of its terms where a float32 addition rounds: 4 units for an mma instead of one.
    const double biased = reference.magnitude[i] + offset * reference.unit_magnitude[i];
    const double bound =
        kEpsilon * (27 * biased + (groups * of_group + 16) * reference.magnitude[i]);
    ASSERT_LE(std::fabs(y[i] - reference.value[i]), bound)
        << "row " << i / m.n << " column " << i % m.n << " got " << y[i] << " want "
        << reference.value[i];
  }
}

TEST_P(LinearTest, IsMoreExactThanFastDeployAndTheSameInAnyBatch) {
  struct Shape {
    int64_t k;
    int64_t n;
  };
  const auto seed = std::random_device{}();
  std::mt19937 rng(seed);
  // K tails of 64, 128, 256 and 384 with odd widths; the demo model's matrices; slices of the 21B
  // and 300B models.
  for (const Shape& shape :
       {Shape{64, 33}, Shape{128, 17}, Shape{256, 1}, Shape{384, 1001}, Shape{384, 1024},
        Shape{512, 384}, Shape{384, 2048}, Shape{1024, 384}, Shape{1536, 2560}, Shape{2560, 768},
        Shape{768, 2560}, Shape{896, 1024}, Shape{3584, 512}, Shape{8192, 448}}) {
    SCOPED_TRACE(fmt::format("seed={} k={} n={}", seed, shape.k, shape.n));
    const TestMatrix w = MakeTestMatrix(
        plan::ExactlyPackedMatrix(GetParam().format, shape.k, shape.n, GetParam().k_order, &rng),
        false);
    const std::vector<float> host_x = RandomRows(kMostRows * shape.k, &rng);
    const DeviceArray<float> x(host_x);
    const std::vector<float> all = RunLinear(OptionsFor(), w, x, 0, kMostRows);

    ReferenceTokens tokens;
    tokens.num_tokens = kMostRows;
    const DeviceArray<double> weights(w.weights);
    const DeviceArray<float> units(w.units);
    const DeviceArray<double> seen(RoundToFloat16Rows(host_x, shape.k));
    ExpectWithinRoundings(all, ReferenceProduct(tokens, seen, weights, units, shape.k, shape.n),
                          w.host);
    const DeviceArray<double> exact(std::vector<double>(host_x.begin(), host_x.end()));
    const Reference reference = ReferenceProduct(tokens, exact, weights, units, shape.k, shape.n);
    const DeviceArray<float> rounded_x(RoundToBfloat16Rows(host_x));
    const DeviceArray<float> rounded_w(w.rounded);
    const Errors ours = ErrorsOf(all, reference.value);
    const Errors theirs =
        ErrorsOf(RoundedProduct(tokens, rounded_x, rounded_w, shape.k, shape.n), reference.value);
    EXPECT_LE(ours.root_mean_square, theirs.root_mean_square);
    EXPECT_LE(ours.largest, theirs.largest);

    for (const int64_t rows :
         {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 31, 64, 100, 300}) {
      const int64_t first = static_cast<int64_t>(rng() % (kMostRows - rows));
      const std::vector<float> part = RunLinear(OptionsFor(), w, x, first, rows);
      ASSERT_TRUE(std::equal(part.begin(), part.end(), all.begin() + first * shape.n))
          << rows << " rows from " << first << " differ from the same in a batch of " << kMostRows;
    }
    for (const NamedPlanner& planner : kForcedPlanners) {
      if (!planner.IsOfThisGpu()) continue;
      for (const int64_t rows : {5, 71, 200}) {
        const std::vector<float> part = RunLinear(OptionsFor(planner), w, x, 9, rows);
        ASSERT_TRUE(std::equal(part.begin(), part.end(), all.begin() + 9 * shape.n))
            << planner.name << ", " << rows << " rows";
      }
    }
    if (HasFatalFailure()) return;
  }
}

TEST_P(LinearTest, TakesMoreRowsThanAPass) {
  std::mt19937 rng(5);
  const TestMatrix w = MakeTestMatrix(
      plan::ExactlyPackedMatrix(GetParam().format, 128, 40, GetParam().k_order, &rng), false);
  constexpr int64_t kRows = 2 * plan::kMaxPassRows + 5;
  const DeviceArray<float> x(RandomRows(kRows * 128, &rng));
  const std::vector<float> all = RunLinear(OptionsFor(), w, x, 0, kRows);
  for (const int64_t first : {int64_t{0}, plan::kMaxPassRows - 3, kRows - 7}) {
    const std::vector<float> part = RunLinear(OptionsFor(), w, x, first, 7);
    EXPECT_TRUE(std::equal(part.begin(), part.end(), all.begin() + first * 40)) << first;
  }
}

INSTANTIATE_TEST_SUITE_P(
    Formats, LinearTest,
    testing::Values(Case{"Bfloat16", WeightFormat::kBfloat16}, Case{"Wint8", WeightFormat::kWint8},
                    Case{"Wint4", WeightFormat::kWint4},
                    Case{"Wint2Natural", WeightFormat::kWint2, KOrder::kNatural},
                    Case{"Wint2Mma64", WeightFormat::kWint2, KOrder::kMma64}),
    [](const auto& info) { return info.param.name; });

TEST(Stream, TwoTilesAWarpChangeNoBit) {
  std::mt19937 rng(6);
  // Beyond the k of the resident kernel, which takes the stream kernel's place below.
  for (const int64_t k : {2688, 3584, 8192}) {
    const TestMatrix w = MakeTestMatrix(
        plan::ExactlyPackedMatrix(WeightFormat::kWint2, k, 600, KOrder::kMma64, &rng), false);
    const DeviceArray<float> x(RandomRows(11 * k, &rng));
    const auto one =
        RunLinear(OptionsFor({"", ForcedPlan<ProductKernel::kStream, 1, 1, false>}), w, x, 0, 11);
    const auto two =
        RunLinear(OptionsFor({"", ForcedPlan<ProductKernel::kStream, 1, 2, false>}), w, x, 0, 11);
    EXPECT_TRUE(one == two) << k;
  }
}

// Small enough for compute-sanitizer.
TEST(Wgmma, AgreesBitForBitWithThePortableKernels) {
  if (!HasWgmma()) GTEST_SKIP() << "compute capability 9.0 only";
  std::mt19937 rng(8);
  for (const WeightFormat format : {WeightFormat::kWint2, WeightFormat::kWint4,
                                    WeightFormat::kWint8, WeightFormat::kBfloat16}) {
    // One slice and several, columns that end inside a block and a tile.
    for (const int64_t k : {128, 1536}) {
      for (const int64_t n : {24, 300}) {
        const TestMatrix w =
            MakeTestMatrix(plan::ExactlyPackedMatrix(format, k, n, KOrder::kMma64, &rng), false);
        const DeviceArray<float> x(RandomRows(200 * k, &rng));
        const std::vector<float> all =
            RunLinear(OptionsFor({"portable", plan::PlanProduct}), w, x, 0, 200);
        for (const NamedPlanner& planner : kForcedPlanners) {
          if (planner.wgmma_planner == nullptr) continue;
          for (const int64_t rows : {1, 9, 64, 65, 200}) {
            const std::vector<float> part = RunLinear(OptionsFor(planner), w, x, 200 - rows, rows);
            ASSERT_TRUE(std::equal(part.begin(), part.end(), all.end() - rows * n))
                << planner.name << ", format " << static_cast<int>(format) << ", k=" << k
                << " n=" << n << ", " << rows << " rows";
          }
        }
      }
    }
  }
}

// Blocks that run into each other's shared memory or read it too early would differ sometimes.
TEST(Wgmma, RepeatsItsBits) {
  if (!HasWgmma()) GTEST_SKIP() << "compute capability 9.0 only";
  std::mt19937 rng(10);
  struct Shape {
    int64_t k;
    int64_t n;
    int64_t rows;
  };
  for (const WeightFormat format : {WeightFormat::kWint2, WeightFormat::kWint4,
                                    WeightFormat::kWint8, WeightFormat::kBfloat16}) {
    for (const Shape& shape :
         {Shape{128, 17, 1025}, Shape{384, 1001, 257}, Shape{2560, 768, 300}}) {
      const TestMatrix w = MakeTestMatrix(
          plan::ExactlyPackedMatrix(format, shape.k, shape.n, KOrder::kMma64, &rng), false);
      const DeviceArray<float> x(RandomRows(shape.rows * shape.k, &rng));
      const std::vector<float> expected =
          RunLinear(OptionsFor({"portable", plan::PlanProduct}), w, x, 0, shape.rows);
      for (const NamedPlanner& planner : kForcedPlanners) {
        if (planner.wgmma_planner == nullptr) continue;
        for (int repeat = 0; repeat < 30; ++repeat) {
          const std::vector<float> got = RunLinear(OptionsFor(planner), w, x, 0, shape.rows);
          std::string wrong;
          int64_t num_wrong = 0;
          for (size_t i = 0; i < got.size(); ++i) {
            if (got[i] == expected[i]) continue;
            if (++num_wrong <= 5) {
              wrong +=
                  fmt::format(" [{}, {}] {} for {}", i / shape.n, i % shape.n, got[i], expected[i]);
            }
          }
          ASSERT_EQ(num_wrong, 0) << planner.name << ", format " << static_cast<int>(format)
                                  << ", k=" << shape.k << " n=" << shape.n << " rows=" << shape.rows
                                  << ", repeat " << repeat << ":" << wrong;
        }
      }
    }
  }
}

}  // namespace
}  // namespace wintserve::kernels::cuda
