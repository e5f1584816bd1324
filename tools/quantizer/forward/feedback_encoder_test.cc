#include "tools/quantizer/forward/feedback_encoder.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "tools/quantizer/forward/calibration_test_util.h"

namespace wintserve::quantizer {
namespace {

using formats::HostMatrix;
using formats::WeightFormat;
using kernels::cpu::ThreadPool;

FeedbackEncoderOptions QuickOptions() {
  FeedbackEncoderOptions options;
  options.feedback.num_sweeps = 1;
  options.feedback.maps = DefaultCodeMaps().first(1);
  return options;
}

struct Made {
  std::vector<HostMatrix> matrices;
  std::vector<LayerDrift> drift;
};

Made Quantize(const SmallCheckpoint& checkpoint, const std::vector<TokenSequence>& sequences,
              const FeedbackEncoderOptions& options, ThreadPool* pool) {
  const ModelConfig formats = SmallQuantizedConfig();
  auto quantizer = CalibratedQuantizer::Create(checkpoint.config(), checkpoint.get(), sequences,
                                               std::make_unique<FeedbackEncoder>(options, pool),
                                               CalibrationOptions(), pool);
  CHECK(quantizer.ok(), "{}", quantizer.status().ToString());
  Made made;
  for (const MatrixRef& ref : checkpoint.refs()) {
    auto matrix = (*quantizer)->Next(ref, FormatOf(formats, ref));
    CHECK(matrix.ok(), "{}: {}", MatrixPlace(ref), matrix.status().ToString());
    made.matrices.push_back(*std::move(matrix));
  }
  made.drift = (*quantizer)->drift();
  return made;
}

std::vector<HostMatrix> Round(const SmallCheckpoint& checkpoint, ThreadPool* pool) {
  FeedbackEncoder encoder(QuickOptions(), pool);
  std::vector<HostMatrix> matrices;
  for (const MatrixRef& ref : checkpoint.refs()) {
    auto matrix = encoder.Encode(ref, FormatOf(SmallQuantizedConfig(), ref),
                                 *checkpoint.get().LoadMatrix(ref, 0, 1), nullptr);
    CHECK(matrix.ok(), "{}", matrix.status().ToString());
    matrices.push_back(*std::move(matrix));
  }
  return matrices;
}

// Relative error of the last layer's output for these tokens.
double ErrorOf(const SmallCheckpoint& checkpoint, const std::vector<HostMatrix>& matrices,
               const std::vector<TokenSequence>& sequences, ThreadPool* pool) {
  auto quantizer = CalibratedQuantizer::Create(
      checkpoint.config(), checkpoint.get(), sequences,
      std::make_unique<FeedbackEncoder>(QuickOptions(), pool), CalibrationOptions(), pool);
  CHECK(quantizer.ok(), "{}", quantizer.status().ToString());
  const std::vector<MatrixRef> refs = checkpoint.refs();
  for (size_t i = 0; i < refs.size(); ++i) {
    const absl::Status status = (*quantizer)->Replay(refs[i], matrices[i]);
    CHECK(status.ok(), "{}", status.ToString());
  }
  return (*quantizer)->drift().back().relative_error;
}

class FeedbackEncoderTest : public ::testing::Test {
 protected:
  FeedbackEncoderTest() : checkpoint_(SmallMoeConfig()), pool_(2) {}

  std::vector<TokenSequence> Sequences(int count, uint32_t seed) const {
    return RandomSequences(checkpoint_.config(), count, 100, seed);
  }

  const SmallCheckpoint checkpoint_;
  ThreadPool pool_;
};

TEST_F(FeedbackEncoderTest, CalibratedModelsAreNearerOnTokensThatTheyWereNotCalibratedOn) {
  const Made calibrated = Quantize(checkpoint_, Sequences(80, 1), QuickOptions(), &pool_);
  const std::vector<TokenSequence> others = Sequences(20, 2);
  const double error = ErrorOf(checkpoint_, calibrated.matrices, others, &pool_);
  const double rounded = ErrorOf(checkpoint_, Round(checkpoint_, &pool_), others, &pool_);
  EXPECT_LT(error, rounded);
  EXPECT_GT(error, 0);
  EXPECT_EQ(std::ssize(calibrated.drift), checkpoint_.config().num_layers);
  RecordProperty("relative_error", std::to_string(error));
  RecordProperty("relative_error_of_rounding", std::to_string(rounded));
}

TEST_F(FeedbackEncoderTest, MatricesComeInTheFormatsThatWereAskedFor) {
  FeedbackEncoderOptions options = QuickOptions();
  options.max_inputs = 128;  // rounds the matrices of width 256
  const Made made = Quantize(checkpoint_, Sequences(10, 1), options, &pool_);
  const std::vector<HostMatrix> rounded = Round(checkpoint_, &pool_);
  const std::vector<MatrixRef> refs = checkpoint_.refs();
  for (size_t i = 0; i < refs.size(); ++i) {
    SCOPED_TRACE(MatrixPlace(refs[i]));
    const auto quantized = QuantizedFormat(FormatOf(SmallQuantizedConfig(), refs[i]));
    const bool is_router = refs[i].role == MatrixRole::kRouter;
    EXPECT_EQ(made.matrices[i].format,
              quantized.value_or(is_router ? WeightFormat::kFloat32 : WeightFormat::kBfloat16));
    EXPECT_EQ(made.matrices[i].k, rounded[i].k);
    EXPECT_EQ(made.matrices[i].n, rounded[i].n);
    const bool is_rounded = made.matrices[i].codes_i8 == rounded[i].codes_i8 &&
                            made.matrices[i].codes_u8 == rounded[i].codes_u8;
    if (quantized.has_value()) {
      EXPECT_EQ(is_rounded, made.matrices[i].k > options.max_inputs);
    }
  }
}

TEST_F(FeedbackEncoderTest, EachPartCanBeSwitchedOff) {
  const auto router = [](const std::vector<MatrixRef>& refs, const Made& made) {
    const auto found = std::find_if(refs.begin(), refs.end(), [](const MatrixRef& ref) {
      return ref.role == MatrixRole::kRouter && ref.layer == 2;
    });
    return made.matrices[found - refs.begin()].values_f32;
  };
  const std::vector<MatrixRef> refs = checkpoint_.refs();
  const std::vector<TokenSequence> sequences = Sequences(20, 1);
  const Made all = Quantize(checkpoint_, sequences, QuickOptions(), &pool_);

  FeedbackEncoderOptions options = QuickOptions();
  options.resolve_router = false;
  const std::vector<float> source =
      checkpoint_.get().LoadMatrix({MatrixRole::kRouter, 2}, 0, 1)->values_f32;
  EXPECT_EQ(router(refs, Quantize(checkpoint_, sequences, options, &pool_)), source);
  EXPECT_NE(router(refs, all), source);

  options = QuickOptions();
  options.repair_residual = false;
  const Made unrepaired = Quantize(checkpoint_, sequences, options, &pool_);
  options.asymmetric = false;
  const Made symmetric = Quantize(checkpoint_, sequences, options, &pool_);
  options.repair_residual = true;
  const Made repaired = Quantize(checkpoint_, sequences, options, &pool_);
  // qkv of the first layer has the same inputs in both models; its output matrix has not.
  ASSERT_EQ(refs[1].role, MatrixRole::kQkv);
  ASSERT_EQ(refs[2].role, MatrixRole::kOutput);
  EXPECT_EQ(unrepaired.matrices[1].codes_i8, symmetric.matrices[1].codes_i8);
  EXPECT_NE(unrepaired.matrices[2].codes_i8, symmetric.matrices[2].codes_i8);
  // Nothing has been lost before the first matrix that adds to the residual, but by then.
  EXPECT_EQ(symmetric.matrices[2].codes_i8, repaired.matrices[2].codes_i8);
  ASSERT_EQ(refs[4].role, MatrixRole::kDown);
  EXPECT_NE(symmetric.matrices[4].codes_i8, repaired.matrices[4].codes_i8);
}

}  // namespace
}  // namespace wintserve::quantizer
