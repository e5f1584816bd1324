// Layer ranges, config.json and the plan of tensors.
#include "tools/quantizer/output/scheme.h"

#include <set>
#include <tuple>

#include "engine_worker/weights/tensor_set.h"
#include "tools/quantizer/output/output_test_util.h"

namespace wintserve::quantizer {
namespace {

using ::testing::HasSubstr;
using wintserve::testing::SmallConfig;

ModelConfig LoadOrDie(const std::filesystem::path& dir) {
  auto config = LoadModelConfig(dir);
  CHECK(config.ok(), "{}", config.status().ToString());
  return *config;
}

// A published quantised configuration before it was quantised.
ModelConfig Unquantized(const std::filesystem::path& dir) {
  ModelConfig config = LoadOrDie(dir);
  config.dense_is_wint8 = false;
  config.expert_quantization = ExpertQuantization::kNone;
  config.last_wint4_layer = -1;
  return config;
}

TEST(Scheme, TheFirstLayersThatAreWint4AreThoseOfThePublishedModels) {
  EXPECT_EQ(DefaultWint4Layers(51), 4);
  EXPECT_EQ(DefaultWint4Layers(27), 2);
  EXPECT_EQ(DefaultWint4Layers(7), 1);
  EXPECT_EQ(DefaultWint4Layers(1), 0);
  for (const char* dir : {"models/poet", "models/shapes/ernie-4.5-300b-a47b-wint2"}) {
    const auto target = QuantizedConfig(Unquantized(dir), {});
    ASSERT_TRUE(target.ok()) << target.status();
    EXPECT_EQ(target->last_wint4_layer, LoadOrDie(dir).last_wint4_layer) << dir;
  }
}

TEST(Scheme, BothOptionsForTheFirstLayersMeanTheSame) {
  const ModelConfig source = Unquantized("models/poet");  // experts in layers 1 to 7
  EXPECT_EQ(QuantizedConfig(source, {.wint4_layers = 3})->last_wint4_layer, 3);
  EXPECT_EQ(QuantizedConfig(source, {.wint4_end_layer = 3})->last_wint4_layer, 3);
  EXPECT_EQ(QuantizedConfig(source, {.wint4_layers = 0})->last_wint4_layer, 0);
  EXPECT_EQ(QuantizedConfig(source, {.wint4_layers = 6})->last_wint4_layer, 6);
}

struct BadOptions {
  const char* name;
  SchemeOptions options;
  const char* error;
};

class RefusedScheme : public ::testing::TestWithParam<BadOptions> {};

TEST_P(RefusedScheme, NamesTheOption) {
  const auto target = QuantizedConfig(Unquantized("models/poet"), GetParam().options);
  ASSERT_EQ(target.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(target.status().message()), HasSubstr(GetParam().error));
}

INSTANTIATE_TEST_SUITE_P(
    All, RefusedScheme,
    ::testing::Values(
        BadOptions{"AllLayersWint4", {.wint4_layers = 7}, "--wint4-layers: is 7; allowed: 0 to 6"},
        BadOptions{"FewerThanNone", {.wint4_layers = -1}, "--wint4-layers: is -1"},
        BadOptions{
            "EndBeforeTheFirst", {.wint4_end_layer = -1}, "allowed: 0 (no wint4 layer) to 6"},
        BadOptions{"EndAtTheLast", {.wint4_end_layer = 7}, "--wint4-end-layer: is 7"},
        BadOptions{"Both", {.wint4_layers = 1, .wint4_end_layer = 1}, "excludes --wint4-layers"},
        BadOptions{"OfAnotherScheme",
                   {.scheme = Scheme::kWint4, .wint4_layers = 1},
                   "--wint4-layers: means something to --scheme wint2 only, not to wint4"},
        BadOptions{"FirstExpertsOfAnotherScheme",
                   {.scheme = Scheme::kWint8, .plain_first_experts = true},
                   "--first-experts"}),
    [](const auto& info) { return info.param.name; });

TEST(Scheme, AModelWithoutExpertsTakesWint8Only) {
  const ModelConfig source = LoadOrDie("models/shapes/ernie-4.5-0.3b");
  for (const Scheme scheme : {Scheme::kWint2, Scheme::kWint4}) {
    EXPECT_THAT(std::string(QuantizedConfig(source, {.scheme = scheme}).status().message()),
                HasSubstr("is for experts, and the model has none; allowed: wint8"));
  }
  EXPECT_TRUE(QuantizedConfig(source, {.scheme = Scheme::kWint8})->dense_is_wint8);
  EXPECT_THAT(std::string(QuantizedConfig(source, {.scheme = Scheme::kWint8, .plain_dense = true})
                              .status()
                              .message()),
              HasSubstr("--dense: bf16 would leave nothing"));
}

// The published file is what FastDeploy reads.
TEST(Scheme, TheWint2ConfigurationIsThePublishedOneKeyByKey) {
  const auto published = nlohmann::json::parse(*ReadFile("models/poet/config.json"));
  nlohmann::json source = published;
  source.erase("quantization_config");
  source.erase("dtype");
  source.erase("moe_use_aux_free");
  source["torch_dtype"] = "bfloat16";
  source["num_nextn_predict_layers"] = 1;
  const auto target = QuantizedConfig(Unquantized("models/poet"), {});
  EXPECT_EQ(nlohmann::json::parse(QuantizedConfigJson(source.dump(), *target)), published);
}

// FastDeploy takes "dtype" for PyTorch's key beside a version of transformers above 4.56, 10,000
// for a rope_theta that it does not find, and -1 for a number of key and value heads.
TEST(Scheme, WhatFastDeployWouldTakeForSomethingElseIsSaidAsItExpectsIt) {
  const auto published = nlohmann::json::parse(*ReadFile("models/poet/config.json"));
  nlohmann::json source = published;
  source.erase("quantization_config");
  source["transformers_version"] = "5.0.0";
  source["rope_parameters"] = {{"rope_type", "default"}, {"rope_theta", source["rope_theta"]}};
  source.erase("rope_theta");
  source.erase("hidden_act");
  source.erase("num_key_value_heads");
  source["moe_num_experts"] = {16, 16};
  source["moe_layer_end_index"] = {7, 7};
  const testing::TempDir dir;
  wintserve::testing::WriteFile(dir.path() / "config.json", source.dump());
  const auto target = QuantizedConfig(LoadOrDie(dir.path()), {});
  ASSERT_TRUE(target.ok()) << target.status();
  const auto written = nlohmann::json::parse(QuantizedConfigJson(source.dump(), *target));
  EXPECT_FALSE(written.contains("transformers_version"));
  EXPECT_FALSE(written.contains("torch_dtype"));
  EXPECT_EQ(written["dtype"], "bfloat16");
  EXPECT_EQ(written["rope_theta"], 500000.0);
  EXPECT_EQ(written["hidden_act"], "silu");
  EXPECT_EQ(written["num_key_value_heads"], 8) << "as many as heads, where none are said";
  EXPECT_EQ(written["moe_num_experts"], 16);
  EXPECT_EQ(written["moe_layer_end_index"], 7);
}

nlohmann::json QuantizationJsonOf(Scheme scheme, const ModelConfig& source) {
  const auto target = QuantizedConfig(source, {.scheme = scheme});
  CHECK(target.ok(), "{}", target.status().ToString());
  const std::string written = QuantizedConfigJson(testing::ConfigJson(source).dump(), *target);
  return nlohmann::json::parse(written)["quantization_config"];
}

// As "mix_quant" FastDeploy would look for unquantised experts, and for a quantisation of the KV
// cache by the name of any kv_cache_quant_type, be it empty.
TEST(Scheme, Wint4AndWint8AreThe2BitFormWithoutLayersOf2Bits) {
  const ModelConfig source = SmallConfig();
  for (const Scheme scheme : {Scheme::kWint4, Scheme::kWint8}) {
    SCOPED_TRACE(SchemeName(scheme));
    const nlohmann::json expected = {{"quantization", "wint2"},
                                     {"dense_quant_type", "wint8"},
                                     {"moe_quant_type", "w4w2"},
                                     {"moe_quant_config",
                                      {{"moe_w4_quant_config",
                                        {{"quant_type", SchemeName(scheme)},
                                         {"quant_granularity", "per_channel"},
                                         {"quant_start_layer", 0},
                                         {"quant_end_layer", source.num_layers - 1}}}}}};
    EXPECT_EQ(QuantizationJsonOf(scheme, source), expected);
  }
}

TEST(Scheme, AModelWithoutExpertsSaysNothingOfThem) {
  const nlohmann::json expected = {{"quantization", "wint2"}, {"dense_quant_type", "wint8"}};
  EXPECT_EQ(QuantizationJsonOf(Scheme::kWint8, LoadOrDie("models/shapes/ernie-4.5-0.3b")),
            expected);
}

TEST(Scheme, EveryConfigurationIsReadBackAsItWasMeant) {
  const ModelConfig source = SmallConfig();
  for (const SchemeOptions& options :
       std::vector<SchemeOptions>{{},
                                  {.wint4_layers = 0},
                                  {.plain_dense = true, .plain_first_experts = true},
                                  {.scheme = Scheme::kWint4},
                                  {.scheme = Scheme::kWint4, .plain_dense = true},
                                  {.scheme = Scheme::kWint8}}) {
    SCOPED_TRACE(SchemeName(options.scheme));
    const auto target = QuantizedConfig(source, options);
    ASSERT_TRUE(target.ok()) << target.status();
    const testing::TempDir dir;
    wintserve::testing::WriteFile(dir.path() / "config.json",
                                  QuantizedConfigJson(testing::ConfigJson(source).dump(), *target));
    const ModelConfig read = LoadOrDie(dir.path());
    EXPECT_EQ(read.dense_is_wint8, target->dense_is_wint8);
    EXPECT_EQ(read.expert_quantization, target->expert_quantization);
    EXPECT_EQ(read.first_experts_are_plain, target->first_experts_are_plain);
    EXPECT_EQ(read.has_router_bias, target->has_router_bias);
    EXPECT_EQ(read.tie_word_embeddings, target->tie_word_embeddings);
    if (options.scheme == Scheme::kWint2) {
      EXPECT_EQ(read.last_wint4_layer, target->last_wint4_layer);
    }
  }
}

using Tensor = std::tuple<std::string, std::string, std::vector<int64_t>>;

std::set<Tensor> TensorsOf(const OutputPlan& plan) {
  std::set<Tensor> tensors;
  for (const PlannedStep& step : plan.steps) {
    for (const PlannedTensor& tensor : step.tensors) {
      tensors.emplace(tensor.name, TensorTypeName(tensor.type), tensor.shape);
    }
  }
  return tensors;
}

TEST(TensorPlan, NamesTypesAndShapesAreThoseOfThePublishedLayout) {
  const auto plan = PlanOutput(LoadOrDie("models/poet"), 8 << 20);
  ASSERT_TRUE(plan.ok()) << plan.status();
  const auto published = TensorSet::Open("models/poet");
  ASSERT_TRUE(published.ok()) << published.status();
  std::set<Tensor> expected;
  for (const auto& [name, entry] : published->tensors()) {
    expected.emplace(name, TensorTypeName(entry.view->type), entry.view->shape);
  }
  EXPECT_EQ(TensorsOf(*plan), expected);
  EXPECT_EQ(plan->tensor_bytes, 22949824) << "total_size of the published index";
}

TEST(TensorPlan, TheLargestModelsTensorsAreThosePublishedAndFitItsFiles) {
  const auto plan =
      PlanOutput(LoadOrDie("models/shapes/ernie-4.5-300b-a47b-wint2"), int64_t{4} << 30);
  ASSERT_TRUE(plan.ok()) << plan.status();
  const std::set<Tensor> tensors = TensorsOf(*plan);
  const std::string layer3 = "ernie.layers.3.mlp.experts.63.";
  const std::string layer7 = "ernie.layers.7.mlp.experts.0.";
  for (const Tensor& tensor : std::vector<Tensor>{
           {layer7 + "up_gate_proj.quant_weight", "U8", {2048, 7168}},
           {layer7 + "up_gate_proj.weight_scale", "U8", {64, 7168}},
           {layer7 + "up_gate_proj.super_scales", "BF16", {7168}},
           {layer7 + "down_proj.quant_weight", "U8", {896, 8192}},
           {layer7 + "down_proj.weight_scale", "U8", {28, 8192}},
           {layer7 + "down_proj.code_scale", "F32", {8192}},
           {layer7 + "down_proj.code_zp", "F32", {8192}},
           {layer3 + "up_gate_proj.quant_weight", "I8", {3584, 8192}},
           {layer3 + "up_gate_proj.weight_scale", "BF16", {7168}},
           {layer3 + "down_proj.quant_weight", "I8", {4096, 3584}},
           {"ernie.layers.0.mlp.up_gate_proj.quant_weight", "I8", {57344, 8192}},
           {"ernie.layers.0.self_attn.qkv_proj.quant_weight", "I8", {10240, 8192}},
           {"ernie.layers.3.mlp.gate.weight", "F32", {8192, 64}},
           {"ernie.layers.3.mlp.moe_statics.e_score_correction_bias", "F32", {1, 64}},
           {"lm_head.weight", "BF16", {8192, 103424}}}) {
    EXPECT_TRUE(tensors.contains(tensor)) << std::get<0>(tensor);
  }
  // Of the published shapes: an expert has 22,861,824 bytes in wint2 and 44,070,912 in wint4.
  int64_t wint2_bytes = 0, wint4_bytes = 0;
  for (const PlannedStep& step : plan->steps) {
    for (const PlannedTensor& tensor : step.tensors) {
      if (step.format == StoredFormat::kWint2) wint2_bytes += tensor.size_bytes;
      if (step.format == StoredFormat::kWint4) wint4_bytes += tensor.size_bytes;
    }
  }
  EXPECT_EQ(wint2_bytes, int64_t{22'861'824} * 64 * 47);
  EXPECT_EQ(wint4_bytes, int64_t{44'070'912} * 64 * 4);
  EXPECT_NEAR(static_cast<double>(plan->file_bytes()), 93.8e9, 0.1e9);
  for (const PlannedFile& file : plan->files) {
    EXPECT_LE(file.size_bytes, (int64_t{4} << 30) + static_cast<int64_t>(file.header.size()));
  }
  EXPECT_EQ(plan->files.size(), 22u) << "93.8 GB in files of 4 GiB";
  EXPECT_EQ(plan->files.front().name, "model-00001-of-00022.safetensors");
}

TEST(TensorPlan, AMatrixThatIsLargerThanAFileHasOneOfItsOwn) {
  const auto plan = PlanOutput(LoadOrDie("models/poet"), 1);
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->files.size(), plan->steps.size());
}

TEST(TensorPlan, AMatrixThatDoesNotComeInTilesIsNamed) {
  ModelConfig config = wintserve::testing::SmallWint2Config();
  config.moe_intermediate_size = 192;  // layer 1's wint4 takes it, layer 2's wint2 does not
  EXPECT_EQ(std::string(PlanOutput(config, 1 << 20).status().message()),
            "ernie.layers.2.mlp.experts.0.down_proj is a matrix of 192 inputs and 128 outputs, "
            "which cannot be stored as wint2; allowed: multiples of 128 inputs");
}

}  // namespace
}  // namespace wintserve::quantizer
