// MLPs and mixtures of experts on a GPU: at most the errors of FastDeploy's rounding scheme on the
// same inputs, against float64 sums over the unrounded weights, and the same bits in any batch.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "common/check.h"
#include "fmt/format.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/matmul/matmul_cuda_test_util.h"
#include "kernels/cuda/side_stream.h"
#include "kernels/formats/bf16.h"
#include "kernels/plan/random_weights_test_util.h"

namespace wintserve::kernels::cuda {
namespace {

using formats::KOrder;
using formats::WeightFormat;

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

  // The same with the shared experts on a stream beside: in a graph, which runs twice.
  std::vector<float> RunBeside(const MatmulOptions& options, int64_t first, int64_t rows) {
    const DeviceArray<float> x(host_x_);
    const DeviceArray<int32_t> ids(ids_);
    const DeviceArray<float> weights(weights_);
    const int64_t hidden = GetParam().hidden;
    DeviceArray<float> y(rows * hidden);
    DeviceArray<float> shared_out(rows * hidden);
    DeviceArray<uint8_t> workspace(WorkspaceBytes(options, rows));
    DeviceArray<uint8_t> side_workspace(SwiGluMlpWorkspaceBytes(options, shared_[0].device, rows));
    absl::StatusOr<SideStream> side = SideStream::Create();
    CHECK(side.ok(), "{}", std::string(side.status().message()));
    cudaGraph_t graph = nullptr;
    CUDA_CALL(cudaStreamBeginCapture, TheStream(), cudaStreamCaptureModeThreadLocal);
    side->Fork(TheStream());
    LaunchSwiGluMlp(options,
                    {.x = {x.data() + first * hidden, hidden},
                     .num_rows = rows,
                     .mlp = &shared_[0].device,
                     .y = {shared_out.data(), hidden},
                     .overlaps_previous = false},
                    side_workspace.data(), side->get());
    MoeMlpArgs args = ArgsFor(x, ids, weights, first, rows, &y);
    args.shared = nullptr;
    args.shared_out = shared_out.data();
    args.side = &*side;
    LaunchMoeMlp(options, args, workspace.data(), TheStream());
    CUDA_CALL(cudaStreamEndCapture, TheStream(), &graph);
    cudaGraphExec_t executable = nullptr;
    CUDA_CALL(cudaGraphInstantiate, &executable, graph, 0ull);
    for (int run = 0; run < 2; ++run) {
      y.Poison(TheStream());
      shared_out.Poison(TheStream());
      workspace.Poison(TheStream());
      side_workspace.Poison(TheStream());
      CUDA_CALL(cudaGraphLaunch, executable, TheStream());
    }
    std::vector<float> out = y.Download(TheStream());
    CUDA_CALL(cudaGraphExecDestroy, executable);
    CUDA_CALL(cudaGraphDestroy, graph);
    return out;
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
  if (!GetParam().shared) return;
  for (const int64_t rows : {1, 8}) {
    EXPECT_TRUE(RunBeside(OptionsFor(), 3, rows) ==
                std::vector<float>(all.begin() + 3 * hidden, all.begin() + (3 + rows) * hidden))
        << rows << " rows";
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

// Small enough for compute-sanitizer's racecheck, as every_kernel_cuda_test.cc.
using EveryMoeKernel = MoeTest;

TEST_P(EveryMoeKernel, HasTheBitsOfTheChosenOne) {
  for (const int64_t rows : {1, 9, 40}) {
    const std::vector<float> expected = Run(OptionsFor({"portable", plan::PlanProduct}), 0, rows);
    for (const NamedPlanner& planner : kForcedPlanners) {
      if (!planner.IsOfThisGpu()) continue;
      MatmulOptions options = OptionsFor(planner);
      options.num_multiprocessors = 3;  // so that a block has several items
      EXPECT_TRUE(Run(options, 0, rows) == expected) << planner.name << ", " << rows << " rows";
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Formats, EveryMoeKernel,
    testing::Values(MoeCase{"Wint2WithShared", WeightFormat::kWint2, 5, 2, 256, 128, true},
                    MoeCase{"Wint4", WeightFormat::kWint4, 5, 2, 256, 128, false},
                    MoeCase{"Wint8", WeightFormat::kWint8, 5, 2, 256, 128, false},
                    MoeCase{"Bfloat16", WeightFormat::kBfloat16, 5, 2, 256, 128, false}),
    [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace wintserve::kernels::cuda
