// Opening and slicing small checkpoints of every layout, and the built-in demo model.
#include "engine_worker/weights/checkpoint.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>

#include "common/check.h"
#include "engine_worker/weights/checkpoint_writer.h"
#include "engine_worker/weights/layout.h"

namespace wintserve {
namespace {

using formats::DecodeToFloat;
using formats::HostMatrix;
using formats::KOrder;
using testing::MakeTensors;
using testing::SmallConfig;
using testing::SmallWint2Config;
using testing::TempDir;
using testing::TestLayout;
using testing::TestTensors;

constexpr uint32_t kSeed = 7;

std::unique_ptr<Checkpoint> OpenOrDie(const std::filesystem::path& dir, const ModelConfig& config,
                                      KOrderChoice k_order = KOrderChoice::kMma64) {
  auto checkpoint = Checkpoint::Open(dir, config, k_order);
  CHECK(checkpoint.ok(), "{}", checkpoint.status().ToString());
  return *std::move(checkpoint);
}

// The files may go once they are mapped.
std::unique_ptr<Checkpoint> WriteAndOpen(const TestTensors& tensors, const ModelConfig& config,
                                         KOrderChoice k_order = KOrderChoice::kMma64) {
  const TempDir dir;
  testing::WriteFile(dir.path() / "model.safetensors", testing::SafetensorsBytes(tensors));
  return OpenOrDie(dir.path(), config, k_order);
}

HostMatrix Load(const Checkpoint& checkpoint, const MatrixRef& ref, int rank = 0,
                int world_size = 1) {
  auto matrix = checkpoint.LoadMatrix(ref, rank, world_size);
  CHECK(matrix.ok(), "{}", matrix.status().ToString());
  return *std::move(matrix);
}

std::string Show(const MatrixRef& ref) {
  return fmt::format("role {} layer {} expert {}", static_cast<int>(ref.role), ref.layer,
                     ref.expert);
}

TEST(Checkpoint, EveryLayoutOfTheSameModelHoldsTheSameMatrices) {
  const ModelConfig config = SmallConfig();
  const auto paddle = WriteAndOpen(MakeTensors(config, TestLayout::kPaddle, kSeed), config);
  for (const TestLayout layout :
       {TestLayout::kPaddleAsModel, TestLayout::kHuggingFace, TestLayout::kFusedOutIn}) {
    const auto other = WriteAndOpen(MakeTensors(config, layout, kSeed), config);
    for (const MatrixRef& ref : AllMatrices(config)) {
      EXPECT_EQ(DecodeToFloat(Load(*other, ref)), DecodeToFloat(Load(*paddle, ref)))
          << Show(ref) << " layout " << static_cast<int>(layout);
    }
    EXPECT_EQ(*other->LoadVector(VectorRole::kPostAttentionNorm, 1),
              *paddle->LoadVector(VectorRole::kPostAttentionNorm, 1));
  }
}

testing::TestTensor Transposed(const testing::TestTensor& tensor) {
  const int64_t rows = tensor.shape[0], columns = tensor.shape[1];
  const int64_t element = static_cast<int64_t>(tensor.bytes.size()) / (rows * columns);
  testing::TestTensor transposed = {tensor.type, {columns, rows}, tensor.bytes};
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      std::copy_n(tensor.bytes.begin() + (row * columns + column) * element, element,
                  transposed.bytes.begin() + (column * rows + row) * element);
    }
  }
  return transposed;
}

// Of a small model as one of the releases has it, under the other prefix or with its matrices or
// its routers turned.
TestTensors Mixed(TestLayout layout, bool renamed, bool turned, bool router_turned) {
  TestTensors mixed;
  for (const auto& [name, tensor] : MakeTensors(SmallConfig(), layout, kSeed)) {
    const bool is_router = name.ends_with(".mlp.gate.weight");
    const bool is_matrix = name.ends_with("_proj.weight");
    std::string other = name;
    if (renamed && name.starts_with("model.")) other = "ernie." + name.substr(6);
    mixed[other] =
        (is_router && router_turned) || (is_matrix && turned) ? Transposed(tensor) : tensor;
  }
  return mixed;
}

TEST(Checkpoint, AnyMixtureOfPrefixFusionAndOrientationHoldsTheSameMatrices) {
  const ModelConfig config = SmallConfig();
  const auto paddle = WriteAndOpen(MakeTensors(config, TestLayout::kPaddle, kSeed), config);
  for (const TestLayout layout : {TestLayout::kHuggingFace, TestLayout::kFusedOutIn}) {
    for (int mixture = 0; mixture < 8; ++mixture) {
      const auto other = WriteAndOpen(
          Mixed(layout, (mixture & 1) != 0, (mixture & 2) != 0, (mixture & 4) != 0), config);
      for (const MatrixRef& ref : AllMatrices(config)) {
        EXPECT_EQ(DecodeToFloat(Load(*other, ref)), DecodeToFloat(Load(*paddle, ref)))
            << Show(ref) << " layout " << static_cast<int>(layout) << " mixture " << mixture;
      }
    }
  }
}

TEST(Checkpoint, FusedQkvIsQueriesThenKeysThenValuesAndGateComesBeforeUp) {
  const ModelConfig config = SmallConfig();
  const TestTensors tensors = MakeTensors(config, TestLayout::kHuggingFace, kSeed);
  const auto checkpoint = WriteAndOpen(tensors, config);
  const auto column = [&](const std::string& name, int64_t row_of_tensor) {
    const auto& tensor = tensors.at(name);
    std::vector<uint16_t> bits(config.hidden_size);
    std::memcpy(bits.data(), tensor.bytes.data() + row_of_tensor * bits.size() * 2,
                bits.size() * 2);
    return bits;
  };
  const auto expect_column = [&](const MatrixRef& ref, int64_t n, std::vector<uint16_t> bits) {
    const HostMatrix matrix = Load(*checkpoint, ref);
    ASSERT_EQ(matrix.format, formats::WeightFormat::kBfloat16);
    for (int64_t k = 0; k < matrix.k; ++k) {
      ASSERT_EQ(matrix.values_bf16[k * matrix.n + n], bits[k]) << Show(ref);
    }
  };
  const std::string layer = "model.layers.1.";
  const int64_t q = config.num_heads * config.head_dim, kv = config.num_kv_heads * config.head_dim;
  expect_column({MatrixRole::kQkv, 1}, 5, column(layer + "self_attn.q_proj.weight", 5));
  expect_column({MatrixRole::kQkv, 1}, q + 7, column(layer + "self_attn.k_proj.weight", 7));
  expect_column({MatrixRole::kQkv, 1}, q + kv + 9, column(layer + "self_attn.v_proj.weight", 9));
  const std::string expert = layer + "mlp.experts.1.";
  expect_column({MatrixRole::kGateUp, 1, 1}, 3, column(expert + "gate_proj.weight", 3));
  expect_column({MatrixRole::kGateUp, 1, 1}, 256 + 4, column(expert + "up_proj.weight", 4));
}

// Columns of the whole matrix that a rank holds, written from the splitting rules.
std::vector<int64_t> ColumnsOfRank(const MatrixRef& ref, const ModelConfig& config, int64_t n,
                                   int rank, int world_size) {
  std::vector<int64_t> columns;
  const auto add = [&](int64_t begin, int64_t count) {
    for (int64_t i = 0; i < count; ++i) columns.push_back(begin + i);
  };
  const int64_t head_dim = config.head_dim;
  switch (ref.role) {
    case MatrixRole::kQkv: {
      const int64_t heads = config.num_heads / world_size;
      const int64_t kv_heads = std::max(1, config.num_kv_heads / world_size);
      const int64_t first_kv = rank * config.num_kv_heads / world_size;
      add(rank * heads * head_dim, heads * head_dim);
      add((config.num_heads + first_kv) * head_dim, kv_heads * head_dim);
      add((config.num_heads + config.num_kv_heads + first_kv) * head_dim, kv_heads * head_dim);
      break;
    }
    case MatrixRole::kGateUp:
      add(rank * (n / 2 / world_size), n / 2 / world_size);
      add(n / 2 + rank * (n / 2 / world_size), n / 2 / world_size);
      break;
    case MatrixRole::kHead:
      add(rank * (n / world_size), n / world_size);
      break;
    default:
      add(0, n);
  }
  return columns;
}

struct SlicedModel {
  const char* name;
  ModelConfig (*config)();
  TestLayout layout;
};

class TensorParallelSlices : public ::testing::TestWithParam<SlicedModel> {};

TEST_P(TensorParallelSlices, OfAllRanksAreTheWholeMatrix) {
  const ModelConfig config = GetParam().config();
  const auto checkpoint = WriteAndOpen(MakeTensors(config, GetParam().layout, kSeed), config);
  for (const MatrixRef& ref : AllMatrices(config)) {
    const HostMatrix whole = Load(*checkpoint, ref);
    const std::vector<float> weights = DecodeToFloat(whole);
    for (const int world_size : {2, 4}) {
      const bool splits_rows = ref.role == MatrixRole::kOutput || ref.role == MatrixRole::kDown;
      const int64_t rows = splits_rows ? whole.k / world_size : whole.k;
      for (int rank = 0; rank < world_size; ++rank) {
        SCOPED_TRACE(fmt::format("{} rank {} of {}", Show(ref), rank, world_size));
        const HostMatrix part = Load(*checkpoint, ref, rank, world_size);
        const auto columns = ColumnsOfRank(ref, config, whole.n, rank, world_size);
        ASSERT_EQ(part.format, whole.format);
        ASSERT_EQ(part.k, rows);
        ASSERT_EQ(part.n, static_cast<int64_t>(columns.size()));
        const std::vector<float> decoded = DecodeToFloat(part);
        const int64_t first_row = splits_rows ? rank * rows : 0;
        for (int64_t k = 0; k < part.k; ++k) {
          for (int64_t n = 0; n < part.n; ++n) {
            ASSERT_EQ(decoded[k * part.n + n], weights[(first_row + k) * whole.n + columns[n]])
                << "k=" << k << " n=" << n;
          }
        }
      }
    }
  }
}

ModelConfig WithExperts(ExpertQuantization quantization) {
  ModelConfig config = SmallWint2Config();
  config.expert_quantization = quantization;
  return config;
}

INSTANTIATE_TEST_SUITE_P(
    All, TensorParallelSlices,
    ::testing::Values(SlicedModel{"PlainPaddle", SmallConfig, TestLayout::kPaddle},
                      SlicedModel{"PlainHuggingFace", SmallConfig, TestLayout::kHuggingFace},
                      SlicedModel{"PlainFusedOutIn", SmallConfig, TestLayout::kFusedOutIn},
                      SlicedModel{"Wint2", SmallWint2Config, TestLayout::kPaddle},
                      SlicedModel{"Wint4", [] { return WithExperts(ExpertQuantization::kWint4); },
                                  TestLayout::kPaddle},
                      SlicedModel{"Wint8", [] { return WithExperts(ExpertQuantization::kWint8); },
                                  TestLayout::kPaddleAsModel}),
    [](const auto& info) { return info.param.name; });

TEST(Checkpoint, AWorldSizeThatDoesNotSplitTheModelIsRefused) {
  const ModelConfig config = SmallConfig();
  const auto checkpoint = WriteAndOpen(MakeTensors(config, TestLayout::kPaddle, kSeed), config);
  const auto matrix = checkpoint->LoadMatrix({MatrixRole::kQkv, 0}, 0, 3);
  EXPECT_EQ(matrix.status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(Checkpoint, OtherFloatTypesLoadAsTheSameValues) {
  const ModelConfig config = SmallConfig();
  const TestTensors tensors = MakeTensors(config, TestLayout::kHuggingFace, kSeed);
  const auto original = WriteAndOpen(tensors, config);
  for (const char* type : {"F16", "F32", "F64"}) {
    TestTensors converted = tensors;
    for (auto& [name, tensor] : converted) {
      if (tensor.type == "BF16") tensor = testing::ConvertFloats(tensor, type);
    }
    const auto other = WriteAndOpen(converted, config);
    for (const MatrixRef& ref : AllMatrices(config)) {
      const HostMatrix matrix = Load(*other, ref);
      EXPECT_EQ(matrix.format, formats::WeightFormat::kFloat32);
      // Half is exact but for its subnormals, which are 2^-24 apart.
      const std::vector<float> expected = DecodeToFloat(Load(*original, ref));
      ASSERT_EQ(matrix.values_f32.size(), expected.size());
      for (size_t i = 0; i < expected.size(); ++i) {
        ASSERT_NEAR(matrix.values_f32[i], expected[i], 0x1p-24f) << Show(ref) << " " << type;
      }
    }
    EXPECT_EQ(other->LoadVector(VectorRole::kFinalNorm, 0)->size(), 128u);
  }
}

TEST(Checkpoint, TheRouterIsFloat32WhateverStoresItAndTheBiasIsFlat) {
  const ModelConfig config = SmallConfig();
  TestTensors tensors = MakeTensors(config, TestLayout::kPaddle, kSeed);
  auto& gate = tensors.at("ernie.layers.1.mlp.gate.weight");
  gate = testing::ConvertFloats(gate, "BF16");
  auto& bias = tensors.at("ernie.layers.1.mlp.moe_statics.e_score_correction_bias");
  bias.shape = {config.num_experts};
  const auto checkpoint = WriteAndOpen(tensors, config);
  for (const int layer : {1, 2}) {
    EXPECT_EQ(Load(*checkpoint, {MatrixRole::kRouter, layer}).format,
              formats::WeightFormat::kFloat32);
    EXPECT_EQ(checkpoint->LoadVector(VectorRole::kRouterBias, layer)->size(), 2u);
  }
}

TEST(Checkpoint, SignedBytesAndHalfScalesOfWint2AreReadAsTheyAreMeant) {
  const ModelConfig config = SmallWint2Config();
  TestTensors tensors = MakeTensors(config, TestLayout::kPaddle, kSeed);
  const auto original = WriteAndOpen(tensors, config);
  for (auto& [name, tensor] : tensors) {
    if (tensor.type == "U8") tensor.type = "I8";
    if (name.ends_with(".super_scales")) tensor = testing::ConvertFloats(tensor, "F16");
  }
  const auto other = WriteAndOpen(tensors, config);
  const MatrixRef ref = {MatrixRole::kDown, 2, 1};
  EXPECT_EQ(DecodeToFloat(Load(*other, ref)), DecodeToFloat(Load(*original, ref)));
}

TEST(Checkpoint, ATiedHeadIsTheEmbeddingTransposed) {
  ModelConfig config = SmallConfig();
  config.tie_word_embeddings = true;
  const auto checkpoint =
      WriteAndOpen(MakeTensors(config, TestLayout::kHuggingFace, kSeed), config);
  EXPECT_TRUE(checkpoint->head_is_tied());
  const HostMatrix embedding = Load(*checkpoint, {MatrixRole::kEmbedding});
  const HostMatrix head = Load(*checkpoint, {MatrixRole::kHead}, 1, 2);
  ASSERT_EQ(head.k, config.hidden_size);
  ASSERT_EQ(head.n, config.vocab_size / 2);
  for (int64_t k = 0; k < head.k; ++k) {
    for (int64_t n = 0; n < head.n; ++n) {
      ASSERT_EQ(head.values_bf16[k * head.n + n],
                embedding.values_bf16[(head.n + n) * embedding.n + k]);
    }
  }
}

TEST(Checkpoint, TheTieIsDecidedByTheHeadTensorWhereTheConfigurationIsSilent) {
  ModelConfig config = SmallConfig();
  const TestTensors untied = MakeTensors(config, TestLayout::kPaddle, kSeed);
  config.tie_word_embeddings_is_set = false;
  EXPECT_FALSE(WriteAndOpen(untied, config)->head_is_tied());
  TestTensors tied = untied;
  tied.erase("lm_head.weight");
  EXPECT_TRUE(WriteAndOpen(tied, config)->head_is_tied());
}

TEST(Checkpoint, TheRouterHasABiasIfItsTensorsAreThereWhereTheConfigurationIsSilent) {
  ModelConfig config = SmallConfig();
  TestTensors tensors = MakeTensors(config, TestLayout::kHuggingFace, kSeed);
  EXPECT_TRUE(WriteAndOpen(tensors, config)->has_router_bias());
  config.has_router_bias = false;
  config.has_router_bias_is_set = false;
  const auto with_bias = WriteAndOpen(tensors, config);
  EXPECT_TRUE(with_bias->has_router_bias());
  EXPECT_EQ(with_bias->LoadVector(VectorRole::kRouterBias, 1)->size(), config.num_experts);
  for (const int layer : {1, 2}) {
    tensors.erase(fmt::format("model.layers.{}.mlp.moe_statics.e_score_correction_bias", layer));
  }
  EXPECT_FALSE(WriteAndOpen(tensors, config)->has_router_bias());
}

TEST(Checkpoint, TheHeadMayLieEitherWay) {
  const ModelConfig config = SmallConfig();
  TestTensors paddle = MakeTensors(config, TestLayout::kPaddle, kSeed);
  const auto original = WriteAndOpen(paddle, config);
  paddle["lm_head.weight"] = MakeTensors(config, TestLayout::kFusedOutIn, kSeed)["lm_head.weight"];
  EXPECT_EQ(DecodeToFloat(Load(*WriteAndOpen(paddle, config), {MatrixRole::kHead})),
            DecodeToFloat(Load(*original, {MatrixRole::kHead})));
}

TEST(Checkpoint, TensorsOfOtherProgramsAreSkipped) {
  ModelConfig config = SmallConfig();
  TestTensors tensors = MakeTensors(config, TestLayout::kHuggingFace, kSeed);
  config.tie_word_embeddings = true;  // leaves lm_head.weight unused
  for (const char* name : {"model.mtp_block.0.mlp.down_proj.weight", "model.mtp_emb_norm.0.weight",
                           "model.layers.0.self_attn.cachek_matmul.activation_scale",
                           "model.layers.0.self_attn.cachev_matmul.activation_zero_point",
                           "model.layers.1.mlp.experts.0.down_proj.activation_scale",
                           "model.layers.0.self_attn.o_proj.shift_bias"}) {
    tensors[name] = {"F32", {1}, {0, 0, 0, 0}};
  }
  EXPECT_TRUE(WriteAndOpen(tensors, config)->head_is_tied());
}

TEST(Checkpoint, APreShardedDirectoryGivesEveryRankItsOwnFiles) {
  for (ModelConfig config : {SmallConfig(), SmallWint2Config()}) {
    config.head_dim = 64;  // wint8 tiles of 64 rows on every rank
    config.intermediate_size = 256;
    constexpr int kRanks = 2;
    const ModelConfig local = ConfigOfShard(config, kRanks);
    const TempDir dir;
    std::vector<std::unique_ptr<Checkpoint>> alone;
    for (int rank = 0; rank < kRanks; ++rank) {
      const TestTensors tensors = MakeTensors(local, TestLayout::kPaddle, kSeed + rank);
      testing::WriteFile(dir.path() / fmt::format("rank{}/model.safetensors", rank),
                         testing::SafetensorsBytes(tensors));
      alone.push_back(WriteAndOpen(tensors, local));
    }
    const auto checkpoint = OpenOrDie(dir.path(), config);
    for (const MatrixRef& ref : AllMatrices(config)) {
      if (ref.role == MatrixRole::kEmbedding) continue;
      for (int rank = 0; rank < kRanks; ++rank) {
        // Routers are the first one's: ranks must route alike.
        const int owner = ref.role == MatrixRole::kRouter ? 0 : rank;
        EXPECT_EQ(DecodeToFloat(Load(*checkpoint, ref, rank, kRanks)),
                  DecodeToFloat(Load(*alone[owner], ref)))
            << Show(ref) << " rank " << rank;
      }
    }
    // Vocabulary rows lie on the ranks one after the other; every rank needs all of them.
    const HostMatrix embedding = Load(*checkpoint, {MatrixRole::kEmbedding}, 1, kRanks);
    std::vector<uint16_t> expected;
    for (const auto& part : alone) {
      const HostMatrix rows = Load(*part, {MatrixRole::kEmbedding});
      expected.insert(expected.end(), rows.values_bf16.begin(), rows.values_bf16.end());
    }
    EXPECT_EQ(embedding.k, config.vocab_size);
    EXPECT_EQ(embedding.values_bf16, expected);

    const auto wrong = checkpoint->LoadMatrix({MatrixRole::kQkv, 0}, 0, 1);
    EXPECT_EQ(wrong.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(wrong.status().message()),
                ::testing::HasSubstr("split for tensor parallel size 2"));
  }
}

TEST(Checkpoint, DenseMatricesAndFirstExpertsMayBeLeftUnquantised) {
  ModelConfig config = SmallWint2Config();
  config.dense_is_wint8 = false;
  config.first_experts_are_plain = true;
  const auto checkpoint = WriteAndOpen(MakeTensors(config, TestLayout::kPaddle, kSeed), config);
  for (const MatrixRef& ref : AllMatrices(config)) {
    const bool is_wint2 = ref.layer == 2 && ref.expert >= 0;
    const bool is_router = ref.role == MatrixRole::kRouter;
    EXPECT_EQ(Load(*checkpoint, ref).format, is_wint2    ? formats::WeightFormat::kWint2
                                             : is_router ? formats::WeightFormat::kFloat32
                                                         : formats::WeightFormat::kBfloat16)
        << Show(ref);
  }
}

// Loading lets go of the pages that it has read.
TEST(Checkpoint, AMatrixCanBeLoadedAgain) {
  const ModelConfig config = SmallWint2Config();
  const auto checkpoint = WriteAndOpen(MakeTensors(config, TestLayout::kPaddle, kSeed), config);
  const MatrixRef ref = {MatrixRole::kGateUp, 2, 1};
  const std::vector<float> before = DecodeToFloat(Load(*checkpoint, ref));
  EXPECT_EQ(DecodeToFloat(Load(*checkpoint, ref)), before);
}

TEST(Checkpoint, AForcedKOrderIsKept) {
  const ModelConfig config = SmallWint2Config();
  const TestTensors tensors = MakeTensors(config, TestLayout::kPaddle, kSeed);
  const auto natural = WriteAndOpen(tensors, config, KOrderChoice::kNatural);
  EXPECT_EQ(natural->k_order(), KOrder::kNatural);
  EXPECT_EQ(Load(*natural, {MatrixRole::kDown, 2, 0}).k_order, KOrder::kNatural);
  // Random weights tell nothing, so the released files' order is taken.
  EXPECT_EQ(WriteAndOpen(tensors, config, KOrderChoice::kAuto)->k_order(), KOrder::kMma64);
}

TEST(Checkpoint, TheDigestIsTheSameForTheSameFilesAndOtherForOtherWeights) {
  const ModelConfig config = SmallConfig();
  const TestTensors tensors = MakeTensors(config, TestLayout::kPaddle, kSeed);
  const uint64_t digest = WriteAndOpen(tensors, config)->digest();
  EXPECT_EQ(WriteAndOpen(tensors, config)->digest(), digest);
  const TestTensors retrained = MakeTensors(config, TestLayout::kPaddle, kSeed + 1);
  EXPECT_NE(WriteAndOpen(retrained, config)->digest(), digest);
}

const ModelConfig& PoetConfig() {
  static const ModelConfig config = *LoadModelConfig("models/poet");
  return config;
}

MatrixRole RoleNamed(const std::string& name) {
  const std::map<std::string, MatrixRole> roles = {{"embedding", MatrixRole::kEmbedding},
                                                   {"head", MatrixRole::kHead},
                                                   {"qkv", MatrixRole::kQkv},
                                                   {"output", MatrixRole::kOutput},
                                                   {"gate_up", MatrixRole::kGateUp},
                                                   {"down", MatrixRole::kDown},
                                                   {"router", MatrixRole::kRouter}};
  return roles.at(name);
}

TEST(PoetCheckpoint, DecodesToTheReferenceWeights) {
  const auto checkpoint = OpenOrDie("models/poet", PoetConfig(), KOrderChoice::kAuto);
  std::ifstream stream("tests/golden/formats.json");
  const nlohmann::json golden = nlohmann::json::parse(stream);
  ASSERT_GT(golden["poet"].size(), 100u);
  for (const auto& spot : golden["poet"]) {
    const MatrixRef ref = {RoleNamed(spot[0]), spot[1], spot[2]};
    const int64_t row = spot[3], column = spot[4];
    const HostMatrix matrix = Load(*checkpoint, ref);
    EXPECT_EQ(DecodeToFloat(matrix)[row * matrix.n + column], spot[5].get<float>())
        << Show(ref) << " row " << row << " column " << column;
  }
}

TEST(PoetCheckpoint, IsTiedAndItsRowsAreFoundToLieInMma64Order) {
  const auto checkpoint = OpenOrDie("models/poet", PoetConfig(), KOrderChoice::kAuto);
  EXPECT_TRUE(checkpoint->head_is_tied());
  EXPECT_EQ(checkpoint->k_order(), KOrder::kMma64);
  EXPECT_EQ(checkpoint->total_bytes(), 8'072'264 + 8'406'800 + 6'599'488);
  EXPECT_EQ(checkpoint->digest(),
            OpenOrDie("models/poet", PoetConfig(), KOrderChoice::kMma64)->digest());
}

TEST(PoetCheckpoint, EveryRankOfFourHoldsOneGroupOfEveryExpertsDownMatrix) {
  const auto checkpoint = OpenOrDie("models/poet", PoetConfig(), KOrderChoice::kMma64);
  const MatrixRef ref = {MatrixRole::kDown, 3, 5};
  const HostMatrix whole = Load(*checkpoint, ref);
  const std::vector<float> weights = DecodeToFloat(whole);
  for (int rank = 0; rank < 4; ++rank) {
    const HostMatrix part = Load(*checkpoint, ref, rank, 4);
    ASSERT_EQ(part.k, 64);
    const std::vector<float> expected(weights.begin() + rank * 64 * whole.n,
                                      weights.begin() + (rank + 1) * 64 * whole.n);
    EXPECT_EQ(DecodeToFloat(part), expected);
  }
}

TEST(TinyBf16Checkpoint, OpensInTheHuggingFaceLayoutWithSharedExperts) {
  const auto config = LoadModelConfig("tests/data/tiny-bf16");
  ASSERT_TRUE(config.ok()) << config.status();
  const auto checkpoint = OpenOrDie("tests/data/tiny-bf16", *config, KOrderChoice::kAuto);
  EXPECT_TRUE(checkpoint->head_is_tied());
  const HostMatrix shared = Load(*checkpoint, {MatrixRole::kGateUp, 2, kSharedExperts});
  EXPECT_EQ(shared.format, formats::WeightFormat::kBfloat16);
  EXPECT_EQ(shared.n, 2 * config->num_shared_experts * config->moe_intermediate_size);
}

}  // namespace
}  // namespace wintserve
