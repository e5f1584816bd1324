// The weight products on a GPU. References are float64 sums over the unrounded weights:
//   - with the activations as a binary16 has them: every output within the bound of the kernels'
//     float32 roundings, so that a single wrong weight of thousands shows;
//   - with the activations as they are: root mean square and largest error at most those of
//     FastDeploy's rounding scheme on the same inputs.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "fmt/format.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/matmul/device_array_test_util.h"
#include "kernels/cuda/matmul/matmul.h"
#include "kernels/cuda/matmul/reference_products_test_util.h"
#include "kernels/formats/bf16.h"
#include "kernels/plan/float16.h"
#include "kernels/plan/pack_weights.h"
#include "kernels/plan/random_weights_test_util.h"

namespace wintserve::kernels::cuda {
namespace {

using formats::HostMatrix;
using formats::KOrder;
using formats::WeightFormat;
using plan::ProductKernel;
using plan::ProductPlan;
using plan::ProductShape;

constexpr double kEpsilon = 0x1p-24;

struct Gpu {
  DeviceProperties properties;
  Stream stream;
};

// One device for all tests.
const Gpu& TheGpu() {
  static const Gpu* gpu = [] {
    auto properties = UseDevice(0);
    CHECK(properties.ok(), "{}", properties.status().ToString());
    InitMatmul();
    auto stream = CreateStream();
    CHECK(stream.ok(), "{}", stream.status().ToString());
    return new Gpu{*std::move(properties), *std::move(stream)};
  }();
  return *gpu;
}

cudaStream_t TheStream() { return TheGpu().stream.get(); }

using Planner = decltype(MatmulOptions::planner);

template <ProductKernel kKernel, int kTokenBlocks, int kTilesPerWarp, bool kSplit>
ProductPlan ForcedPlan(const ProductShape& shape, int num_multiprocessors) {
  ProductPlan plan;
  plan.kernel = kKernel;
  plan.token_blocks = kTokenBlocks;
  plan.tiles_per_warp = kTilesPerWarp;
  plan.split_slices = kSplit;
  return plan::FinishPlan(shape, num_multiprocessors, plan);
}

template <int kTokens, bool kSplit>
std::optional<plan::WgmmaPlan> ForcedWgmma(const ProductShape& shape, int num_multiprocessors) {
  plan::WgmmaPlan plan;
  plan.tokens = plan::HasWideWgmma(shape.format) ? kTokens : plan::kNarrowTokens;
  plan.split_slices = kSplit && shape.num_experts == 1;
  return plan::FinishWgmmaPlan(shape, num_multiprocessors, plan);
}

bool HasWgmma() { return TheGpu().properties.compute_capability() == 90; }

struct NamedPlanner {
  const char* name;
  Planner planner;
  plan::WgmmaPlanner wgmma_planner = nullptr;  // null: the portable kernels

  bool IsOfThisGpu() const { return wgmma_planner == nullptr || HasWgmma(); }
};
constexpr NamedPlanner kForcedPlanners[] = {
    {"stream", ForcedPlan<ProductKernel::kStream, 1, 1, false>},
    {"tile of 16", ForcedPlan<ProductKernel::kTile, 2, 2, false>},
    {"tile of 32", ForcedPlan<ProductKernel::kTile, 4, 2, false>},
    {"tile of 64", ForcedPlan<ProductKernel::kTile, 8, 2, false>},
    {"tile of 16, split", ForcedPlan<ProductKernel::kTile, 2, 2, true>},
    {"tile of 64, split", ForcedPlan<ProductKernel::kTile, 8, 2, true>},
    {"portable", plan::PlanProduct},
    {"wgmma of 64", plan::PlanProduct, ForcedWgmma<plan::kNarrowTokens, false>},
    {"wgmma of 64, split", plan::PlanProduct, ForcedWgmma<plan::kNarrowTokens, true>},
    {"wgmma of 128", plan::PlanProduct, ForcedWgmma<plan::kWideTokens, false>},
    {"wgmma of 128, split", plan::PlanProduct, ForcedWgmma<plan::kWideTokens, true>},
};

// What the backend uses on this GPU.
MatmulOptions OptionsFor() {
  const DeviceProperties& gpu = TheGpu().properties;
  return MatmulOptionsFor(gpu.num_multiprocessors, gpu.compute_capability());
}

MatmulOptions OptionsFor(const NamedPlanner& planner) {
  MatmulOptions options = OptionsFor();
  options.planner = planner.planner;
  options.wgmma_planner = planner.wgmma_planner;
  return options;
}

// A matrix on the device, and what its references need, [k, n].
struct TestMatrix {
  HostMatrix host;
  DeviceArray<uint8_t> bytes{0};
  DeviceWeights device;
  std::vector<double> weights;  // unrounded
  std::vector<float> units;     // size of a code step: local scale * channel scale
  std::vector<float> rounded;   // as FastDeploy rounds
};

TestMatrix MakeTestMatrix(HostMatrix host, bool gate_up) {
  TestMatrix matrix;
  const auto layout = plan::LayOutWeights(host, gate_up);
  CHECK(layout.ok(), "{}", layout.status().ToString());
  std::vector<uint8_t> bytes(layout->size_bytes());
  CHECK(plan::PackWeights(host, *layout, bytes.data()).num_bytes == 0);
  matrix.bytes = DeviceArray<uint8_t>(bytes);
  matrix.device = {*layout, matrix.bytes.data()};
  matrix.weights = plan::UnroundedWeights(host);
  matrix.rounded = formats::DecodeToFloat(host);
  matrix.units.resize(host.k * host.n);
  for (int64_t k = 0; k < host.k && !host.channel_scale.empty(); ++k) {
    for (int64_t c = 0; c < host.n; ++c) {
      const float local = host.format == WeightFormat::kWint2
                              ? static_cast<float>(host.local_scale[k / 64 * host.n + c])
                              : 1.0f;
      matrix.units[k * host.n + c] = local * host.channel_scale[c];
    }
  }
  matrix.host = std::move(host);
  return matrix;
}

std::vector<float> RandomRows(int64_t count, std::mt19937* rng) {
  std::normal_distribution<float> normal(0.2f, 1.0f);
  std::vector<float> values(count);
  for (float& value : values) value = normal(*rng);
  return values;
}

// Rows as the products see them: values of a binary16 under a power of two of the row.
std::vector<double> RoundToFloat16Rows(const std::vector<float>& x, int64_t k) {
  std::vector<double> rounded(x.size());
  for (size_t first = 0; first < x.size(); first += k) {
    float largest = 0;
    for (int64_t i = 0; i < k; ++i) largest = std::max(largest, std::fabs(x[first + i]));
    const int exponent = largest > 0 ? std::min(12 - std::ilogb(largest), 126) : 0;
    const float scale = std::ldexp(1.0f, exponent);
    const double inverse_scale = std::ldexp(1.0, -exponent);
    for (int64_t i = 0; i < k; ++i) {
      rounded[first + i] =
          inverse_scale * plan::Float16ToFloat(plan::FloatToFloat16(x[first + i] * scale));
    }
  }
  return rounded;
}

std::vector<float> RoundToBfloat16Rows(std::vector<float> x) {
  for (float& value : x) value = formats::RoundToBfloat16(value);
  return x;
}

struct Reference {
  std::vector<double> value;
  std::vector<double> magnitude;
  std::vector<double> unit_magnitude;
};

Reference ReferenceProduct(const ReferenceTokens& tokens, const DeviceArray<double>& x,
                           const DeviceArray<double>& w, const DeviceArray<float>& units, int64_t k,
                           int64_t n) {
  DeviceArray<double> y(tokens.num_tokens * n);
  DeviceArray<double> magnitudes(tokens.num_tokens * n);
  DeviceArray<double> unit_magnitudes(tokens.num_tokens * n);
  LaunchReferenceProduct(tokens, static_cast<int>(k), static_cast<int>(n), x.data(), w.data(),
                         units.data(), y.data(), magnitudes.data(), unit_magnitudes.data(),
                         TheStream());
  return {y.Download(TheStream()), magnitudes.Download(TheStream()),
          unit_magnitudes.Download(TheStream())};
}

std::vector<float> RoundedProduct(const ReferenceTokens& tokens, const DeviceArray<float>& x,
                                  const DeviceArray<float>& w, int64_t k, int64_t n) {
  DeviceArray<float> y(tokens.num_tokens * n);
  LaunchRoundedProduct(tokens, static_cast<int>(k), static_cast<int>(n), x.data(), w.data(),
                       y.data(), TheStream());
  return y.Download(TheStream());
}

struct Errors {
  double root_mean_square = 0;
  double largest = 0;
};

Errors ErrorsOf(const std::vector<float>& got, const std::vector<double>& expected) {
  Errors errors;
  for (size_t i = 0; i < got.size(); ++i) {
    const double error = std::fabs(got[i] - expected[i]);
    // A NaN fails every comparison and would not raise a maximum.
    errors.largest = std::isnan(error) ? INFINITY : std::max(errors.largest, error);
    errors.root_mean_square += error * error;
  }
  errors.root_mean_square = std::sqrt(errors.root_mean_square / static_cast<double>(got.size()));
  return errors;
}

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

// --- MLPs and mixtures of experts ---

struct TestMlp {
  TestMatrix gate_up;
  TestMatrix down;
  DeviceMlp device;
};

TestMlp MakeTestMlp(WeightFormat format, int64_t hidden, int64_t width, std::mt19937* rng) {
  TestMlp mlp;
  mlp.gate_up = MakeTestMatrix(
      plan::ExactlyPackedMatrix(format, hidden, 2 * width, KOrder::kMma64, rng), true);
  mlp.down =
      MakeTestMatrix(plan::ExactlyPackedMatrix(format, width, hidden, KOrder::kMma64, rng), false);
  mlp.device = {mlp.gate_up.device, mlp.down.device};
  return mlp;
}

template <typename T, typename Member>
DeviceArray<T> Concatenate(const std::vector<TestMlp>& mlps, TestMatrix TestMlp::*matrix,
                           Member TestMatrix::*values) {
  std::vector<T> all;
  for (const TestMlp& mlp : mlps) {
    const auto& own = (mlp.*matrix).*values;
    all.insert(all.end(), own.begin(), own.end());
  }
  return DeviceArray<T>(all);
}

// mlp(x) of every token by both references: float64, and FastDeploy's roundings with bfloat16
// between the steps.
struct MlpOutputs {
  std::vector<double> exact;
  std::vector<float> rounded;
};

MlpOutputs ReferenceMlp(const std::vector<TestMlp>& mlps, const ReferenceTokens& tokens,
                        const std::vector<float>& x) {
  const int64_t hidden = mlps.front().gate_up.host.k;
  const int64_t width = mlps.front().down.host.k;
  const auto up_w = Concatenate<double>(mlps, &TestMlp::gate_up, &TestMatrix::weights);
  const auto up_units = Concatenate<float>(mlps, &TestMlp::gate_up, &TestMatrix::units);
  const auto up_rounded = Concatenate<float>(mlps, &TestMlp::gate_up, &TestMatrix::rounded);
  const auto down_w = Concatenate<double>(mlps, &TestMlp::down, &TestMatrix::weights);
  const auto down_units = Concatenate<float>(mlps, &TestMlp::down, &TestMatrix::units);
  const auto down_rounded = Concatenate<float>(mlps, &TestMlp::down, &TestMatrix::rounded);
  const auto activate = [&](const auto& gate_up, auto* activations) {
    for (int64_t token = 0; token < tokens.num_tokens; ++token) {
      for (int64_t i = 0; i < width; ++i) {
        const auto gate = gate_up[token * 2 * width + i];
        (*activations)[token * width + i] =
            gate / (1 + std::exp(-gate)) * gate_up[token * 2 * width + width + i];
      }
    }
  };
  ReferenceTokens own = tokens;  // of the second product: a row a token
  own.source_row = nullptr;

  MlpOutputs outputs;
  const DeviceArray<double> exact_x(std::vector<double>(x.begin(), x.end()));
  std::vector<double> exact(tokens.num_tokens * width);
  activate(ReferenceProduct(tokens, exact_x, up_w, up_units, hidden, 2 * width).value, &exact);
  outputs.exact =
      ReferenceProduct(own, DeviceArray<double>(exact), down_w, down_units, width, hidden).value;

  const DeviceArray<float> rounded_x(RoundToBfloat16Rows(x));
  std::vector<float> rounded(tokens.num_tokens * width);
  activate(RoundedProduct(tokens, rounded_x, up_rounded, hidden, 2 * width), &rounded);
  outputs.rounded = RoundedProduct(own, DeviceArray<float>(RoundToBfloat16Rows(rounded)),
                                   down_rounded, width, hidden);
  return outputs;
}

TEST(SwiGluMlp, IsMoreExactThanFastDeployAndTheSameInAnyBatch) {
  struct Shape {
    WeightFormat format;
    int64_t hidden;
    int64_t width;
  };
  const auto seed = std::random_device{}();
  std::mt19937 rng(seed);
  for (const Shape& shape :
       {Shape{WeightFormat::kWint8, 384, 1024}, Shape{WeightFormat::kBfloat16, 384, 1024},
        Shape{WeightFormat::kBfloat16, 100, 36}, Shape{WeightFormat::kWint4, 256, 200},
        Shape{WeightFormat::kWint2, 2560, 384}, Shape{WeightFormat::kWint8, 2560, 768}}) {
    SCOPED_TRACE(fmt::format("seed={} format={} hidden={} width={}", seed,
                             static_cast<int>(shape.format), shape.hidden, shape.width));
    std::vector<TestMlp> mlps;
    mlps.push_back(MakeTestMlp(shape.format, shape.hidden, shape.width, &rng));
    constexpr int64_t kRows = 300;
    const std::vector<float> host_x = RandomRows(kRows * shape.hidden, &rng);
    const DeviceArray<float> x(host_x);
    const MatmulOptions options = OptionsFor();
    const auto run = [&](int64_t first, int64_t rows) {
      DeviceArray<float> y(rows * shape.hidden);
      y.Poison(TheStream());
      DeviceArray<uint8_t> workspace(SwiGluMlpWorkspaceBytes(options, mlps[0].device, rows));
      workspace.Poison(TheStream());
      SwiGluMlpArgs args;
      args.x = {x.data() + first * shape.hidden, shape.hidden};
      args.num_rows = rows;
      args.mlp = &mlps[0].device;
      args.y = {y.data(), shape.hidden};
      LaunchSwiGluMlp(options, args, workspace.data(), TheStream());
      return y.Download(TheStream());
    };
    const std::vector<float> all = run(0, kRows);
    ReferenceTokens tokens;
    tokens.num_tokens = kRows;
    const MlpOutputs reference = ReferenceMlp(mlps, tokens, host_x);
    const Errors ours = ErrorsOf(all, reference.exact);
    const Errors theirs = ErrorsOf(reference.rounded, reference.exact);
    EXPECT_LE(ours.root_mean_square, theirs.root_mean_square);
    EXPECT_LE(ours.largest, theirs.largest);
    for (const int64_t rows : {1, 2, 7, 8, 9, 16, 17, 33, 64, 100}) {
      const auto first = static_cast<int64_t>(rng() % (kRows - rows));
      const std::vector<float> part = run(first, rows);
      ASSERT_TRUE(std::equal(part.begin(), part.end(), all.begin() + first * shape.hidden))
          << rows << " rows from " << first;
    }
  }
}

struct MoeCase {
  std::string name;
  WeightFormat format;
  int num_experts;
  int top_k;
  int64_t hidden;
  int64_t width;
  bool shared;
};

class MoeTest : public testing::TestWithParam<MoeCase> {
 protected:
  static constexpr int64_t kMostRows = 300;

  MoeTest() : seed_(std::random_device{}()), rng_(seed_) {
    const MoeCase& c = GetParam();
    for (int e = 0; e < c.num_experts; ++e) {
      experts_.push_back(MakeTestMlp(c.format, c.hidden, c.width, &rng_));
    }
    for (const TestMlp& expert : experts_) devices_.push_back(&expert.device);
    if (c.shared)
      shared_.push_back(MakeTestMlp(WeightFormat::kWint8, c.hidden, 2 * c.width, &rng_));
    host_x_ = RandomRows(kMostRows * c.hidden, &rng_);
    // Skewed routing: experts of low index get many rows, the last one none.
    for (int64_t r = 0; r < kMostRows; ++r) {
      std::vector<int32_t> chosen;
      while (static_cast<int>(chosen.size()) < c.top_k) {
        const double u = std::uniform_real_distribution<double>(0, 1)(rng_);
        const auto e = static_cast<int32_t>(u * u * (c.num_experts - 1));
        if (std::find(chosen.begin(), chosen.end(), e) == chosen.end()) chosen.push_back(e);
      }
      ids_.insert(ids_.end(), chosen.begin(), chosen.end());
      for (int i = 0; i < c.top_k; ++i) {
        weights_.push_back(std::uniform_real_distribution<float>(0, 1)(rng_));
      }
    }
  }

  MoeMlpArgs ArgsFor(const DeviceArray<float>& x, const DeviceArray<int32_t>& ids,
                     const DeviceArray<float>& weights, int64_t first, int64_t rows,
                     DeviceArray<float>* y) const {
    const MoeCase& c = GetParam();
    MoeMlpArgs args;
    args.x = {x.data() + first * c.hidden, c.hidden};
    args.num_rows = rows;
    args.experts = devices_;
    args.top_k = c.top_k;
    args.expert_ids = ids.data() + first * c.top_k;
    args.expert_weights = weights.data() + first * c.top_k;
    args.shared = shared_.empty() ? nullptr : &shared_[0].device;
    args.y = {y->data(), c.hidden};
    return args;
  }

  int64_t WorkspaceBytes(const MatmulOptions& options, int64_t rows) const {
    return MoeMlpWorkspaceBytes(options, experts_[0].device, GetParam().num_experts,
                                GetParam().top_k, shared_.empty() ? nullptr : &shared_[0].device,
                                rows);
  }

  std::vector<float> Run(const MatmulOptions& options, int64_t first, int64_t rows) {
    const DeviceArray<float> x(host_x_);
    const DeviceArray<int32_t> ids(ids_);
    const DeviceArray<float> weights(weights_);
    DeviceArray<float> y(rows * GetParam().hidden);
    y.Poison(TheStream());
    DeviceArray<uint8_t> workspace(WorkspaceBytes(options, rows));
    workspace.Poison(TheStream());
    LaunchMoeMlp(options, ArgsFor(x, ids, weights, first, rows, &y), workspace.data(), TheStream());
    return y.Download(TheStream());
  }

  // Both references of all rows.
  MlpOutputs Reference() {
    const MoeCase& c = GetParam();
    const int64_t num_pairs = kMostRows * c.top_k;
    std::vector<int32_t> source(num_pairs);
    for (int64_t i = 0; i < num_pairs; ++i) source[i] = static_cast<int32_t>(i / c.top_k);
    const DeviceArray<int32_t> source_row(source);
    const DeviceArray<int32_t> expert_of(ids_);
    ReferenceTokens tokens = {static_cast<int>(num_pairs), source_row.data(), expert_of.data()};
    const MlpOutputs pairs = ReferenceMlp(experts_, tokens, host_x_);
    MlpOutputs shared;
    if (c.shared) {
      ReferenceTokens rows;
      rows.num_tokens = kMostRows;
      shared = ReferenceMlp(shared_, rows, host_x_);
    }
    MlpOutputs sums;
    for (int64_t r = 0; r < kMostRows; ++r) {
      for (int64_t column = 0; column < c.hidden; ++column) {
        double exact = c.shared ? shared.exact[r * c.hidden + column] : 0;
        float rounded = 0;
        for (int i = 0; i < c.top_k; ++i) {
          const int64_t pair = r * c.top_k + i;
          exact += double{weights_[pair]} * pairs.exact[pair * c.hidden + column];
          rounded += weights_[pair] * pairs.rounded[pair * c.hidden + column];
        }
        rounded = formats::RoundToBfloat16(rounded);
        if (c.shared) {
          rounded = formats::RoundToBfloat16(rounded + shared.rounded[r * c.hidden + column]);
        }
        sums.exact.push_back(exact);
        sums.rounded.push_back(rounded);
      }
    }
    return sums;
  }

  const uint32_t seed_;
  std::mt19937 rng_;
  std::vector<TestMlp> experts_;
  std::vector<const DeviceMlp*> devices_;
  std::vector<TestMlp> shared_;
  std::vector<float> host_x_;
  std::vector<int32_t> ids_;
  std::vector<float> weights_;
};

TEST_P(MoeTest, IsMoreExactThanFastDeployAndTheSameInAnyBatch) {
  SCOPED_TRACE(fmt::format("seed={}", seed_));
  const int64_t hidden = GetParam().hidden;
  const std::vector<float> all = Run(OptionsFor(), 0, kMostRows);
  const MlpOutputs reference = Reference();
  const Errors ours = ErrorsOf(all, reference.exact);
  const Errors theirs = ErrorsOf(reference.rounded, reference.exact);
  EXPECT_LE(ours.root_mean_square, theirs.root_mean_square);
  EXPECT_LE(ours.largest, theirs.largest);
  for (const int64_t rows : {1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 31, 64, 100}) {
    const auto first = static_cast<int64_t>(rng_() % (kMostRows - rows));
    const std::vector<float> part = Run(OptionsFor(), first, rows);
    ASSERT_TRUE(std::equal(part.begin(), part.end(), all.begin() + first * hidden))
        << rows << " rows from " << first;
  }
  for (const NamedPlanner& planner : kForcedPlanners) {
    if (!planner.IsOfThisGpu()) continue;
    EXPECT_TRUE(Run(OptionsFor(planner), 0, kMostRows) == all) << planner.name;
  }
}

TEST_P(MoeTest, ACapturedLaunchFollowsTheRoutingThatItFindsOnTheDevice) {
  SCOPED_TRACE(fmt::format("seed={}", seed_));
  constexpr int64_t kRows = 20;
  const MoeCase& c = GetParam();
  const MatmulOptions options = OptionsFor();
  DeviceArray<float> x(host_x_);
  DeviceArray<int32_t> ids(ids_);
  DeviceArray<float> weights(weights_);
  DeviceArray<float> y(kRows * c.hidden);
  DeviceArray<uint8_t> workspace(WorkspaceBytes(options, kRows));
  const MoeMlpArgs args = ArgsFor(x, ids, weights, 0, kRows, &y);
  cudaGraph_t graph = nullptr;
  CUDA_CALL(cudaStreamBeginCapture, TheStream(), cudaStreamCaptureModeThreadLocal);
  LaunchMoeMlp(options, args, workspace.data(), TheStream());
  CUDA_CALL(cudaStreamEndCapture, TheStream(), &graph);
  cudaGraphExec_t executable = nullptr;
  CUDA_CALL(cudaGraphInstantiate, &executable, graph, 0ull);
  for (const int64_t first : {0, 40, 200}) {
    // The rows, and with them the routing, change under the graph.
    CUDA_CALL(cudaMemcpyAsync, x.data(), host_x_.data() + first * c.hidden,
              kRows * c.hidden * sizeof(float), cudaMemcpyDefault, TheStream());
    CUDA_CALL(cudaMemcpyAsync, ids.data(), ids_.data() + first * c.top_k,
              kRows * c.top_k * sizeof(int32_t), cudaMemcpyDefault, TheStream());
    CUDA_CALL(cudaMemcpyAsync, weights.data(), weights_.data() + first * c.top_k,
              kRows * c.top_k * sizeof(float), cudaMemcpyDefault, TheStream());
    workspace.Poison(TheStream());
    y.Poison(TheStream());
    CUDA_CALL(cudaGraphLaunch, executable, TheStream());
    EXPECT_TRUE(y.Download(TheStream()) == Run(OptionsFor(), first, kRows)) << first;
  }
  CUDA_CALL(cudaGraphExecDestroy, executable);
  CUDA_CALL(cudaGraphDestroy, graph);
}

INSTANTIATE_TEST_SUITE_P(
    Models, MoeTest,
    testing::Values(MoeCase{"DemoWint2", WeightFormat::kWint2, 16, 4, 384, 256, false},
                    MoeCase{"DemoWint4", WeightFormat::kWint4, 16, 4, 384, 256, false},
                    MoeCase{"DemoBfloat16", WeightFormat::kBfloat16, 16, 4, 384, 256, false},
                    MoeCase{"DemoOnFourRanks", WeightFormat::kWint2, 16, 4, 384, 64, false},
                    MoeCase{"ManyExpertsWithShared", WeightFormat::kWint2, 64, 8, 512, 192, true},
                    MoeCase{"A21BSliceWithShared", WeightFormat::kWint2, 8, 6, 2560, 384, true},
                    MoeCase{"A300BSlice", WeightFormat::kWint2, 9, 8, 8192, 64, false}),
    [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace wintserve::kernels::cuda
