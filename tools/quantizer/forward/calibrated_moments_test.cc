// The moments that every matrix' encoder is given, against those of the inputs of both models.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "kernels/cpu/cpu_backend.h"
#include "tools/quantizer/forward/calibrated_quantizer.h"
#include "tools/quantizer/forward/calibration_test_util.h"

namespace wintserve::quantizer {
namespace {

using formats::HostMatrix;
using kernels::ConstRows;
using kernels::cpu::ThreadPool;

constexpr double kEpsilon = 0x1p-24;  // of rounding to float32, relative

// The three arrays, summed one by one in float64, with the bounds of what float32 may be off by.
class ExactMoments {
 public:
  ExactMoments(int64_t k, int64_t n) : k_(k), n_(n), arrays_(3) {
    for (auto& array : arrays_) array.resize(k * std::max(k, n));
  }

  // A number with the sum of the magnitudes that it was added up from.
  struct Sum {
    double value = 0;
    double magnitude = 0;

    void Add(double term) {
      value += term;
      magnitude += std::abs(term);
    }
  };

  void Add(double weight, const float* x_q, const float* x_f, const std::vector<Sum>& d) {
    ++num_rows_;
    for (int64_t i = 0; i < k_; ++i) {
      for (int64_t j = 0; j < k_; ++j) {
        arrays_[0][i * k_ + j].Add(weight * x_q[i] * x_q[j]);
        arrays_[1][i * k_ + j].Add(weight * x_q[i] * (double{x_f[j]} - x_q[j]));
      }
      for (int64_t j = 0; j < std::ssize(d); ++j) {
        arrays_[2][i * n_ + j].value += weight * x_q[i] * d[j].value;
        arrays_[2][i * n_ + j].magnitude += weight * std::abs(x_q[i]) * d[j].magnitude;
      }
    }
  }
  void ExpectEqual(const Moments& moments, const std::string& place) const {
    EXPECT_EQ(moments.num_rows, num_rows_) << place;
    ExpectNear(0, moments.hessian, place + " hessian");
    ExpectNear(1, moments.cross, place + " cross");
    if (n_ > 0) ExpectNear(2, moments.cross_output, place + " cross_output");
  }

 private:
  // A product of rounded factors (the weight of two and its root, two inputs) and num_rows
  // additions; d is a quotient of two residuals and two terms for each of four experts and of the
  // shared ones.
  void ExpectNear(int which, const LargeVector& found, const std::string& place) const {
    ASSERT_EQ(std::ssize(found), which == 2 ? k_ * n_ : k_ * k_) << place;
    const double bound = (static_cast<double>(num_rows_) + 28) * kEpsilon;
    double largest = 0;
    for (size_t i = 0; i < found.size(); ++i) {
      const Sum& exact = arrays_[which][i];
      ASSERT_NEAR(found[i], exact.value, bound * exact.magnitude + 1e-30) << place << " " << i;
      largest = std::max(largest, std::abs(exact.value));
    }
    EXPECT_GT(largest, 0) << place;
  }

  const int64_t k_;
  const int64_t n_;
  int64_t num_rows_ = 0;
  std::vector<std::vector<Sum>> arrays_;
};

using Residual = std::vector<std::vector<float>>;  // [tokens][hidden_size]

// Of the unquantised model after the matrices of layer 1 up to the last of `role`.
Residual ResidualAfter(const SmallCheckpoint& checkpoint,
                       const std::vector<TokenSequence>& sequences, MatrixRole role,
                       ThreadPool* pool) {
  const auto quantizer = Create(
      checkpoint, sequences,
      Encoder([](const MatrixRef&, const HostMatrix& source, const Moments&) { return source; }),
      pool);
  Residual residual(quantizer->unquantized().num_tokens());
  for (const MatrixRef& ref : checkpoint.refs()) {
    CHECK(quantizer->Next(ref, StoredFormat::kPlain).ok());
    if (ref.layer != 1 || ref.role != role) continue;
    for (size_t t = 0; t < residual.size(); ++t) {
      const float* row = quantizer->unquantized().residual().row(static_cast<int64_t>(t));
      residual[t].assign(row, row + checkpoint.config().hidden_size);
    }
  }
  return residual;
}

// The formula of calibrated_quantizer.h.
std::vector<double> ExactRowWeights(const Residual& residual, double epsilon) {
  std::vector<double> weights;
  double mean = 0;
  for (const std::vector<float>& row : residual) {
    double square = 0;
    for (const float value : row) square += double{value} * value;
    weights.push_back(1 / (square / static_cast<double>(row.size()) + epsilon));
    mean += weights.back() / static_cast<double>(residual.size());
  }
  for (double& weight : weights) weight /= mean;
  return weights;
}

// Checks the moments of layer 1 against what the inputs say that the quantiser has at that moment.
class MomentChecker {
 public:
  MomentChecker(const SmallCheckpoint& checkpoint, ThreadPool* pool)
      : checkpoint_(checkpoint),
        backend_(kernels::cpu::CreateCpuBackend({.num_threads = 1})),
        sequences_(RandomSequences(checkpoint.config(), 40, 100, 9)),
        weights_after_attention_(
            ExactRowWeights(ResidualAfter(checkpoint, sequences_, MatrixRole::kOutput, pool),
                            checkpoint.config().rms_norm_eps)),
        weights_after_mlp_(
            ExactRowWeights(ResidualAfter(checkpoint, sequences_, MatrixRole::kDown, pool),
                            checkpoint.config().rms_norm_eps)),
        quantizer_(Create(
            checkpoint, sequences_,
            Encoder([this](const MatrixRef& ref, const HostMatrix& source, const Moments& moments) {
              if (ref.layer == 1) Check(ref, moments);
              return Disturbed(source, static_cast<uint32_t>(ref.expert + 9));
            }),
            pool, {.poor_rows = 0})) {}

  int Run() {
    for (const MatrixRef& ref : checkpoint_.refs()) {
      if (ref.layer == 2) break;
      auto made = quantizer_->Next(ref, StoredFormat::kPlain);
      CHECK(made.ok(), "{}", made.status().ToString());
      // For the inputs of the down matrix.
      if (ref.role != MatrixRole::kGateUp || ref.layer != 1) continue;
      gate_up_[0] =
          *backend_->Pack(*checkpoint_.get().LoadMatrix(ref, 0, 1), kernels::MatrixUse::kLinear);
      gate_up_[1] = *backend_->Pack(*made, kernels::MatrixUse::kLinear);
    }
    return num_checked_;
  }

 private:
  const TokenStates& states(int which) const {
    return which == 0 ? quantizer_->unquantized() : quantizer_->quantized();
  }

  void Check(const MatrixRef& ref, const Moments& moments) {
    ++num_checked_;
    const ModelConfig& config = checkpoint_.config();
    const bool is_expert = ref.expert >= 0;
    const TokenRows rows =
        is_expert ? states(1).RoutedTo(ref.expert) : AllTokens(states(1).num_tokens());
    ASSERT_GT(rows.size(), 0) << "choose another seed";
    const auto gain = *checkpoint_.get().LoadVector(
        ref.role == MatrixRole::kQkv ? VectorRole::kInputNorm : VectorRole::kPostAttentionNorm,
        ref.layer);
    RowBuffer normed[2];
    ConstRows inputs[2];
    for (int which = 0; which < 2; ++which) {
      if (ref.role == MatrixRole::kOutput) {
        inputs[which] = states(which).attended();
      } else if (ref.role == MatrixRole::kDown) {
        normed[which] = *states(which).Activate(gain.data(), rows.tokens, *gate_up_[which]);
        inputs[which] = normed[which].rows();
      } else {
        normed[which] = *RowBuffer::Allocate(rows.size(), config.hidden_size);
        states(which).Normalize(rows.tokens, gain.data(), normed[which].rows());
        inputs[which] = normed[which].rows();
      }
    }
    ExactMoments exact(moments.k, AddsToResidual(ref.role) ? config.hidden_size : 0);
    const auto repairs = Repairs(ref, rows);
    const bool is_mlp = ref.role == MatrixRole::kGateUp || ref.role == MatrixRole::kDown;
    const std::vector<double>& weights = is_mlp ? weights_after_mlp_ : weights_after_attention_;
    for (int64_t i = 0; i < rows.size(); ++i) {
      exact.Add(double{rows.gates[i]} * rows.gates[i] * weights[rows.tokens[i]], inputs[1].row(i),
                inputs[0].row(i), repairs[i]);
    }
    exact.ExpectEqual(moments, MatrixPlace(ref));
  }

  using Sum = ExactMoments::Sum;

  // What each row of a matrix that adds to the residual has to make up for.
  std::vector<std::vector<Sum>> Repairs(const MatrixRef& ref, const TokenRows& rows) {
    std::vector<std::vector<Sum>> repairs(rows.size());
    if (!AddsToResidual(ref.role)) return repairs;
    const auto add = [&](int32_t token, double factor, const float* x) {
      const auto at = std::find(rows.tokens.begin(), rows.tokens.end(), token);
      if (at == rows.tokens.end()) return;
      const int64_t i = at - rows.tokens.begin();
      for (int c = 0; c < checkpoint_.config().hidden_size; ++c) {
        repairs[i][c].Add(factor * x[c] / rows.gates[i]);
      }
    };
    const bool adds_experts =
        ref.role == MatrixRole::kDown && checkpoint_.config().IsMoeLayer(ref.layer);
    for (auto& row : repairs) row.resize(checkpoint_.config().hidden_size);
    for (const int32_t token : rows.tokens) {
      for (int which = 0; which < 2; ++which) {
        const double sign = which == 0 ? 1 : -1;
        add(token, sign, states(which).residual().row(token));
        if (adds_experts) add(token, sign, states(which).MlpOutput(token));
      }
    }
    if (!adds_experts) return repairs;
    // The experts to come, this one included, as they are in the unquantised model.
    std::vector<int> to_come = {kSharedExperts};
    for (int e = ref.expert; e >= 0 && e < checkpoint_.config().num_experts; ++e) {
      to_come.push_back(e);
    }
    for (const int expert : to_come) {
      const TokenRows routed =
          expert == kSharedExperts ? AllTokens(states(1).num_tokens()) : states(1).RoutedTo(expert);
      const auto y = Outputs(ref.layer, expert, routed);
      for (int64_t i = 0; i < routed.size(); ++i) {
        add(routed.tokens[i], -routed.gates[i], y.From(i).data);
      }
    }
    return repairs;
  }

  RowBuffer Outputs(int layer, int expert, const TokenRows& rows) {
    const auto gain = *checkpoint_.get().LoadVector(VectorRole::kPostAttentionNorm, layer);
    const auto load = [&](MatrixRole role) {
      return *backend_->Pack(*checkpoint_.get().LoadMatrix({role, layer, expert}, 0, 1),
                             kernels::MatrixUse::kLinear);
    };
    const RowBuffer activations =
        *states(0).Activate(gain.data(), rows.tokens, *load(MatrixRole::kGateUp));
    RowBuffer y = *RowBuffer::Allocate(rows.size(), checkpoint_.config().hidden_size);
    backend_->Linear(activations.rows(), rows.size(), *load(MatrixRole::kDown), y.rows());
    return y;
  }

  const SmallCheckpoint& checkpoint_;
  const std::unique_ptr<kernels::Backend> backend_;
  const std::vector<TokenSequence> sequences_;
  const std::vector<double> weights_after_attention_;  // by token
  const std::vector<double> weights_after_mlp_;
  const std::unique_ptr<CalibratedQuantizer> quantizer_;
  std::unique_ptr<kernels::WeightMatrix> gate_up_[2];
  int num_checked_ = 0;
};

TEST(CalibratedQuantizer, MomentsAreThoseOfTheInputsOfBothModels) {
  ModelConfig config = SmallMoeConfig();
  config.num_layers = 2;
  const SmallCheckpoint checkpoint(config);
  ThreadPool pool(2);
  // qkv, output, router, and two of each of the four experts and of the shared one.
  EXPECT_EQ(MomentChecker(checkpoint, &pool).Run(), 3 + 2 * 5);
}

TEST(CalibratedQuantizer, MomentsOfADenseLayerAreThoseOfTheInputsOfBothModels) {
  ModelConfig config = SmallMoeConfig();
  config.moe_layer_start = 2;
  const SmallCheckpoint checkpoint(config);
  ThreadPool pool(2);
  // qkv, output, gate-up, down.
  EXPECT_EQ(MomentChecker(checkpoint, &pool).Run(), 4);
}

TEST(CalibratedQuantizer, AResidualOfZerosGivesFiniteMoments) {
  constexpr int kZeroToken = 7;
  const SmallCheckpoint checkpoint(SmallMoeConfig(), 1, kZeroToken);
  std::vector<TokenSequence> sequences = RandomSequences(checkpoint.config(), 20, 60, 9);
  sequences.insert(sequences.begin(), {kZeroToken});  // attends to nothing else
  ThreadPool pool(2);
  int num_matrices = 0;
  const auto quantizer =
      Create(checkpoint, sequences,
             Encoder([&](const MatrixRef& ref, const HostMatrix& source, const Moments& moments) {
               ++num_matrices;
               EXPECT_TRUE(std::isfinite(moments.weight)) << MatrixPlace(ref);
               for (const auto* array : {&moments.hessian, &moments.cross, &moments.cross_output}) {
                 EXPECT_TRUE(std::all_of(array->begin(), array->end(), [](float value) {
                   return std::isfinite(value);
                 })) << MatrixPlace(ref);
               }
               return Disturbed(source, 3);
             }),
             &pool);
  for (const MatrixRef& ref : checkpoint.refs()) {
    const auto made = quantizer->Next(ref, StoredFormat::kPlain);
    ASSERT_TRUE(made.ok()) << made.status();
  }
  EXPECT_GT(num_matrices, 0);
  const float* row = quantizer->unquantized().residual().row(0);
  EXPECT_TRUE(std::all_of(row, row + checkpoint.config().hidden_size,
                          [](float value) { return value == 0; }));
}

// The moments of layer 1, by place, of a model whose matrices stay as they are.
std::map<std::string, Moments> MomentsOfLayer1(const SmallCheckpoint& checkpoint,
                                               const CalibrationOptions& options) {
  ThreadPool pool(2);
  std::map<std::string, Moments> found;
  const auto quantizer =
      Create(checkpoint, RandomSequences(checkpoint.config(), 20, 60, 9),
             Encoder([&](const MatrixRef& ref, const HostMatrix& source, const Moments& moments) {
               if (ref.layer == 1) found[MatrixPlace(ref)] = moments;
               return source;
             }),
             &pool, options);
  for (const MatrixRef& ref : checkpoint.refs()) {
    const auto made = quantizer->Next(ref, StoredFormat::kPlain);
    CHECK(made.ok(), "{}", made.status().ToString());
  }
  return found;
}

TEST(CalibratedQuantizer, AnExpertWithFewRowsLeansOnItsLayer) {
  const SmallCheckpoint checkpoint(SmallMoeConfig());
  const auto own = MomentsOfLayer1(checkpoint, {.poor_rows = 0});
  const auto leaning = MomentsOfLayer1(checkpoint, {.poor_rows = 1e6, .prior_rows = 0.5});
  // Which all tokens go through, with the weights of the experts' rows.
  const Moments& all = own.at("layer 1 shared experts gate-up");
  for (const char* place : {"layer 1 expert 0 gate-up", "layer 1 expert 0 down"}) {
    SCOPED_TRACE(place);
    const Moments& before = own.at(place);
    const Moments& after = leaning.at(place);
    EXPECT_EQ(after.num_rows, before.num_rows);
    const double prior_weight =
        0.5 * static_cast<double>(before.k) * before.weight / static_cast<double>(before.num_rows);
    EXPECT_NEAR(after.weight, before.weight + prior_weight, 1e-9 * after.weight);
    for (int64_t i = 0; i < before.k * before.k; i += before.k + 1) {
      EXPECT_GT(after.hessian[i], before.hessian[i]);
    }
    if (std::string(place).ends_with("down")) continue;  // whose layer has no inputs in common
    for (size_t i = 0; i < before.hessian.size(); ++i) {
      const double expected = before.hessian[i] + prior_weight / all.weight * all.hessian[i];
      ASSERT_NEAR(after.hessian[i], expected,
                  4 * kEpsilon * (std::abs(before.hessian[i]) + std::abs(expected)))
          << i;
    }
  }
  // An expert that has enough stands alone, and so does what every token goes through.
  EXPECT_EQ(leaning.at("layer 1 router").hessian, own.at("layer 1 router").hessian);
  EXPECT_EQ(leaning.at("layer 1 shared experts down").hessian,
            own.at("layer 1 shared experts down").hessian);
}

}  // namespace
}  // namespace wintserve::quantizer
