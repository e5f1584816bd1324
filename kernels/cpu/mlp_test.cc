#include "kernels/cpu/mlp.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/matmul.h"
#include "kernels/cpu/test_util.h"

namespace wintserve::kernels::cpu {
namespace {

using formats::HostMatrix;
using formats::KOrder;
using formats::WeightFormat;

// Highway's exp errs by at most one unit in the last place (2 eps); a sum, a division and a product
// follow. One more eps covers the second-order terms.
constexpr double kSwiGluRelative = 6 * kEpsilon;

Bounded SwiGlu(const Bounded& gate, const Bounded& up) {
  const double silu = gate.value / (1 + std::exp(-gate.value));
  // |silu'| < 1.1
  const double silu_error = 1.1 * gate.error + kSwiGluRelative * (std::fabs(silu) + gate.error);
  const double up_largest = std::fabs(up.value) + up.error;
  return {silu * up.value, silu_error * up_largest + std::fabs(silu) * up.error};
}

TEST(SwiGluTile, StaysWithinItsBoundOverTheWholeRange) {
  std::mt19937 rng(1);
  constexpr int64_t kRows = 20;
  std::vector<float> gate = RandomFloats(kRows * kTileColumns, &rng, 30.0f);
  const std::vector<float> up = RandomFloats(kRows * kTileColumns, &rng);
  gate[0] = 0;
  gate[1] = -1e30f;
  gate[2] = 1e30f;
  gate[3] = -88.5f;
  gate[4] = -104.0f;
  ForEachTarget([&] {
    std::vector<float> out(kRows * kTileColumns);
    SwiGluTile(gate.data(), up.data(), kRows, out.data(), kTileColumns);
    for (size_t i = 0; i < out.size(); ++i) {
      Bounded expected = SwiGlu({gate[i], 0}, {up[i], 0});
      // Below -88 the exponent stands still: silu is smaller than 1e-36 per unit of gate.
      if (gate[i] < -88) expected.error += 1e-38 * std::fabs(gate[i] * up[i]);
      ExpectWithin(expected, out[i]);
    }
  });
}

struct HostMlp {
  HostMatrix gate_up;
  HostMatrix down;
};

struct PackedMlp {
  std::unique_ptr<WeightMatrix> gate_up;
  std::unique_ptr<WeightMatrix> down;
  MlpWeights view() const { return {gate_up.get(), down.get()}; }
};

HostMlp RandomMlp(WeightFormat format, int64_t hidden, int64_t width, std::mt19937* rng) {
  return {RandomMatrix(format, hidden, 2 * width, KOrder::kMma64, rng),
          RandomMatrix(format, width, hidden, KOrder::kMma64, rng)};
}

PackedMlp Pack(Backend* backend, const HostMlp& mlp) {
  return {*backend->Pack(mlp.gate_up, MatrixUse::kGateUp),
          *backend->Pack(mlp.down, MatrixUse::kLinear)};
}

std::vector<Bounded> MlpReference(const HostMlp& mlp, const float* x) {
  const auto gate_up = formats::DecodeToFloat(mlp.gate_up);
  const auto down = formats::DecodeToFloat(mlp.down);
  const int64_t width = mlp.down.k;
  const auto row = Exact(x, mlp.gate_up.k);
  std::vector<Bounded> activation(width);
  for (int64_t i = 0; i < width; ++i) {
    activation[i] = SwiGlu(DotReference(row, gate_up, 2 * width, i),
                           DotReference(row, gate_up, 2 * width, width + i));
  }
  std::vector<Bounded> y(mlp.down.n);
  for (int64_t c = 0; c < mlp.down.n; ++c) y[c] = DotReference(activation, down, mlp.down.n, c);
  return y;
}

TEST(SwiGluMlp, StaysWithinThePropagatedBound) {
  std::mt19937 rng(2);
  struct Shape {
    WeightFormat format;
    int64_t hidden;
    int64_t width;
  };
  // A width of 40 leaves the second half's tile partly empty.
  for (const Shape& shape :
       {Shape{WeightFormat::kWint8, 128, 64}, Shape{WeightFormat::kWint8, 64, 40},
        Shape{WeightFormat::kBfloat16, 100, 36}, Shape{WeightFormat::kWint2, 128, 64}}) {
    const HostMlp mlp = RandomMlp(shape.format, shape.hidden, shape.width, &rng);
    constexpr int64_t kRows = 9;
    const std::vector<float> x = RandomFloats(kRows * shape.hidden, &rng);
    ForEachTarget([&] {
      const auto backend = CreateCpuBackend({});
      const PackedMlp packed = Pack(backend.get(), mlp);
      std::vector<float> y(kRows * shape.hidden, std::nanf(""));
      backend->SwiGluMlp({x.data(), shape.hidden}, kRows, packed.view(), {y.data(), shape.hidden});
      for (int64_t r = 0; r < kRows; ++r) {
        const auto expected = MlpReference(mlp, &x[r * shape.hidden]);
        for (int64_t c = 0; c < shape.hidden; ++c) {
          ExpectWithin(expected[c], y[r * shape.hidden + c]);
        }
      }
    });
  }
}

class MoeTest : public testing::TestWithParam<bool> {
 protected:
  static constexpr int64_t kHidden = 128;
  static constexpr int64_t kWidth = 64;
  static constexpr int kExperts = 6;
  static constexpr int kTopK = 3;

  MoeTest() {
    for (int e = 0; e < kExperts; ++e) {
      experts_.push_back(RandomMlp(WeightFormat::kWint2, kHidden, kWidth, &rng_));
    }
    shared_ = RandomMlp(WeightFormat::kWint8, kHidden, 2 * kWidth, &rng_);
  }

  void MakeRows(int64_t rows) {
    x_ = RandomFloats(rows * kHidden, &rng_);
    for (int64_t r = 0; r < rows; ++r) {
      std::vector<int32_t> order = {0, 1, 2, 3, 4};  // expert 5 gets no token
      std::shuffle(order.begin(), order.end(), rng_);
      ids_.insert(ids_.end(), order.begin(), order.begin() + kTopK);
      for (int i = 0; i < kTopK; ++i) {
        weights_.push_back(std::uniform_real_distribution<float>(0, 1)(rng_));
      }
    }
  }

  std::vector<float> Run(int threads, int64_t first, int64_t rows) {
    const auto backend = CreateCpuBackend({.num_threads = threads});
    std::vector<PackedMlp> packed;
    std::vector<MlpWeights> views;
    for (const HostMlp& expert : experts_) packed.push_back(Pack(backend.get(), expert));
    for (const PackedMlp& expert : packed) views.push_back(expert.view());
    const PackedMlp shared = Pack(backend.get(), shared_);
    const MlpWeights shared_view = shared.view();
    const auto group = *backend->GroupExperts(views);
    std::vector<float> y(rows * kHidden, std::nanf(""));
    backend->MoeMlp({x_.data() + first * kHidden, kHidden}, rows, *group, kTopK,
                    ids_.data() + first * kTopK, weights_.data() + first * kTopK,
                    GetParam() ? &shared_view : nullptr, {y.data(), kHidden});
    return y;
  }

  std::mt19937 rng_{3};
  std::vector<HostMlp> experts_;
  HostMlp shared_;
  std::vector<float> x_;
  std::vector<int32_t> ids_;
  std::vector<float> weights_;
};

TEST_P(MoeTest, StaysWithinThePropagatedBound) {
  constexpr int64_t kRows = 11;
  MakeRows(kRows);
  ForEachTarget([&] {
    const auto y = Run(1, 0, kRows);
    for (int64_t r = 0; r < kRows; ++r) {
      std::vector<Bounded> expected(kHidden);
      std::vector<double> magnitudes(kHidden);
      const auto add = [&](const HostMlp& mlp, double weight) {
        const auto share = MlpReference(mlp, &x_[r * kHidden]);
        for (int64_t c = 0; c < kHidden; ++c) {
          expected[c].value += weight * share[c].value;
          expected[c].error += weight * share[c].error;
          magnitudes[c] += weight * (std::fabs(share[c].value) + share[c].error);
        }
      };
      for (int i = 0; i < kTopK; ++i) add(experts_[ids_[r * kTopK + i]], weights_[r * kTopK + i]);
      if (GetParam()) add(shared_, 1);
      for (int64_t c = 0; c < kHidden; ++c) {
        expected[c].error += Gamma(kTopK + 2) * magnitudes[c];
        ExpectWithin(expected[c], y[r * kHidden + c]);
      }
    }
  });
}

TEST_P(MoeTest, BatchesAndThreadsDoNotChangeBits) {
  constexpr int64_t kRows = 600;  // more than one item's rows for an expert
  MakeRows(kRows);
  const auto expected = Run(1, 0, kRows);
  EXPECT_TRUE(Run(3, 0, kRows) == expected);
  for (const auto& [first, rows] :
       {std::pair<int64_t, int64_t>{0, 1}, {77, 1}, {5, 2}, {100, 17}}) {
    const auto part = Run(2, first, rows);
    EXPECT_TRUE(std::equal(part.begin(), part.end(), expected.begin() + first * kHidden)) << first;
  }
}

// A server's memory does not grow when the largest batch comes, days after the first.
TEST(Scratch, HoldsTheLargestBatchFromTheFirstOneOn) {
  constexpr int64_t kHidden = 64;
  constexpr int32_t kMaxRows = 40;
  std::mt19937 rng(4);
  const HostMlp host = RandomMlp(WeightFormat::kWint8, kHidden, /*width=*/40, &rng);
  const auto gate_up =
      *PackedMatrix::Create(host.gate_up, MatrixUse::kGateUp, WeightRounding::kFastDeploy);
  const auto down =
      *PackedMatrix::Create(host.down, MatrixUse::kLinear, WeightRounding::kFastDeploy);
  const std::vector<float> x = RandomFloats(kMaxRows * kHidden, &rng);
  std::vector<float> y(kMaxRows * kHidden);
  std::vector<int32_t> tokens(kMaxRows);
  std::iota(tokens.begin(), tokens.end(), 0);
  ThreadPool pool(1);

  // The floats of the activations after a batch of one row, and after one of kMaxRows.
  const auto capacities = [&](int64_t max_rows) {
    Scratch scratch;
    scratch.threads.resize(1);
    scratch.max_rows = max_rows;
    std::vector<int64_t> found;
    for (const size_t num_rows : {size_t{1}, size_t{kMaxRows}}) {
      const MlpRun run = {gate_up.get(), down.get(), std::span(tokens).first(num_rows), nullptr};
      RunMlps({x.data(), kHidden}, static_cast<int64_t>(num_rows), {&run, 1}, {y.data(), kHidden},
              &pool, &scratch);
      found.push_back(scratch.activations.capacity());
    }
    return found;
  };
  const std::vector<int64_t> grown = capacities(/*max_rows=*/0);
  EXPECT_EQ(grown[0] * kMaxRows, grown[1]);
  EXPECT_EQ(capacities(kMaxRows), std::vector<int64_t>(2, grown[1]));
}

INSTANTIATE_TEST_SUITE_P(Shared, MoeTest, testing::Bool(), [](const auto& info) {
  return info.param ? "WithSharedExperts" : "RoutedOnly";
});

}  // namespace
}  // namespace wintserve::kernels::cpu
