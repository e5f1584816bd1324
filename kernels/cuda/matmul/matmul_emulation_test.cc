// The kernels of matmul.cu on the emulated device, without a GPU: every index, fragment, barrier
// and copy. Reference: float64 sums over the unrounded weights and the activations as a binary16
// has them, with the float32 roundings of the kernels bounded term by term.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "fmt/format.h"
#include "kernels/cuda/matmul/device_weights.h"
#include "kernels/cuda/matmul/emulated_launcher_test_util.h"
#include "kernels/cuda/matmul/matmul_sequence.h"
#include "kernels/cuda/matmul/product_input_test_util.h"
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

// --- Products ---

// Plans with few or many blocks, so that a block has several items or one.
ProductPlan Planned(const ProductShape& shape, int multiprocessors, ProductKernel kernel,
                    int token_blocks, int tiles_per_warp, bool split) {
  ProductPlan plan;
  plan.kernel = kernel;
  plan.token_blocks = token_blocks;
  plan.tiles_per_warp = tiles_per_warp;
  plan.split_slices = split;
  return plan::FinishPlan(shape, multiprocessors, plan);
}

template <int kTokens, bool kSplit>
std::optional<plan::WgmmaPlan> WgmmaPlanned(const ProductShape& shape, int multiprocessors) {
  plan::WgmmaPlan plan;
  const bool exists = kTokens < plan::kNarrowTokens ? plan::HasSmallWgmma(shape.format)
                                                    : plan::HasWideWgmma(shape.format);
  plan.tokens = exists ? kTokens : plan::kNarrowTokens;
  plan.split_slices = kSplit && shape.num_experts == 1;
  return plan::FinishWgmmaPlan(shape, multiprocessors, plan);
}

// Where there is no cached kernel: what is chosen.
template <int kStageChunks>
ProductPlan CachedPlanned(const ProductShape& shape, int multiprocessors) {
  if (shape.format != WeightFormat::kWint2) return plan::PlanProduct(shape, multiprocessors);
  return plan::CachedPlan(shape, multiprocessors, kStageChunks);
}

struct NamedPlanner {
  const char* name;
  Planner planner;
  plan::WgmmaPlanner wgmma_planner = nullptr;
};
const NamedPlanner kPlanners[] = {
    {"stream1", [](const ProductShape& s,
                   int m) { return Planned(s, m, ProductKernel::kStream, 1, 1, false); }},
    {"stream2", [](const ProductShape& s,
                   int m) { return Planned(s, m, ProductKernel::kStream, 1, 2, false); }},
    {"cached1", CachedPlanned<1>},
    {"cached2", CachedPlanned<2>},
    {"tile2",
     [](const ProductShape& s, int m) { return Planned(s, m, ProductKernel::kTile, 2, 2, false); }},
    {"tile4",
     [](const ProductShape& s, int m) { return Planned(s, m, ProductKernel::kTile, 4, 2, false); }},
    {"tile8",
     [](const ProductShape& s, int m) { return Planned(s, m, ProductKernel::kTile, 8, 2, false); }},
    {"tile2split",
     [](const ProductShape& s, int m) { return Planned(s, m, ProductKernel::kTile, 2, 2, true); }},
    {"tile8split",
     [](const ProductShape& s, int m) { return Planned(s, m, ProductKernel::kTile, 8, 2, true); }},
    {"chosen", plan::PlanProduct},
    {"wgmma32", plan::PlanProduct, WgmmaPlanned<plan::kSmallTokens, false>},
    {"wgmma64", plan::PlanProduct, WgmmaPlanned<plan::kNarrowTokens, false>},
    {"wgmma128", plan::PlanProduct, WgmmaPlanned<plan::kWideTokens, false>},
    {"wgmma128split", plan::PlanProduct, WgmmaPlanned<plan::kWideTokens, true>},
};

struct PackedMatrix {
  HostMatrix host;
  std::vector<uint8_t> bytes;
  DeviceWeights device;
};

PackedMatrix Pack(HostMatrix matrix, bool gate_up) {
  PackedMatrix packed;
  const auto layout = plan::LayOutWeights(matrix, gate_up);
  EXPECT_TRUE(layout.ok()) << layout.status();
  packed.bytes.resize(layout->size_bytes());
  EXPECT_EQ(plan::PackWeights(matrix, *layout, packed.bytes.data()).num_bytes, 0);
  packed.host = std::move(matrix);
  packed.device = {*layout, packed.bytes.data()};
  return packed;
}

struct Bounded {
  double value = 0;
  double error = 0;
};

// One output and how far the kernels' float32 sums may be from it. Inside a group of 64 the terms
// carry the format's offsets. Their correction is a sum with 7 roundings and keeps 22 bits (4
// more); each of 4 mma rounds once here. Then a rounding for each group, slice and scale.
Bounded Dot(const std::vector<double>& row, const HostMatrix& m, const std::vector<double>& weights,
            int64_t column) {
  const plan::Offsets offsets = plan::OffsetsOf(m.format);
  const double offset = std::max(offsets.b0, offsets.b1);
  Bounded sum;
  double magnitudes = 0;
  double biased = 0;
  for (int64_t k = 0; k < m.k; ++k) {
    const double weight = weights[k * m.n + column];
    double unit = 0;  // of a code
    if (m.format == WeightFormat::kWint2) {
      unit = m.channel_scale[column] * m.local_scale[k / 64 * m.n + column];
    } else if (!m.channel_scale.empty()) {
      unit = m.channel_scale[column];
    }
    sum.value += row[k] * weight;
    magnitudes += std::fabs(row[k] * weight);
    biased += std::fabs(row[k]) * (std::fabs(weight) + offset * unit);
  }
  const double groups = std::ceil(static_cast<double>(m.k) / 64);
  const double of_group = m.format == WeightFormat::kWint2 ? 1 : 5;
  sum.error = kEpsilon * (16 * biased + (groups * of_group + 16) * magnitudes);
  return sum;
}

struct Case {
  std::string name;
  WeightFormat format;
  KOrder k_order = KOrder::kMma64;
};

class ProductTest : public testing::TestWithParam<Case> {
 protected:
  ProductTest() : seed_(std::random_device{}()), rng_(seed_) {}

  PackedMatrix RandomMatrix(int64_t k, int64_t n, bool gate_up) {
    return Pack(plan::ExactlyPackedMatrix(GetParam().format, k, n, GetParam().k_order, &rng_),
                gate_up);
  }

  // y [rows, n + gap] with NaNs where nothing may be written.
  std::vector<float> RunLinear(const PackedMatrix& w, const float* x, int64_t rows,
                               const NamedPlanner& planner, int multiprocessors) {
    const int64_t n = w.host.n;
    const int64_t stride = n + 3;
    std::vector<float> y(rows * stride, std::nanf(""));
    EmulatedLauncher launcher(static_cast<uint32_t>(rng_()), rng_() % 2 == 0 ? 64 : 0);
    MatmulSequence sequence(planner.planner, multiprocessors, &launcher, planner.wgmma_planner);
    const ConstRows x_rows = {x, w.host.k};
    const int64_t bytes = sequence.Linear(x_rows, rows, w.device, {y.data(), stride}, nullptr);
    // 0xFF bytes: NaNs, and indices that lead out of every buffer.
    std::vector<uint8_t> workspace(bytes, 0xFF);
    EXPECT_EQ(sequence.Linear(x_rows, rows, w.device, {y.data(), stride}, workspace.data()), bytes);
    std::vector<float> dense;
    for (int64_t r = 0; r < rows; ++r) {
      const float* row = y.data() + r * stride;
      dense.insert(dense.end(), row, row + n);
      for (int64_t c = n; c < stride; ++c) EXPECT_TRUE(std::isnan(row[c])) << r << " " << c;
    }
    return dense;
  }

  const uint32_t seed_;
  std::mt19937 rng_;
};

TEST_P(ProductTest, EveryPlanStaysWithinTheBoundOfItsRoundings) {
  struct Shape {
    int64_t k;
    int64_t n;
    int64_t rows;
    int multiprocessors;
  };
  // K tails of 64 to 384 and two or four slices, of equal and unequal length; odd widths; partly
  // filled token tiles; blocks with one item and with several, of tokens and of columns. The last
  // is too long for the resident kernel.
  for (const Shape& shape : {Shape{64, 33, 3, 1}, Shape{128, 16, 8, 100}, Shape{256, 1, 17, 1},
                             Shape{384, 300, 20, 1}, Shape{1024, 40, 9, 1}, Shape{1792, 72, 17, 1},
                             Shape{2048, 20, 70, 1}, Shape{2688, 20, 9, 1}}) {
    const PackedMatrix w = RandomMatrix(shape.k, shape.n, false);
    const std::vector<double> weights = plan::UnroundedWeights(w.host);
    const std::vector<float> x = RandomRows(shape.rows * shape.k, &rng_);
    std::vector<Bounded> expected;
    for (int64_t r = 0; r < shape.rows; ++r) {
      const std::vector<double> row = RoundRow(&x[r * shape.k], shape.k);
      for (int64_t c = 0; c < shape.n; ++c) expected.push_back(Dot(row, w.host, weights, c));
    }
    for (const NamedPlanner& planner : kPlanners) {
      // Streaming 70 rows, 8 at a time, is slow to emulate and shows nothing new.
      if (shape.rows > 32 && planner.name[0] == 's') continue;
      SCOPED_TRACE(fmt::format("seed={} k={} n={} rows={} {}", seed_, shape.k, shape.n, shape.rows,
                               planner.name));
      const auto y = RunLinear(w, x.data(), shape.rows, planner, shape.multiprocessors);
      for (size_t i = 0; i < y.size(); ++i) {
        ASSERT_LE(std::fabs(y[i] - expected[i].value), expected[i].error)
            << "row " << i / shape.n << " column " << i % shape.n << " got " << y[i] << " want "
            << expected[i].value;
      }
    }
  }
}

TEST_P(ProductTest, ARowHasTheSameBitsInAnyBatchAndUnderEveryPlan) {
  constexpr int64_t kK = 1088;  // slices of unequal length
  constexpr int64_t kN = 24;
  constexpr int64_t kRows = 19;
  const PackedMatrix w = RandomMatrix(kK, kN, false);
  const std::vector<float> x = RandomRows(kRows * kK, &rng_);
  const auto expected = RunLinear(w, x.data(), kRows, kPlanners[0], 1);
  for (const NamedPlanner& planner : kPlanners) {
    SCOPED_TRACE(fmt::format("seed={} {}", seed_, planner.name));
    for (const auto& [first, rows] :
         {std::pair<int64_t, int64_t>{0, 1}, {3, 1}, {5, 8}, {2, 17}, {0, kRows}}) {
      const auto part = RunLinear(w, &x[first * kK], rows, planner, 2);
      ASSERT_TRUE(std::equal(part.begin(), part.end(), expected.begin() + first * kN))
          << first << " " << rows;
    }
  }
}

double Silu(double gate) { return gate / (1 + std::exp(-gate)); }

struct Mlp {
  PackedMatrix gate_up;
  PackedMatrix down;
  std::vector<double> gate_up_weights;
  std::vector<double> down_weights;
  DeviceMlp device;
};

Mlp MakeMlp(PackedMatrix gate_up, PackedMatrix down) {
  Mlp mlp;
  mlp.gate_up_weights = plan::UnroundedWeights(gate_up.host);
  mlp.down_weights = plan::UnroundedWeights(down.host);
  mlp.gate_up = std::move(gate_up);
  mlp.down = std::move(down);
  mlp.device = {{mlp.gate_up.device.layout, mlp.gate_up.bytes.data()},
                {mlp.down.device.layout, mlp.down.bytes.data()}};
  return mlp;
}

// Adds weight * mlp(x) to y, and to `error` 2^-10 of the magnitudes: x and the activations are
// rounded to 11 bits each, and silu(gate) * up passes on at most a few times x's part.
void AddMlp(const Mlp& mlp, const float* x, double weight, std::vector<double>* y,
            std::vector<double>* error) {
  const HostMatrix& up = mlp.gate_up.host;
  const int64_t width = up.n / 2;
  const std::vector<double> row = RoundRow(x, up.k);
  std::vector<float> activation(width);
  for (int64_t i = 0; i < width; ++i) {
    activation[i] = static_cast<float>(Silu(Dot(row, up, mlp.gate_up_weights, i).value) *
                                       Dot(row, up, mlp.gate_up_weights, width + i).value);
  }
  for (int64_t c = 0; c < mlp.down.host.n; ++c) {
    for (int64_t k = 0; k < width; ++k) {
      const double term = activation[k] * mlp.down_weights[k * mlp.down.host.n + c];
      (*y)[c] += weight * term;
      (*error)[c] += 0x1p-10 * std::fabs(weight * term);
    }
  }
}

TEST_P(ProductTest, AnMlpAppliesSwiGluToTheMatchingColumns) {
  constexpr int64_t kHidden = 128;
  constexpr int64_t kWidth = 72;
  constexpr int64_t kRows = 10;
  const int64_t width = GetParam().format == WeightFormat::kWint2 ? 64 : kWidth;
  const Mlp mlp =
      MakeMlp(RandomMatrix(kHidden, 2 * width, true), RandomMatrix(width, kHidden - 1, false));
  const std::vector<float> x = RandomRows(kRows * kHidden, &rng_);
  std::vector<std::vector<double>> expected(kRows, std::vector<double>(kHidden - 1));
  std::vector<std::vector<double>> error = expected;
  for (int64_t r = 0; r < kRows; ++r) AddMlp(mlp, &x[r * kHidden], 1, &expected[r], &error[r]);
  for (const NamedPlanner& planner : kPlanners) {
    SCOPED_TRACE(fmt::format("seed={} {}", seed_, planner.name));
    std::vector<float> y(kRows * (kHidden - 1), std::nanf(""));
    EmulatedLauncher launcher(seed_, 64);
    MatmulSequence sequence(planner.planner, 2, &launcher, planner.wgmma_planner);
    const Rows y_rows = {y.data(), kHidden - 1};
    const int64_t bytes =
        sequence.SwiGluMlp({x.data(), kHidden}, kRows, mlp.device, y_rows, nullptr);
    std::vector<uint8_t> workspace(bytes, 0xFF);
    sequence.SwiGluMlp({x.data(), kHidden}, kRows, mlp.device, y_rows, workspace.data());
    for (int64_t r = 0; r < kRows; ++r) {
      for (int64_t c = 0; c < kHidden - 1; ++c) {
        ASSERT_LE(std::fabs(y[r * (kHidden - 1) + c] - expected[r][c]), error[r][c])
            << r << " " << c;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Formats, ProductTest,
    testing::Values(Case{"Bfloat16", WeightFormat::kBfloat16}, Case{"Wint8", WeightFormat::kWint8},
                    Case{"Wint4", WeightFormat::kWint4},
                    Case{"Wint2Natural", WeightFormat::kWint2, KOrder::kNatural},
                    Case{"Wint2Mma64", WeightFormat::kWint2, KOrder::kMma64}),
    [](const auto& info) { return info.param.name; });

// --- Mixtures of experts ---

class MoeTest : public testing::TestWithParam<bool> {
 protected:
  static constexpr int64_t kHidden = 128;
  static constexpr int64_t kWidth = 64;
  static constexpr int kExperts = 40;  // more than a warp
  static constexpr int kTopK = 3;

  MoeTest() : seed_(std::random_device{}()), rng_(seed_) {
    for (int e = 0; e < kExperts; ++e) experts_.push_back(RandomMlp(WeightFormat::kWint2));
    shared_ = RandomMlp(WeightFormat::kWint8);
  }

  Mlp RandomMlp(WeightFormat format) {
    return MakeMlp(
        Pack(plan::ExactlyPackedMatrix(format, kHidden, 2 * kWidth, KOrder::kMma64, &rng_), true),
        Pack(plan::ExactlyPackedMatrix(format, kWidth, kHidden, KOrder::kMma64, &rng_), false));
  }

  // Half of the choices go to experts 30 … 33, many experts stay empty, expert 39 among them.
  void MakeRows(int64_t rows) {
    x_ = RandomRows(rows * kHidden, &rng_);
    for (int64_t r = 0; r < rows; ++r) {
      std::vector<int32_t> chosen;
      while (static_cast<int>(chosen.size()) < kTopK) {
        const auto e = static_cast<int32_t>(rng_() % 2 == 0 ? 30 + rng_() % 4 : rng_() % 39);
        if (std::find(chosen.begin(), chosen.end(), e) == chosen.end()) chosen.push_back(e);
      }
      ids_.insert(ids_.end(), chosen.begin(), chosen.end());
      for (int i = 0; i < kTopK; ++i) {
        weights_.push_back(std::uniform_real_distribution<float>(0, 1)(rng_));
      }
    }
  }

  std::vector<float> Run(const NamedPlanner& planner, int64_t first, int64_t rows) {
    std::vector<const DeviceMlp*> experts;
    for (const Mlp& expert : experts_) experts.push_back(&expert.device);
    std::vector<float> y(rows * kHidden, std::nanf(""));
    EmulatedLauncher launcher(static_cast<uint32_t>(rng_()), 64);
    MatmulSequence sequence(planner.planner, 3, &launcher, planner.wgmma_planner);
    std::vector<uint8_t> workspace;
    for (const bool run : {false, true}) {
      const int64_t bytes = sequence.MoeMlp({x_.data() + first * kHidden, kHidden}, rows, experts,
                                            kTopK, &ids_[first * kTopK], &weights_[first * kTopK],
                                            GetParam() ? &shared_.device : nullptr, nullptr,
                                            {y.data(), kHidden}, run ? workspace.data() : nullptr);
      workspace.assign(bytes, 0xFF);
    }
    return y;
  }

  const uint32_t seed_;
  std::mt19937 rng_;
  std::vector<Mlp> experts_;
  Mlp shared_;
  std::vector<float> x_;
  std::vector<int32_t> ids_;
  std::vector<float> weights_;
};

TEST_P(MoeTest, EveryRowGetsItsExpertsUnderEveryPlan) {
  constexpr int64_t kRows = 30;
  MakeRows(kRows);
  std::vector<std::vector<double>> expected(kRows, std::vector<double>(kHidden));
  std::vector<std::vector<double>> error = expected;
  for (int64_t r = 0; r < kRows; ++r) {
    const float* x = &x_[r * kHidden];
    for (int i = 0; i < kTopK; ++i) {
      const int64_t pair = r * kTopK + i;
      AddMlp(experts_[ids_[pair]], x, weights_[pair], &expected[r], &error[r]);
    }
    if (GetParam()) AddMlp(shared_, x, 1, &expected[r], &error[r]);
  }
  std::vector<float> first_result;
  for (const NamedPlanner& planner : kPlanners) {
    SCOPED_TRACE(fmt::format("seed={} {}", seed_, planner.name));
    const auto y = Run(planner, 0, kRows);
    for (int64_t r = 0; r < kRows; ++r) {
      for (int64_t c = 0; c < kHidden; ++c) {
        ASSERT_LE(std::fabs(y[r * kHidden + c] - expected[r][c]), error[r][c]) << r << " " << c;
      }
    }
    if (first_result.empty()) first_result = y;
    EXPECT_TRUE(y == first_result) << "bits differ from those of " << kPlanners[0].name;
  }
}

TEST_P(MoeTest, ARowHasTheSameBitsInAnyBatch) {
  MakeRows(12);
  const auto expected = Run(kPlanners[2], 0, 12);
  for (const auto& [first, rows] : {std::pair<int64_t, int64_t>{0, 1}, {7, 1}, {3, 5}}) {
    const auto part = Run({"chosen", plan::PlanProduct}, first, rows);
    EXPECT_TRUE(std::equal(part.begin(), part.end(), expected.begin() + first * kHidden)) << first;
  }
}

INSTANTIATE_TEST_SUITE_P(Shared, MoeTest, testing::Bool(), [](const auto& info) {
  return info.param ? "WithSharedExperts" : "RoutedOnly";
});

}  // namespace
}  // namespace wintserve::kernels::cuda
