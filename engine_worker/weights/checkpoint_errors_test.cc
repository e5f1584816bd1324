// A checkpoint broken one way at a time: every breakage is one error that says what is wrong where.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "engine_worker/weights/checkpoint.h"
#include "engine_worker/weights/checkpoint_writer.h"
#include "engine_worker/weights/layout.h"

namespace wintserve {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using testing::MakeTensors;
using ::testing::Not;
using testing::SmallConfig;
using testing::SmallWint2Config;
using testing::TempDir;
using testing::TestLayout;
using testing::TestTensors;

constexpr uint32_t kSeed = 7;

struct Breakage {
  const char* name;
  void (*apply)(TestTensors& tensors);
  std::vector<const char*> pieces;  // of the error
  bool is_quantized = true;
};

std::string ErrorOf(const std::filesystem::path& dir, const ModelConfig& config,
                    absl::StatusCode code = absl::StatusCode::kDataLoss) {
  const auto checkpoint = Checkpoint::Open(dir, config, KOrderChoice::kMma64);
  EXPECT_EQ(checkpoint.status().code(), code) << checkpoint.status();
  return std::string(checkpoint.status().message());
}

class BrokenCheckpoint : public ::testing::TestWithParam<Breakage> {};

TEST_P(BrokenCheckpoint, IsOneErrorThatNamesTensorFoundAndExpected) {
  const ModelConfig config = GetParam().is_quantized ? SmallWint2Config() : SmallConfig();
  const TestLayout layout =
      GetParam().is_quantized ? TestLayout::kPaddle : TestLayout::kHuggingFace;
  TestTensors tensors = MakeTensors(config, layout, kSeed);
  GetParam().apply(tensors);
  const TempDir dir;
  testing::WriteFile(dir.path() / "model.safetensors", testing::SafetensorsBytes(tensors));
  const std::string message = ErrorOf(dir.path(), config);
  EXPECT_THAT(message, HasSubstr(dir.path().string()));
  for (const char* piece : GetParam().pieces) EXPECT_THAT(message, HasSubstr(piece));
  EXPECT_THAT(message, Not(HasSubstr("\n")));
}

void Rename(TestTensors& tensors, const std::string& from, const std::string& to) {
  tensors[to] = tensors.at(from);
  tensors.erase(from);
}

INSTANTIATE_TEST_SUITE_P(
    All, BrokenCheckpoint,
    ::testing::Values(
        Breakage{"MissingNorm",
                 [](TestTensors& t) { t.erase("ernie.norm.weight"); },
                 {"tensor ernie.norm.weight: found none, expected BF16 or F16 or F32", "[128]"}},
        Breakage{
            "MissingScaleOfOneExpert",
            [](TestTensors& t) { t.erase("ernie.layers.2.mlp.experts.1.down_proj.super_scales"); },
            {"ernie.layers.2.mlp.experts.1.down_proj.super_scales: found none", "[128]"}},
        Breakage{"MissingHead",
                 [](TestTensors& t) { t.erase("lm_head.weight"); },
                 {"tensor lm_head.weight: found none", "[128, 96]"}},
        Breakage{"UnknownTensor",
                 [](TestTensors& t) {
                   t["ernie.layers.0.extra.weight"] = {"F32", {1}, {0, 0, 0, 0}};
                 },
                 {"model.safetensors: tensor ernie.layers.0.extra.weight: found F32 [1], expected "
                  "no tensor of this name"}},
        Breakage{"AnExpertTooMany",
                 [](TestTensors& t) {
                   t["ernie.layers.1.mlp.experts.2.down_proj.quant_weight"] =
                       t.at("ernie.layers.1.mlp.experts.1.down_proj.quant_weight");
                 },
                 {"experts.2.down_proj.quant_weight", "expected no tensor of this name"}},
        Breakage{"ALayerTooMany",
                 [](TestTensors& t) {
                   t["ernie.layers.3.input_layernorm.weight"] =
                       t.at("ernie.layers.2.input_layernorm.weight");
                 },
                 {"ernie.layers.3.input_layernorm.weight"}},
        Breakage{"MisshapenWint8",
                 [](TestTensors& t) {
                   t.at("ernie.layers.0.self_attn.qkv_proj.quant_weight").shape = {128, 384};
                 },
                 {"model.safetensors: tensor ernie.layers.0.self_attn.qkv_proj.quant_weight: found "
                  "I8 [128, 384], expected I8 or U8 [384, 128]"}},
        Breakage{"FlatWint2Codes",
                 [](TestTensors& t) {
                   t.at("ernie.layers.2.mlp.experts.0.down_proj.quant_weight").shape = {64 * 128};
                 },
                 {"found U8 [8192], expected I8 or U8 [64, 128]"}},
        Breakage{"Wint2LocalScaleAsFloats",
                 [](TestTensors& t) {
                   t.at("ernie.layers.2.mlp.experts.0.down_proj.weight_scale") =
                       t.at("ernie.layers.2.mlp.experts.0.down_proj.super_scales");
                 },
                 {"down_proj.weight_scale: found BF16 [128], expected I8 or U8 [2, 128]"}},
        Breakage{"CodeScaleInBf16",
                 [](TestTensors& t) {
                   auto& scale = t.at("ernie.layers.2.mlp.experts.0.down_proj.code_scale");
                   scale = testing::ConvertFloats(scale, "BF16");
                 },
                 {"down_proj.code_scale: found BF16 [128], expected F32 [128]"}},
        Breakage{"IntegerNorm",
                 [](TestTensors& t) {
                   t["ernie.norm.weight"] = {"I8", {128}, std::vector<uint8_t>(128)};
                 },
                 {"tensor ernie.norm.weight: found I8 [128]"}},
        Breakage{"RouterBiasOfTooManyExperts",
                 [](TestTensors& t) {
                   t.at("ernie.layers.1.mlp.moe_statics.e_score_correction_bias") = {
                       "F32", {1, 3}, std::vector<uint8_t>(12)};
                 },
                 {"e_score_correction_bias: found F32 [1, 3]", "[1, 2] or [2]"}},
        Breakage{"SeveralAtOnceAreCounted",
                 [](TestTensors& t) {
                   t.erase("ernie.layers.0.self_attn.o_proj.weight_scale");
                   t.erase("ernie.norm.weight");
                   t["surplus"] = {"U8", {0}, {}};
                 },
                 {"ernie.layers.0.self_attn.o_proj.weight_scale: found none", " (and 2 more)"}},
        Breakage{"ForeignNames",
                 [](TestTensors& t) {
                   t.clear();
                   t["transformer.wte.weight"] = {"F32", {1}, {0, 0, 0, 0}};
                 },
                 {"found 1 tensors but none named ernie.* or model.*"}},
        Breakage{"UnquantizedFilesOfAQuantizedConfiguration",
                 [](TestTensors& t) { t = MakeTensors(SmallConfig(), TestLayout::kPaddle, kSeed); },
                 {"tensor ernie.layers.0.self_attn.qkv_proj.quant_weight: found none", " more)"}},
        Breakage{
            "SeparateMatricesOfAQuantizedConfiguration",
            [](TestTensors& t) { t = MakeTensors(SmallConfig(), TestLayout::kHuggingFace, kSeed); },
            {"found separate q_proj or gate_proj", "expected the fused"}},
        Breakage{"SeparateUpIsMissing",
                 [](TestTensors& t) { t.erase("model.layers.1.mlp.experts.0.up_proj.weight"); },
                 {"model.layers.1.mlp.experts.0.up_proj.weight: found none", "[256, 128]"},
                 false},
        Breakage{"SeparateMatrixTransposed",
                 [](TestTensors& t) {
                   t.at("model.layers.0.mlp.down_proj.weight").shape = {192, 128};
                 },
                 {"found BF16 [192, 128], expected", "[128, 192]"},
                 false},
        Breakage{"TensorsForImages",
                 [](TestTensors& t) {
                   // As vision-language releases have them, beside twice as many experts.
                   for (const char* name :
                        {"vision_model.blocks.0.attn.qkv.weight", "vision_model.ln.bias",
                         "model.resampler_model.spatial_linear.0.weight",
                         "model.layers.1.mlp.gate.weight_1"}) {
                     t[name] = {"F32", {1}, {0, 0, 0, 0}};
                   }
                   t["model.layers.1.mlp.experts.2.up_proj.weight"] = {"F32", {1}, {0, 0, 0, 0}};
                 },
                 {"tensor model.layers.1.mlp.gate.weight_1: found 4 tensors for images, video or "
                  "sound, expected a model of text alone: vision-language models cannot be served",
                  "(and 1 more)"},
                 false},
        Breakage{"Misspelt",
                 [](TestTensors& t) {
                   Rename(t, "model.layers.1.mlp.gate.weight", "model.layers.1.mlp.gates.weight");
                 },
                 {"tensor model.layers.1.mlp.gate.weight: found none", "(and 1 more)"},
                 false}),
    [](const auto& info) { return info.param.name; });

TEST(CheckpointErrors, ScalesThatAreNotFiniteAreRefusedWhenLoaded) {
  const ModelConfig config = SmallWint2Config();
  struct Case {
    const char* tensor;
    std::vector<uint8_t> first_value;  // little-endian
    MatrixRef ref;
    const char* expected;
  };
  const Case cases[] = {
      {"ernie.layers.0.self_attn.o_proj.weight_scale",
       {0x80, 0x7F},
       {MatrixRole::kOutput, 0},
       "found inf at index 0"},
      {"ernie.layers.2.mlp.experts.0.down_proj.super_scales",
       {0xC0, 0x7F},
       {MatrixRole::kDown, 2, 0},
       "found nan at index 0"},
      {"ernie.layers.2.mlp.experts.0.down_proj.code_zp",
       {0, 0, 0x80, 0x7F},
       {MatrixRole::kDown, 2, 0},
       "found inf at index 0"},
      {"ernie.layers.2.mlp.experts.0.down_proj.code_scale",
       {0, 0, 0x80, 0x50},
       {MatrixRole::kDown, 2, 0},
       "expected codes within 2^30"},
  };
  for (const Case& broken : cases) {
    TestTensors tensors = MakeTensors(config, TestLayout::kPaddle, kSeed);
    auto& bytes = tensors.at(broken.tensor).bytes;
    std::copy(broken.first_value.begin(), broken.first_value.end(), bytes.begin());
    const TempDir dir;
    testing::WriteFile(dir.path() / "model.safetensors", testing::SafetensorsBytes(tensors));
    const auto checkpoint = Checkpoint::Open(dir.path(), config, KOrderChoice::kMma64);
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
    const auto matrix = (*checkpoint)->LoadMatrix(broken.ref, 0, 1);
    EXPECT_EQ(matrix.status().code(), absl::StatusCode::kDataLoss);
    const std::string message(matrix.status().message());
    EXPECT_THAT(message, HasSubstr(broken.tensor));
    EXPECT_THAT(message, HasSubstr(broken.expected));
  }
}

// Splits a model over two shards with an index, then breaks one of the three files.
class ShardedCheckpoint : public ::testing::Test {
 protected:
  void SetUp() override {
    int i = 0;
    for (auto& [name, tensor] : MakeTensors(config_, TestLayout::kPaddle, kSeed)) {
      const bool is_first = i++ % 2 == 0;
      (is_first ? first_ : second_)[name] = tensor;
      weight_map_[name] = is_first ? "a.safetensors" : "b.safetensors";
    }
  }
  std::filesystem::path Write() {
    testing::WriteFile(dir_.path() / "a.safetensors", testing::SafetensorsBytes(first_));
    testing::WriteFile(dir_.path() / "b.safetensors", testing::SafetensorsBytes(second_));
    WriteIndex(nlohmann::json{{"metadata", nullptr}, {"weight_map", weight_map_}}.dump());
    return dir_.path();
  }
  void WriteIndex(const std::string& text) {
    testing::WriteFile(dir_.path() / "model.safetensors.index.json", text);
  }

  const ModelConfig config_ = SmallConfig();
  const TempDir dir_;
  TestTensors first_, second_;
  nlohmann::json weight_map_;
};

TEST_F(ShardedCheckpoint, OpensWhenIndexAndShardsAgree) {
  EXPECT_TRUE(Checkpoint::Open(Write(), config_, KOrderChoice::kAuto).ok());
}

TEST_F(ShardedCheckpoint, AnIndexEntryThatItsShardLacksIsNamed) {
  second_.erase(weight_map_.begin().key());
  first_.erase(weight_map_.begin().key());
  const std::string message = ErrorOf(Write(), config_);
  EXPECT_THAT(message, HasSubstr("a.safetensors: tensor " + weight_map_.begin().key()));
  EXPECT_THAT(message, HasSubstr("found none, expected it here by"));
}

TEST_F(ShardedCheckpoint, AShardTensorOutsideTheIndexIsNamed) {
  first_["ernie.extra"] = {"U8", {1}, {0}};
  const std::string message = ErrorOf(Write(), config_);
  EXPECT_THAT(message, HasSubstr("a.safetensors: tensor ernie.extra: found here, expected none"));
}

TEST_F(ShardedCheckpoint, ATensorInTwoShardsIsNamed) {
  second_.insert(*first_.begin());
  EXPECT_THAT(ErrorOf(Write(), config_),
              HasSubstr("b.safetensors: tensor " + first_.begin()->first +
                        ": found here, expected it in a.safetensors"));
}

TEST_F(ShardedCheckpoint, FileNamesThatLeaveTheDirectoryAreRefused) {
  for (const char* file :
       {"../a.safetensors", "/etc/passwd", "sub/a.safetensors", "..", ".", "", "a\\b", "a\nb"}) {
    Write();
    nlohmann::json map = weight_map_;
    map.begin().value() = file;
    WriteIndex(nlohmann::json{{"weight_map", map}}.dump());
    const std::string message = ErrorOf(dir_.path(), config_);
    EXPECT_THAT(message, HasSubstr("expected a file name in this directory")) << file;
    EXPECT_THAT(message, HasSubstr("model.safetensors.index.json: tensor")) << file;
  }
}

TEST_F(ShardedCheckpoint, ANameThatMovesTheCursorIsShownEscaped) {
  Write();
  WriteIndex(R"({"weight_map": {"w\u001b[31m": "a.safetensors"}})");
  EXPECT_THAT(ErrorOf(dir_.path(), config_),
              HasSubstr(R"(index.json: tensor "w\u001b[31m": found a name of 6 bytes)"));
}

TEST_F(ShardedCheckpoint, AMissingShardIsNotFoundAndNamed) {
  std::filesystem::remove(Write() / "b.safetensors");
  EXPECT_THAT(ErrorOf(dir_.path(), config_, absl::StatusCode::kNotFound),
              HasSubstr("b.safetensors: no such file"));
}

TEST_F(ShardedCheckpoint, AMalformedIndexIsRefused) {
  for (const char* text : {"", "{", "[]", "{}", R"({"weight_map": []})"}) {
    Write();
    WriteIndex(text);
    EXPECT_THAT(ErrorOf(dir_.path(), config_), HasSubstr("model.safetensors.index.json: ")) << text;
  }
}

TEST_F(ShardedCheckpoint, ATruncatedShardIsNamedWithATensor) {
  Write();
  std::string bytes = testing::SafetensorsBytes(second_);
  testing::WriteFile(dir_.path() / "b.safetensors", bytes.substr(0, bytes.size() - 1));
  const std::string message = ErrorOf(dir_.path(), config_);
  EXPECT_THAT(message, HasSubstr("b.safetensors: tensor "));
  EXPECT_THAT(message, HasSubstr("truncated?"));
}

TEST(CheckpointErrors, ADirectoryWithoutAModelIsNotFound) {
  const TempDir dir;
  EXPECT_THAT(ErrorOf(dir.path() / "none", SmallConfig(), absl::StatusCode::kNotFound),
              HasSubstr("no such directory"));
  EXPECT_THAT(ErrorOf(dir.path(), SmallConfig(), absl::StatusCode::kNotFound),
              HasSubstr("neither model.safetensors nor model.safetensors.index.json"));
  testing::WriteFile(dir.path() / "model_state.pdparams", "");
  EXPECT_THAT(ErrorOf(dir.path(), SmallConfig(), absl::StatusCode::kNotFound),
              AllOf(HasSubstr("*.pdparams files are not supported"),
                    HasSubstr("take the safetensors release of the model")));
  std::filesystem::rename(dir.path() / "model_state.pdparams", dir.path() / "scheduler.pdparams");
  EXPECT_THAT(ErrorOf(dir.path(), SmallConfig(), absl::StatusCode::kNotFound),
              Not(HasSubstr("pdparams")));
}

TEST(CheckpointErrors, ADirectoryThatHoldsPartOfAModelSaysWhatIsThere) {
  const TempDir shards;
  testing::WriteFile(shards.path() / "model-00001-of-00002.safetensors", "");
  EXPECT_THAT(ErrorOf(shards.path(), SmallConfig(), absl::StatusCode::kNotFound),
              HasSubstr("is there, but model-00001-of-00002.safetensors: is the index missing?"));
  const TempDir rank;
  std::filesystem::create_directory(rank.path() / "rank1");
  EXPECT_THAT(ErrorOf(rank.path(), SmallConfig(), absl::StatusCode::kNotFound),
              HasSubstr("is there, but rank1: a model that is split for several ranks has rank0"));
}

TEST(CheckpointErrors, AModelThatIsALinkToNothingIsNamedWithItsTarget) {
  const TempDir dir;
  std::filesystem::create_symlink("../blobs/abc", dir.path() / "model.safetensors");
  EXPECT_THAT(ErrorOf(dir.path(), SmallConfig(), absl::StatusCode::kNotFound),
              HasSubstr("/model.safetensors: a link to ../blobs/abc, which is not there"));
}

TEST(CheckpointErrors, RankDirectoriesMustBeNumberedAndFitTheModel) {
  const TempDir gap;
  for (const char* rank : {"rank0", "rank2"})
    std::filesystem::create_directories(gap.path() / rank);
  EXPECT_THAT(ErrorOf(gap.path(), SmallConfig()),
              HasSubstr("found 2 directories named rank*, expected rank1"));
  const TempDir three;
  for (const char* rank : {"rank0", "rank1", "rank2"}) {
    std::filesystem::create_directories(three.path() / rank);
  }
  EXPECT_THAT(ErrorOf(three.path(), SmallConfig()),
              HasSubstr("found 3 directories named rank*, but tensor parallel size 3"));
}

TEST(CheckpointErrors, AnEmbeddingInTwoTypesIsRefusedWhenOpened) {
  const ModelConfig config = SmallConfig();
  TestTensors tensors = MakeTensors(ConfigOfShard(config, 2), TestLayout::kPaddle, kSeed);
  const TempDir dir;
  testing::WriteFile(dir.path() / "rank0/model.safetensors", testing::SafetensorsBytes(tensors));
  auto& embedding = tensors.at("ernie.embed_tokens.weight");
  embedding = testing::ConvertFloats(embedding, "F32");
  testing::WriteFile(dir.path() / "rank1/model.safetensors", testing::SafetensorsBytes(tensors));
  EXPECT_THAT(ErrorOf(dir.path(), config),
              HasSubstr("rank1/model.safetensors: tensor ernie.embed_tokens.weight: found F32, "
                        "expected BF16 as in "));
}

TEST(CheckpointErrors, APreShardedRankWithHalfANibblePairIsRefused) {
  // 256 rows over four ranks leave one 64-group, whose nibble would have no partner.
  ModelConfig config = SmallWint2Config();
  config.head_dim = 64;
  config.intermediate_size = 256;
  const ModelConfig local = ConfigOfShard(config, 4);
  const TempDir dir;
  for (int rank = 0; rank < 4; ++rank) {
    testing::WriteFile(
        dir.path() / ("rank" + std::to_string(rank)) / "model.safetensors",
        testing::SafetensorsBytes(MakeTensors(local, TestLayout::kPaddle, kSeed + rank)));
  }
  EXPECT_THAT(ErrorOf(dir.path(), config),
              HasSubstr("tensor ernie.layers.2.mlp.experts.0.down_proj: found a matrix of 64 x "
                        "128, expected multiples of 128 and 1"));
}

}  // namespace
}  // namespace wintserve
