// The tensors of the published releases by name and shape, written out as their files list them:
// every one of them opens. The bytes are zeros on sparse files.
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>

#include "common/read_file.h"
#include "engine_worker/weights/checkpoint.h"
#include "engine_worker/weights/checkpoint_files.h"
#include "engine_worker/weights/checkpoint_writer.h"

namespace wintserve {
namespace {

using testing::TempDir;
using testing::TensorShapes;

constexpr int64_t kVocabulary = 103424;

// config.json of a folder of models/shapes, without what quantises it.
nlohmann::json ShapeConfig(const std::string& name) {
  const auto text = ReadFile("models/shapes/" + name + "/config.json");
  EXPECT_TRUE(text.ok()) << text.status();
  return nlohmann::json::parse(*text);
}

ModelConfig Write(const TempDir& dir, const nlohmann::json& json) {
  testing::WriteFile(dir.path() / "config.json", json.dump());
  const auto config = LoadModelConfig(dir.path());
  EXPECT_TRUE(config.ok()) << config.status();
  return *config;
}

void AddPlain(TensorShapes& t, const std::string& name, std::vector<int64_t> shape) {
  t[name + ".weight"] = {"BF16", std::move(shape)};
}

// Hugging Face's Ernie4_5 modules: matrices [out, in].
void AddAttention(TensorShapes& t, const std::string& layer, int64_t hidden, int64_t q,
                  int64_t kv) {
  AddPlain(t, layer + ".input_layernorm", {hidden});
  AddPlain(t, layer + ".post_attention_layernorm", {hidden});
  AddPlain(t, layer + ".self_attn.q_proj", {q, hidden});
  AddPlain(t, layer + ".self_attn.k_proj", {kv, hidden});
  AddPlain(t, layer + ".self_attn.v_proj", {kv, hidden});
  AddPlain(t, layer + ".self_attn.o_proj", {hidden, q});
}
void AddMlp(TensorShapes& t, const std::string& mlp, int64_t hidden, int64_t width) {
  AddPlain(t, mlp + ".gate_proj", {width, hidden});
  AddPlain(t, mlp + ".up_proj", {width, hidden});
  AddPlain(t, mlp + ".down_proj", {hidden, width});
}

// ERNIE-4.5-21B-A3B-PT: 27 MoE layers behind a dense one, tied, a multi-token prediction block.
TensorShapes Names21bPt() {
  constexpr int64_t kHidden = 2560, kQ = 2560, kKv = 512, kExpert = 1536;
  TensorShapes t;
  AddPlain(t, "model.embed_tokens", {kVocabulary, kHidden});
  AddPlain(t, "model.norm", {kHidden});
  for (int i = 0; i < 28; ++i) {
    const std::string layer = fmt::format("model.layers.{}", i);
    AddAttention(t, layer, kHidden, kQ, kKv);
    if (i == 0) {
      AddMlp(t, layer + ".mlp", kHidden, 12288);
      continue;
    }
    t[layer + ".mlp.gate.weight"] = {"F32", {64, kHidden}};
    t[layer + ".mlp.moe_statics.e_score_correction_bias"] = {"F32", {1, 64}};
    for (int e = 0; e < 64; ++e) {
      AddMlp(t, fmt::format("{}.mlp.experts.{}", layer, e), kHidden, kExpert);
    }
    AddMlp(t, layer + ".mlp.shared_experts", kHidden, 2 * kExpert);
  }
  AddAttention(t, "model.mtp_block.0", kHidden, kQ, kKv);
  AddMlp(t, "model.mtp_block.0.mlp", kHidden, 12288);
  AddPlain(t, "model.mtp_emb_norm.0", {kHidden});
  AddPlain(t, "model.mtp_hidden_norm.0", {kHidden});
  AddPlain(t, "model.mtp_linear_proj.0", {kHidden, 2 * kHidden});
  return t;
}

TEST(PublishedNames, Of21bA3bPtOpenAndThoseOfMultiTokenPredictionAreSkipped) {
  const TempDir dir;
  nlohmann::json json = ShapeConfig("ernie-4.5-21b-a3b-wint2");
  json.erase("quantization_config");
  json["torch_dtype"] = "bfloat16";
  json["num_nextn_predict_layers"] = 1;
  const ModelConfig config = Write(dir, json);
  testing::WriteSparseShards(dir.path(), Names21bPt(), 9);
  const auto checkpoint = Checkpoint::Open(dir.path(), config, KOrderChoice::kAuto);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_TRUE((*checkpoint)->head_is_tied());
  EXPECT_TRUE((*checkpoint)->has_router_bias());

  const auto files = OpenCheckpointFiles(dir.path(), config);
  ASSERT_TRUE(files.ok()) << files.status();
  EXPECT_FALSE(files->layout.has_fused_qkv);
  EXPECT_TRUE(files->layout.is_out_in);
  EXPECT_TRUE(files->layout.router_is_out_in);
  const TensorCheck check = CheckTensors(files->sets[0], files->layout, files->stored_config);
  EXPECT_TRUE(check.problems.empty());
  ASSERT_EQ(check.skipped.counts.size(), 1u);
  EXPECT_EQ(check.skipped.counts[0].reason, SkipReason::kMultiTokenPrediction);
  EXPECT_EQ(check.skipped.counts[0].num_tensors, 12);
}

TEST(PublishedNames, OfTheDense03bPtOpenWithAndWithoutTheHeadThatIsTied) {
  constexpr int64_t kHidden = 1024, kQ = 2048, kKv = 256;
  TensorShapes t;
  AddPlain(t, "model.embed_tokens", {kVocabulary, kHidden});
  AddPlain(t, "model.norm", {kHidden});
  for (int i = 0; i < 18; ++i) {
    const std::string layer = fmt::format("model.layers.{}", i);
    AddAttention(t, layer, kHidden, kQ, kKv);
    AddMlp(t, layer + ".mlp", kHidden, 3072);
  }
  for (const bool has_head : {false, true}) {
    const TempDir dir;
    const ModelConfig config = Write(dir, ShapeConfig("ernie-4.5-0.3b"));
    if (has_head) AddPlain(t, "lm_head", {kVocabulary, kHidden});
    testing::WriteSparseSafetensors(dir.path() / "model.safetensors", t);
    const auto checkpoint = Checkpoint::Open(dir.path(), config, KOrderChoice::kAuto);
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
    EXPECT_TRUE((*checkpoint)->head_is_tied());
    // Its heads are wider than the hidden state divided by their number.
    const auto output = (*checkpoint)->LoadMatrix({MatrixRole::kOutput, 17}, 1, 2);
    ASSERT_TRUE(output.ok()) << output.status();
    EXPECT_EQ(output->k, kQ / 2);
    EXPECT_EQ(output->n, kHidden);
  }
}

void AddWint8(TensorShapes& t, const std::string& name, int64_t k, int64_t n) {
  t[name + ".quant_weight"] = {"I8", {n, k}};
  t[name + ".weight_scale"] = {"BF16", {n}};
}
void AddWint4(TensorShapes& t, const std::string& name, int64_t k, int64_t n) {
  t[name + ".quant_weight"] = {"I8", {n / 2, k}};
  t[name + ".weight_scale"] = {"BF16", {n}};
}
void AddWint2(TensorShapes& t, const std::string& name, int64_t k, int64_t n) {
  t[name + ".quant_weight"] = {"U8", {k / 4, n}};
  t[name + ".weight_scale"] = {"U8", {k / 128, n}};
  t[name + ".super_scales"] = {"BF16", {n}};
  t[name + ".code_scale"] = {"F32", {n}};
  t[name + ".code_zp"] = {"F32", {n}};
}

// ERNIE-4.5-300B-A47B-2Bits-Paddle, or one rank of its releases for several.
TensorShapes Names300bWint2(int64_t ranks) {
  constexpr int64_t kHidden = 8192;
  const int64_t width = 3584 / ranks, dense = 28672 / ranks;
  TensorShapes t;
  AddPlain(t, "ernie.embed_tokens", {kVocabulary / ranks, kHidden});
  AddPlain(t, "ernie.norm", {kHidden});
  AddPlain(t, "lm_head", {kHidden, kVocabulary / ranks});
  for (int i = 0; i < 54; ++i) {
    const std::string layer = fmt::format("ernie.layers.{}", i);
    AddPlain(t, layer + ".input_layernorm", {kHidden});
    AddPlain(t, layer + ".post_attention_layernorm", {kHidden});
    AddWint8(t, layer + ".self_attn.qkv_proj", kHidden, 10240 / ranks);
    AddWint8(t, layer + ".self_attn.o_proj", 8192 / ranks, kHidden);
    if (i < 3) {
      AddWint8(t, layer + ".mlp.up_gate_proj", kHidden, 2 * dense);
      AddWint8(t, layer + ".mlp.down_proj", dense, kHidden);
      continue;
    }
    t[layer + ".mlp.gate.weight"] = {"F32", {kHidden, 64}};
    t[layer + ".mlp.moe_statics.e_score_correction_bias"] = {"F32", {1, 64}};
    for (int e = 0; e < 64; ++e) {
      const std::string expert = fmt::format("{}.mlp.experts.{}", layer, e);
      (i <= 6 ? AddWint4 : AddWint2)(t, expert + ".up_gate_proj", kHidden, 2 * width);
      (i <= 6 ? AddWint4 : AddWint2)(t, expert + ".down_proj", width, kHidden);
    }
  }
  return t;
}

TEST(PublishedNames, OfThe2BitReleaseOf300bOpenWithTheirPublishedSize) {
  const TempDir dir;
  const ModelConfig config = Write(dir, ShapeConfig("ernie-4.5-300b-a47b-wint2"));
  testing::WriteSparseShards(dir.path(), Names300bWint2(1), 20);
  const auto checkpoint = Checkpoint::Open(dir.path(), config, KOrderChoice::kMma64);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_FALSE((*checkpoint)->head_is_tied());
  constexpr double kGib = 1 << 30;
  EXPECT_NEAR(static_cast<double>((*checkpoint)->total_bytes()) / kGib, 87.4, 0.05);
  // The last rank of four: 896 rows of down_proj, seven pairs of groups.
  const auto down = (*checkpoint)->LoadMatrix({MatrixRole::kDown, 53, 63}, 3, 4);
  ASSERT_TRUE(down.ok()) << down.status();
  EXPECT_EQ(down->format, formats::WeightFormat::kWint2);
  EXPECT_EQ(down->k, 896);
  EXPECT_EQ(down->n, 8192);
}

TEST(PublishedNames, OfTheTp4ReleaseOf300bOpenForFourRanksOnly) {
  const TempDir dir;
  const ModelConfig config = Write(dir, ShapeConfig("ernie-4.5-300b-a47b-wint2"));
  const TensorShapes names = Names300bWint2(4);
  for (int rank = 0; rank < 4; ++rank) {
    testing::WriteSparseShards(dir.path() / fmt::format("rank{}", rank), names, 3);
  }
  const auto checkpoint = Checkpoint::Open(dir.path(), config, KOrderChoice::kMma64);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  const auto qkv = (*checkpoint)->LoadMatrix({MatrixRole::kQkv, 53}, 3, 4);
  ASSERT_TRUE(qkv.ok()) << qkv.status();
  EXPECT_EQ(qkv->n, 2560);
  EXPECT_EQ((*checkpoint)->LoadMatrix({MatrixRole::kQkv, 53}, 0, 2).status().code(),
            absl::StatusCode::kInvalidArgument);
}

// ERNIE-4.5-300B-A47B-Paddle in bfloat16: fused, [in, out].
TEST(PublishedNames, OfThe300bPaddleReleaseInBfloat16Open) {
  constexpr int64_t kHidden = 8192;
  TensorShapes t;
  AddPlain(t, "ernie.embed_tokens", {kVocabulary, kHidden});
  AddPlain(t, "ernie.norm", {kHidden});
  AddPlain(t, "lm_head", {kHidden, kVocabulary});
  for (int i = 0; i < 54; ++i) {
    const std::string layer = fmt::format("ernie.layers.{}", i);
    AddPlain(t, layer + ".input_layernorm", {kHidden});
    AddPlain(t, layer + ".post_attention_layernorm", {kHidden});
    AddPlain(t, layer + ".self_attn.qkv_proj", {kHidden, 10240});
    AddPlain(t, layer + ".self_attn.o_proj", {8192, kHidden});
    if (i < 3) {
      AddPlain(t, layer + ".mlp.up_gate_proj", {kHidden, 57344});
      AddPlain(t, layer + ".mlp.down_proj", {28672, kHidden});
      continue;
    }
    t[layer + ".mlp.gate.weight"] = {"F32", {kHidden, 64}};
    t[layer + ".mlp.moe_statics.e_score_correction_bias"] = {"F32", {1, 64}};
    for (int e = 0; e < 64; ++e) {
      const std::string expert = fmt::format("{}.mlp.experts.{}", layer, e);
      AddPlain(t, expert + ".up_gate_proj", {kHidden, 7168});
      AddPlain(t, expert + ".down_proj", {3584, kHidden});
    }
  }
  const TempDir dir;
  nlohmann::json json = ShapeConfig("ernie-4.5-300b-a47b-wint2");
  json.erase("quantization_config");
  const ModelConfig config = Write(dir, json);
  testing::WriteSparseShards(dir.path(), t, 20);
  const auto checkpoint = Checkpoint::Open(dir.path(), config, KOrderChoice::kAuto);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  const auto up_gate = (*checkpoint)->LoadMatrix({MatrixRole::kGateUp, 53, 63}, 1, 4);
  ASSERT_TRUE(up_gate.ok()) << up_gate.status();
  EXPECT_EQ(up_gate->format, formats::WeightFormat::kBfloat16);
  EXPECT_EQ(up_gate->n, 7168 / 4);
}

}  // namespace
}  // namespace wintserve
