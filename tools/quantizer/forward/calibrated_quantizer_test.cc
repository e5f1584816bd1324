#include "tools/quantizer/forward/calibrated_quantizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <bit>
#include <memory>
#include <string>
#include <vector>

#include "kernels/cpu/cpu_backend.h"
#include "tools/quantizer/forward/calibration_test_util.h"

namespace wintserve::quantizer {
namespace {

using formats::HostMatrix;
using kernels::cpu::ThreadPool;
using ::testing::HasSubstr;

// As ServedLogits, from the residual that calibration ends with.
std::vector<std::vector<float>> CalibratedLogits(const ModelConfig& config,
                                                 const Checkpoint& checkpoint,
                                                 const std::vector<TokenSequence>& sequences,
                                                 const TokenStates& states,
                                                 kernels::Backend* backend) {
  const auto gain = *checkpoint.LoadVector(VectorRole::kFinalNorm, 0);
  const auto head = *backend->Pack(*checkpoint.LoadMatrix({MatrixRole::kHead}, 0, 1),
                                   kernels::MatrixUse::kLinear);
  const RowBuffer normed = *RowBuffer::Allocate(1, config.hidden_size);
  std::vector<std::vector<float>> logits;
  int64_t last = -1;
  for (const TokenSequence& sequence : sequences) {
    last += std::ssize(sequence);
    states.Normalize(last, 1, gain.data(), normed.rows());
    logits.emplace_back(config.vocab_size);
    backend->Linear(normed.rows(), 1, *head, {logits.back().data(), config.vocab_size});
  }
  return logits;
}

void ExpectTheServedModel(const ModelConfig& config, const Checkpoint& checkpoint,
                          std::vector<TokenSequence> sequences) {
  ThreadPool pool(2);
  int num_matrices = 0;
  auto quantizer = CalibratedQuantizer::Create(
      config, checkpoint, sequences,
      Encoder([&](const MatrixRef& ref, const HostMatrix& source, const Moments& moments) {
        EXPECT_TRUE(moments.cross.empty()) << MatrixPlace(ref);
        for (const float value : moments.cross_output) EXPECT_EQ(value, 0) << MatrixPlace(ref);
        ++num_matrices;
        return source;
      }),
      CalibrationOptions(), &pool);
  ASSERT_TRUE(quantizer.ok()) << quantizer.status();
  for (const MatrixRef& ref : StoredMatrices(config, checkpoint.head_is_tied())) {
    const auto made = (*quantizer)->Next(ref, StoredFormat::kPlain);
    ASSERT_TRUE(made.ok()) << made.status();
  }
  EXPECT_GT(num_matrices, 0);
  for (int64_t t = 0; t < (*quantizer)->quantized().num_tokens(); ++t) {
    const float* x_q = (*quantizer)->quantized().residual().row(t);
    const float* x_f = (*quantizer)->unquantized().residual().row(t);
    ASSERT_TRUE(std::equal(x_q, x_q + config.hidden_size, x_f)) << "token " << t;
  }
  for (const LayerDrift& layer : (*quantizer)->drift()) {
    EXPECT_EQ(layer.relative_error, 0);
    EXPECT_EQ(layer.mean_token_error, 0);
  }
  EXPECT_EQ(std::ssize((*quantizer)->drift()), config.num_layers);
  const auto backend = kernels::cpu::CreateCpuBackend({.num_threads = 1});
  EXPECT_EQ(
      CalibratedLogits(config, checkpoint, sequences, (*quantizer)->quantized(), backend.get()),
      ServedLogits(config, checkpoint, sequences, backend.get()));
}

TEST(CalibratedQuantizer, UnchangedMatricesGiveTheModelThatIsServed) {
  const SmallCheckpoint checkpoint(SmallMoeConfig());
  ExpectTheServedModel(checkpoint.config(), checkpoint.get(),
                       // Several batches of attention, some chunks of rows.
                       RandomSequences(checkpoint.config(), 60, 200, 3));
}

TEST(CalibratedQuantizer, UnchangedMatricesGiveTheModelThatIsServedWithATiedHead) {
  const auto config = LoadModelConfig("tests/data/tiny-bf16");
  ASSERT_TRUE(config.ok()) << config.status();
  const auto checkpoint = Checkpoint::Open("tests/data/tiny-bf16", *config, KOrderChoice::kAuto);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  ASSERT_TRUE((*checkpoint)->head_is_tied());
  ExpectTheServedModel(*config, **checkpoint, RandomSequences(*config, 10, 300, 5));
}

// Depends on every value of the moments.
HostMatrix MadeOfMoments(const HostMatrix& source, const Moments& moments) {
  double sum = 0;
  for (const auto* array : {&moments.hessian, &moments.cross, &moments.cross_output}) {
    for (size_t i = 0; i < array->size(); ++i)
      sum += (*array)[i] * (1.0 + static_cast<double>(i % 7));
  }
  uint64_t bits = std::bit_cast<uint64_t>(sum);
  return Disturbed(source, static_cast<uint32_t>(bits ^ (bits >> 32)));
}

std::vector<HostMatrix> Quantize(const SmallCheckpoint& checkpoint, int num_threads,
                                 const std::vector<HostMatrix>& done, size_t num_replayed) {
  ThreadPool pool(num_threads);
  const auto quantizer =
      Create(checkpoint, RandomSequences(checkpoint.config(), 20, 100, 4),
             Encoder([](const MatrixRef&, const HostMatrix& source, const Moments& moments) {
               return MadeOfMoments(source, moments);
             }),
             &pool);
  std::vector<HostMatrix> results;
  for (const MatrixRef& ref : checkpoint.refs()) {
    if (results.size() < num_replayed) {
      const absl::Status status = quantizer->Replay(ref, done[results.size()]);
      CHECK(status.ok(), "{}", status.ToString());
      results.push_back(done[results.size()]);
      continue;
    }
    auto made = quantizer->Next(ref, StoredFormat::kPlain);
    CHECK(made.ok(), "{}", made.status().ToString());
    results.push_back(*std::move(made));
  }
  return results;
}

void ExpectSame(const std::vector<HostMatrix>& a, const std::vector<HostMatrix>& b) {
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) {
    EXPECT_EQ(a[i].values_f32, b[i].values_f32) << i;
    EXPECT_EQ(a[i].values_bf16, b[i].values_bf16) << i;
  }
}

TEST(CalibratedQuantizer, ReplayedStepsLeaveTheStateOfTheirFirstRun) {
  const SmallCheckpoint checkpoint(SmallMoeConfig());
  const std::vector<HostMatrix> whole = Quantize(checkpoint, 2, {}, 0);
  // Between any two matrices of a dense and of a MoE layer, and at both ends.
  for (size_t i = 1; i <= whole.size(); ++i) {
    SCOPED_TRACE(i);
    ExpectSame(Quantize(checkpoint, 2, whole, i), whole);
  }
}

TEST(CalibratedQuantizer, TheFinalNormBringsTheHeadsInputsNearest) {
  const SmallCheckpoint checkpoint(SmallMoeConfig());
  ThreadPool pool(2);
  const auto run = [&](bool disturbs) {
    auto quantizer =
        Create(checkpoint, RandomSequences(checkpoint.config(), 30, 100, 4),
               Encoder([&](const MatrixRef&, const HostMatrix& source, const Moments&) {
                 return disturbs ? Disturbed(source, 5) : source;
               }),
               &pool);
    for (const MatrixRef& ref : checkpoint.refs()) {
      CHECK(quantizer->Next(ref, StoredFormat::kPlain).ok());
    }
    return quantizer;
  };
  const std::vector<float> source = *checkpoint.get().LoadVector(VectorRole::kFinalNorm, 0);
  EXPECT_TRUE(run(false)->FinalNorm()->empty());

  const auto quantizer = run(true);
  const std::vector<float> solved = *quantizer->FinalNorm();
  const int64_t hidden = checkpoint.config().hidden_size;
  const auto backend = kernels::cpu::CreateCpuBackend({.num_threads = 1});
  const int64_t num_tokens = quantizer->quantized().num_tokens();
  const RowBuffer wanted = *RowBuffer::Allocate(num_tokens, hidden);
  const RowBuffer found = *RowBuffer::Allocate(num_tokens, hidden);
  quantizer->unquantized().Normalize(0, num_tokens, source.data(), wanted.rows());
  const auto error = [&](const std::vector<float>& gain, int64_t column) {
    quantizer->quantized().Normalize(0, num_tokens, gain.data(), found.rows());
    double sum = 0;
    for (int64_t t = 0; t < num_tokens; ++t) {
      const double difference =
          double{found.From(t).data[column]} - double{wanted.From(t).data[column]};
      sum += difference * difference;
    }
    return sum;
  };
  for (const int64_t column : {int64_t{0}, hidden / 2, hidden - 1}) {
    const double least = error(solved, column);
    EXPECT_LT(least, error(source, column));
    for (const float factor : {0.99f, 1.01f}) {
      std::vector<float> other = solved;
      other[column] *= factor;
      EXPECT_LT(least, error(other, column)) << column;
    }
  }
}

TEST(CalibratedQuantizer, ResultsDoNotDependOnTheNumberOfThreads) {
  const SmallCheckpoint checkpoint(SmallMoeConfig());
  const std::vector<HostMatrix> whole = Quantize(checkpoint, 1, {}, 0);
  ExpectSame(Quantize(checkpoint, 3, {}, 0), whole);
}

TEST(CalibratedQuantizer, RefusesTokensThatTheModelDoesNotTake) {
  const SmallCheckpoint checkpoint(SmallMoeConfig());
  ThreadPool pool(1);
  const auto message = [&](std::vector<TokenSequence> sequences) {
    const auto quantizer = CalibratedQuantizer::Create(
        checkpoint.config(), checkpoint.get(), std::move(sequences),
        Encoder([](const MatrixRef&, const HostMatrix& source, const Moments&) { return source; }),
        CalibrationOptions(), &pool);
    EXPECT_EQ(quantizer.status().code(), absl::StatusCode::kInvalidArgument);
    return std::string(quantizer.status().message());
  };
  EXPECT_THAT(message({}), HasSubstr("no tokens"));
  EXPECT_THAT(message({{1, 2}, {159, 160}}),
              HasSubstr("sequence 1 has token 160, the model's vocabulary is 0 to 159"));
  EXPECT_THAT(message({{-1}}), HasSubstr("has token -1"));
  EXPECT_THAT(message({TokenSequence(257, 1)}),
              HasSubstr("sequence 0 has 257 tokens, the model takes 1 to 256"));
}

TEST(CalibratedQuantizer, RefusesTheWidthsOfTheMlpsThatTheModelHasAndNoOthers) {
  ThreadPool pool(1);
  const auto create = [&](const ModelConfig& config) {
    const SmallCheckpoint checkpoint(config);
    return CalibratedQuantizer::Create(config, checkpoint.get(), {{1, 2}},
                                       Encoder([](const MatrixRef&, const HostMatrix& source,
                                                  const Moments&) { return source; }),
                                       CalibrationOptions(), &pool)
        .status();
  };
  ModelConfig bad_dense = SmallMoeConfig();
  bad_dense.intermediate_size = 200;
  EXPECT_EQ(create(bad_dense).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(create(bad_dense).message()),
              HasSubstr("an MLP of width 200; it must be a multiple of 32"));
  ModelConfig bad_experts = SmallMoeConfig();
  bad_experts.moe_intermediate_size = 72;
  EXPECT_THAT(std::string(create(bad_experts).message()),
              HasSubstr("an MLP of width 72; it must be a multiple of 32"));

  ModelConfig no_dense = bad_dense;
  no_dense.moe_layer_start = 0;
  EXPECT_TRUE(create(no_dense).ok()) << create(no_dense);
  ModelConfig no_experts = bad_experts;
  no_experts.num_experts = 0;
  EXPECT_TRUE(create(no_experts).ok()) << create(no_experts);
}

}  // namespace
}  // namespace wintserve::quantizer
