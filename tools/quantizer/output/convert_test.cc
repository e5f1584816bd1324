// Small checkpoints to quantised ones and back.
#include "tools/quantizer/output/convert.h"

#include <fmt/format.h>

#include "tools/quantizer/output/output_test_util.h"

namespace wintserve::quantizer {
namespace {

using formats::DecodeToFloat;
using formats::HostMatrix;
using formats::KOrder;
using formats::WeightFormat;
using testing::FilesOf;
using ::testing::HasSubstr;
using testing::Job;
using testing::RunJob;
using testing::TempDir;
using testing::TestLayout;
using testing::TestTensors;
using testing::WriteModel;
using wintserve::testing::ConvertFloats;
using wintserve::testing::MakeTensors;
using wintserve::testing::SmallConfig;

constexpr uint32_t kSeed = 11;

std::string Show(const MatrixRef& ref) {
  return fmt::format("role {} layer {} expert {}", static_cast<int>(ref.role), ref.layer,
                     ref.expert);
}

// A model on disk and what a job has made of it.
class Converted {
 public:
  explicit Converted(const ModelConfig& config, const Job& job = {},
                     TestLayout layout = TestLayout::kHuggingFace)
      : job_(job) {
    WriteModel(dir_.path() / "model", config, MakeTensors(config, layout, kSeed));
    totals_ = RunJob(dir_.path() / "model", output(), job);
    EXPECT_TRUE(totals_.ok()) << totals_.status();
  }

  std::filesystem::path output() const { return dir_.path() / "out"; }
  const Totals& totals() const { return *totals_; }

  std::unique_ptr<Checkpoint> Open() const {
    auto config = LoadModelConfig(output());
    CHECK(config.ok(), "{}", config.status().ToString());
    const bool is_natural = job_.k_order == KOrder::kNatural;
    auto checkpoint = Checkpoint::Open(output(), *config,
                                       is_natural ? KOrderChoice::kNatural : KOrderChoice::kMma64);
    CHECK(checkpoint.ok(), "{}", checkpoint.status().ToString());
    return *std::move(checkpoint);
  }
  std::unique_ptr<Checkpoint> OpenSourceCheckpoint() const {
    return std::move(quantizer::OpenSource(dir_.path() / "model")->checkpoint);
  }

 private:
  const TempDir dir_;
  const Job job_;
  absl::StatusOr<Totals> totals_;
};

HostMatrix Load(const Checkpoint& checkpoint, const MatrixRef& ref, int rank = 0,
                int world_size = 1) {
  auto matrix = checkpoint.LoadMatrix(ref, rank, world_size);
  CHECK(matrix.ok(), "{}", matrix.status().ToString());
  return *std::move(matrix);
}

void ExpectSame(const HostMatrix& actual, const HostMatrix& expected) {
  EXPECT_EQ(actual.format, expected.format);
  EXPECT_EQ(actual.k, expected.k);
  EXPECT_EQ(actual.n, expected.n);
  EXPECT_EQ(actual.values_f32, expected.values_f32);
  EXPECT_EQ(actual.values_bf16, expected.values_bf16);
  EXPECT_EQ(actual.codes_i8, expected.codes_i8);
  EXPECT_EQ(actual.codes_u8, expected.codes_u8);
  EXPECT_EQ(actual.local_scale, expected.local_scale);
  EXPECT_EQ(actual.channel_scale, expected.channel_scale);
  EXPECT_EQ(actual.code_scale, expected.code_scale);
  EXPECT_EQ(actual.code_zp, expected.code_zp);
}

// What the encoder makes of a matrix of the source.
HostMatrix Encoded(const HostMatrix& source, WeightFormat format, KOrder k_order) {
  if (format == WeightFormat::kBfloat16 || format == WeightFormat::kFloat32) return source;
  kernels::cpu::ThreadPool pool(1);
  const std::vector<float> weights = DecodeToFloat(source);
  const FloatMatrix w{weights.data(), source.k, source.n};
  auto encoded = format == WeightFormat::kWint2
                     ? EncodeWint2(w, {}, Wint2Options{.k_order = k_order}, pool)
                     : EncodePerChannel(format, w, pool);
  CHECK(encoded.ok(), "{}", encoded.status().ToString());
  return *std::move(encoded);
}

struct SchemeCase {
  const char* name;
  Job job;
  // Of attention, the experts of layers 1 and 2, shared experts.
  WeightFormat dense, first, rest;
};

class EveryScheme : public ::testing::TestWithParam<SchemeCase> {};

TEST_P(EveryScheme, IsLoadedAsTheEncoderMadeIt) {
  const SchemeCase& c = GetParam();
  const ModelConfig config = SmallConfig();
  const Converted converted(config, c.job);
  const auto before = converted.OpenSourceCheckpoint();
  const auto after = converted.Open();
  for (const MatrixRef& ref : AllMatrices(config)) {
    SCOPED_TRACE(Show(ref));
    const bool is_expert = ref.expert >= 0;
    const bool is_unquantized = ref.role == MatrixRole::kEmbedding || ref.role == MatrixRole::kHead;
    const WeightFormat format = ref.role == MatrixRole::kRouter ? WeightFormat::kFloat32
                                : is_unquantized                ? WeightFormat::kBfloat16
                                : !is_expert                    ? c.dense
                                : ref.layer == 1                ? c.first
                                                                : c.rest;
    const HostMatrix loaded = Load(*after, ref);
    ASSERT_EQ(loaded.format, format);
    ExpectSame(loaded, Encoded(Load(*before, ref), format, c.job.k_order));
  }
  for (int layer = 0; layer < config.num_layers; ++layer) {
    EXPECT_EQ(*after->LoadVector(VectorRole::kInputNorm, layer),
              *before->LoadVector(VectorRole::kInputNorm, layer));
    EXPECT_EQ(*after->LoadVector(VectorRole::kPostAttentionNorm, layer),
              *before->LoadVector(VectorRole::kPostAttentionNorm, layer));
    if (layer == 0) continue;
    EXPECT_EQ(*after->LoadVector(VectorRole::kRouterBias, layer),
              *before->LoadVector(VectorRole::kRouterBias, layer));
  }
  EXPECT_EQ(*after->LoadVector(VectorRole::kFinalNorm, 0),
            *before->LoadVector(VectorRole::kFinalNorm, 0));
}

constexpr WeightFormat kBf16 = WeightFormat::kBfloat16;
constexpr WeightFormat kW8 = WeightFormat::kWint8;
constexpr WeightFormat kW4 = WeightFormat::kWint4;
constexpr WeightFormat kW2 = WeightFormat::kWint2;

INSTANTIATE_TEST_SUITE_P(
    All, EveryScheme,
    ::testing::Values(
        SchemeCase{"Wint2", {}, kW8, kW4, kW2},
        SchemeCase{"Wint2InNaturalOrder", {.k_order = KOrder::kNatural}, kW8, kW4, kW2},
        SchemeCase{"Wint2InEveryLayer", {.scheme = {.wint4_layers = 0}}, kW8, kW2, kW2},
        SchemeCase{"Wint2Alone",
                   {.scheme = {.plain_dense = true, .plain_first_experts = true}},
                   kBf16,
                   kBf16,
                   kW2},
        SchemeCase{"Wint4", {.scheme = {.scheme = Scheme::kWint4}}, kW8, kW4, kW4},
        SchemeCase{"Wint4Alone",
                   {.scheme = {.scheme = Scheme::kWint4, .plain_dense = true}},
                   kBf16,
                   kW4,
                   kW4},
        SchemeCase{"Wint8", {.scheme = {.scheme = Scheme::kWint8}}, kW8, kW8, kW8}),
    [](const auto& info) { return info.param.name; });

TEST(Convert, EveryLayoutAndNumberOfThreadsGivesTheSameBytes) {
  const ModelConfig config = SmallConfig();
  const auto expected = FilesOf(Converted(config, {.num_threads = 1}).output());
  EXPECT_GT(expected.size(), 3u) << "several files, index, configuration";
  for (const TestLayout layout :
       {TestLayout::kPaddle, TestLayout::kPaddleAsModel, TestLayout::kFusedOutIn}) {
    EXPECT_EQ(FilesOf(Converted(config, {.num_threads = 3}, layout).output()), expected);
  }
}

TEST(Convert, ATiedHeadAndRoutersWithoutBiasAreSaidInTheConfiguration) {
  ModelConfig config = SmallConfig();
  config.tie_word_embeddings = true;
  config.has_router_bias = false;
  const TempDir dir;
  TestTensors tensors = MakeTensors(config, TestLayout::kHuggingFace, kSeed);
  config.tie_word_embeddings_is_set = false;  // left to the tensors
  config.has_router_bias_is_set = false;
  WriteModel(dir.path() / "model", config, tensors);
  ASSERT_TRUE(RunJob(dir.path() / "model", dir.path() / "out", {.max_file_bytes = 1 << 30}).ok());
  const auto read = LoadModelConfig(dir.path() / "out");
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_TRUE(read->tie_word_embeddings_is_set && read->tie_word_embeddings);
  EXPECT_TRUE(read->has_router_bias_is_set && !read->has_router_bias);
  EXPECT_TRUE(Checkpoint::Open(dir.path() / "out", *read, KOrderChoice::kAuto).ok());
  EXPECT_FALSE(std::filesystem::exists(dir.path() / "out" / "model.safetensors.index.json"))
      << "one file needs none";
}

TEST(Convert, ADenseModelBecomesWint8) {
  ModelConfig config = SmallConfig();
  config.architecture = "Ernie4_5ForCausalLM";
  config.num_experts = 0;
  const Converted converted(config, {.scheme = {.scheme = Scheme::kWint8}});
  const auto before = converted.OpenSourceCheckpoint();
  const auto after = converted.Open();
  const MatrixRef ref = {MatrixRole::kDown, 2};
  ExpectSame(Load(*after, ref), Encoded(Load(*before, ref), kW8, KOrder::kMma64));
}

TEST(Convert, FloatsOfAnotherTypeAreRoundedToBfloat16) {
  const ModelConfig config = SmallConfig();
  const TempDir dir;
  TestTensors tensors = MakeTensors(config, TestLayout::kHuggingFace, kSeed);
  for (auto& [name, tensor] : tensors) tensor = ConvertFloats(tensor, "F32");
  WriteModel(dir.path() / "model", config, tensors);
  ASSERT_TRUE(RunJob(dir.path() / "model", dir.path() / "out", {}).ok());
  EXPECT_EQ(FilesOf(dir.path() / "out"), FilesOf(Converted(config).output()))
      << "the values are bf16 anyway";
}

// Rows [first_row, first_row + num_rows) of columns [first, first + num_columns), as decoded.
std::vector<float> Part(const HostMatrix& matrix, int64_t first_row, int64_t num_rows,
                        int64_t first_column, int64_t num_columns) {
  const std::vector<float> all = DecodeToFloat(matrix);
  std::vector<float> part;
  for (int64_t row = first_row; row < first_row + num_rows; ++row) {
    const auto begin = all.begin() + row * matrix.n + first_column;
    part.insert(part.end(), begin, begin + num_columns);
  }
  return part;
}

TEST(Convert, RanksTakeSlicesOfWhatOneRankHas) {
  const ModelConfig config = SmallConfig();
  for (const KOrder k_order : {KOrder::kMma64, KOrder::kNatural}) {
    const Converted converted(config, {.k_order = k_order});
    const auto checkpoint = converted.Open();
    const int64_t width = config.moe_intermediate_size;
    for (const int world_size : {2, 4}) {  // of 4 each has one 64-group of down_proj
      for (int rank = 0; rank < world_size; ++rank) {
        SCOPED_TRACE(fmt::format("rank {} of {}", rank, world_size));
        for (const int layer : {1, 2}) {
          const MatrixRef down = {MatrixRole::kDown, layer, 1};
          const int64_t rows = width / world_size;
          EXPECT_EQ(DecodeToFloat(Load(*checkpoint, down, rank, world_size)),
                    Part(Load(*checkpoint, down), rank * rows, rows, 0, config.hidden_size));
          const MatrixRef gate_up = {MatrixRole::kGateUp, layer, 0};
          const HostMatrix whole = Load(*checkpoint, gate_up);
          const HostMatrix slice = Load(*checkpoint, gate_up, rank, world_size);
          EXPECT_EQ(Part(slice, 0, config.hidden_size, 0, rows),
                    Part(whole, 0, config.hidden_size, rank * rows, rows));
          EXPECT_EQ(Part(slice, 0, config.hidden_size, rows, rows),
                    Part(whole, 0, config.hidden_size, width + rank * rows, rows));
        }
      }
    }
  }
}

TEST(Convert, MultiTokenPredictionIsCountedAndLeftOut) {
  const ModelConfig config = SmallConfig();
  const TempDir dir;
  TestTensors tensors = MakeTensors(config, TestLayout::kHuggingFace, kSeed);
  const auto norm = tensors.at("model.norm.weight");
  tensors["model.mtp_hidden_norm.0.weight"] = norm;
  tensors["model.mtp_block.0.input_layernorm.weight"] = norm;
  WriteModel(dir.path() / "model", config, tensors);
  const auto source = OpenSource(dir.path() / "model");
  ASSERT_TRUE(source.ok()) << source.status();
  ASSERT_EQ(source->skipped.counts.size(), 1u);
  EXPECT_EQ(source->skipped.counts[0].reason, SkipReason::kMultiTokenPrediction);
  EXPECT_EQ(source->skipped.counts[0].num_tensors, 2);
  ASSERT_TRUE(RunJob(dir.path() / "model", dir.path() / "out", {}).ok());
  EXPECT_EQ(FilesOf(dir.path() / "out"), FilesOf(Converted(config).output()));
}

TEST(Convert, TokenizerAndGenerationSettingsComeAlongAndOldWeightsDoNot) {
  const TempDir dir;
  const ModelConfig config = SmallConfig();
  WriteModel(dir.path() / "model", config, MakeTensors(config, TestLayout::kHuggingFace, kSeed));
  const std::vector<std::string> companions = {"tokenizer.model",
                                               "tokenizer_config.json",
                                               "generation_config.json",
                                               "added_tokens.json",
                                               "special_tokens_map.json",
                                               "tokenization_ernie4_5.py",
                                               "LICENSE"};
  for (const std::string& name : companions) {
    wintserve::testing::WriteFile(dir.path() / "model" / name, "of " + name);
  }
  wintserve::testing::WriteFile(dir.path() / "model" / "pytorch_model.bin", "weights");
  ASSERT_TRUE(RunJob(dir.path() / "model", dir.path() / "out", {.max_file_bytes = 1 << 30}).ok());
  std::map<std::string, std::string> files = FilesOf(dir.path() / "out");
  for (const std::string& name : companions) EXPECT_EQ(files[name], "of " + name);
  files.erase("config.json");
  files.erase("model.safetensors");
  EXPECT_EQ(files.size(), companions.size());
}

TEST(Convert, TotalsSayWhatWasMadeAndHowGoodItIs) {
  const ModelConfig config = SmallConfig();
  const Converted converted(config);
  const auto before = converted.OpenSourceCheckpoint();
  const auto after = converted.Open();
  double error = 0, norm = 0;
  for (int expert = 0; expert < config.num_experts; ++expert) {
    for (const MatrixRole role : {MatrixRole::kGateUp, MatrixRole::kDown}) {
      const std::vector<float> w = DecodeToFloat(Load(*before, {role, 2, expert}));
      const std::vector<float> q = DecodeToFloat(Load(*after, {role, 2, expert}));
      for (size_t i = 0; i < w.size(); ++i) {
        error += (double{w[i]} - q[i]) * (double{w[i]} - q[i]);
        norm += double{w[i]} * w[i];
      }
    }
  }
  const KindTotals& wint2 = converted.totals().kinds.at("wint2 experts");
  EXPECT_EQ(wint2.num_matrices, 4);
  EXPECT_EQ(wint2.num_weights, 2 * 3 * 128 * 256);
  // 2 bits and 4 / 64 a weight, and 80 a column.
  const double bits = 2 + 4.0 / 64 + 80.0 * (512 + 128) / (3 * 128 * 256);
  EXPECT_DOUBLE_EQ(wint2.bits_per_weight(), bits);
  // Sums of 200,000 doubles, in another order.
  EXPECT_NEAR(wint2.error.nmse(), error / norm, 1e-12);
  EXPECT_EQ(converted.totals().kinds.at("bf16 head").error.error, 0);
  EXPECT_THAT(TotalsTable(converted.totals()), HasSubstr("wint4 experts"));
}

TEST(Convert, AWeightThatIsNotFiniteIsNamedWithItsMatrix) {
  const ModelConfig config = SmallConfig();
  const TempDir dir;
  TestTensors tensors = MakeTensors(config, TestLayout::kHuggingFace, kSeed);
  auto& bytes = tensors.at("model.layers.2.mlp.experts.1.down_proj.weight").bytes;
  bytes[2 * 5] = 0xC0;  // a NaN
  bytes[2 * 5 + 1] = 0x7F;
  WriteModel(dir.path() / "model", config, tensors);
  const auto result = RunJob(dir.path() / "model", dir.path() / "out", {});
  EXPECT_EQ(result.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(result.status().message()),
              HasSubstr("ernie.layers.2.mlp.experts.1.down_proj: "));
}

TEST(Convert, ASourceThatIsQuantisedIsRefused) {
  const TempDir dir;
  const auto result = RunJob("models/poet", dir.path() / "out", {});
  EXPECT_EQ(result.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(std::string(result.status().message()),
            "models/poet: is quantised already, to wint2; allowed: a checkpoint in bfloat16, "
            "float16 or float32");
}

}  // namespace
}  // namespace wintserve::quantizer
