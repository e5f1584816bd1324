#include "engine_worker/config/model_config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "common/temp_dir_test_util.h"

namespace wintserve {
namespace {

using nlohmann::json;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

// The 300B model's configuration, 2-bit.
json Wint2Config() {
  return json::parse(R"({
    "architectures": ["Ernie4_5_MoeForCausalLM"], "hidden_act": "silu", "use_bias": false,
    "vocab_size": 103424, "hidden_size": 8192, "num_hidden_layers": 54,
    "num_attention_heads": 64, "num_key_value_heads": 8, "intermediate_size": 28672,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-05, "rope_theta": 500000,
    "tie_word_embeddings": false, "moe_num_experts": 64, "moe_k": 8,
    "moe_intermediate_size": 3584, "moe_layer_start_index": 3, "moe_layer_end_index": 53,
    "moe_layer_interval": 1, "moe_use_aux_free": true, "dtype": "bfloat16",
    "quantization_config": {
      "quantization": "wint2", "dense_quant_type": "wint8", "moe_quant_type": "w4w2",
      "moe_quant_config": {
        "moe_w4_quant_config": {"quant_type": "wint4", "quant_granularity": "per_channel",
                                "quant_start_layer": 0, "quant_end_layer": 6},
        "moe_w2_quant_config": {"quant_type": "wint2", "quant_granularity": "pp_acc",
                                "quant_group_size": 64, "quant_start_layer": 7,
                                "quant_end_layer": 53}}}})");
}

json PlainConfig() {
  json config = Wint2Config();
  config.erase("quantization_config");
  return config;
}

absl::StatusOr<ModelConfig> LoadText(const std::string& text) {
  const TempDir dir;
  std::ofstream(dir.path() / "config.json") << text;
  return LoadModelConfig(dir.path());
}

absl::StatusOr<ModelConfig> Load(const json& config) { return LoadText(config.dump()); }

TEST(ModelConfig, ReadsThePublished2BitConfiguration) {
  const auto config = Load(Wint2Config());
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->architecture, "Ernie4_5_MoeForCausalLM");
  EXPECT_EQ(config->vocab_size, 103424);
  EXPECT_EQ(config->num_layers, 54);
  EXPECT_EQ(config->num_kv_heads, 8);
  EXPECT_EQ(config->head_dim, 128);  // absent: hidden / heads
  EXPECT_EQ(config->rope_theta, 500000);
  EXPECT_EQ(config->compression_ratio, 1);
  EXPECT_EQ(config->num_experts_per_token, 8);
  EXPECT_EQ(config->num_shared_experts, 0);
  EXPECT_TRUE(config->has_router_bias);
  EXPECT_TRUE(config->has_router_bias_is_set);
  EXPECT_TRUE(config->tie_word_embeddings_is_set);
  EXPECT_FALSE(config->tie_word_embeddings);
  EXPECT_TRUE(config->dense_is_wint8);
  EXPECT_EQ(config->expert_quantization, ExpertQuantization::kW4W2);
  EXPECT_EQ(config->last_wint4_layer, 6);
  EXPECT_FALSE(config->IsMoeLayer(2));
  EXPECT_TRUE(config->IsMoeLayer(3));
  EXPECT_TRUE(config->IsMoeLayer(53));
}

TEST(ModelConfig, ReadsTheDemoModelsOwnHeadDim) {
  const auto config = LoadModelConfig("models/poet");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->head_dim, 64);  // hidden / heads would be 48
  EXPECT_EQ(config->last_wint4_layer, 1);
}

struct Variant {
  const char* name;
  const char* patch;  // JSON merge patch of the plain configuration: null removes a key
  void (*check)(const ModelConfig&);
};

class AcceptedConfig : public ::testing::TestWithParam<Variant> {};

TEST_P(AcceptedConfig, IsRead) {
  json config = PlainConfig();
  config.merge_patch(json::parse(GetParam().patch));
  const auto loaded = Load(config);
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  GetParam().check(*loaded);
}

INSTANTIATE_TEST_SUITE_P(
    All, AcceptedConfig,
    ::testing::Values(
        Variant{"ALayerThatIsRemovedIsNotThere", R"({"remove_tail_layer": true})",
                [](const ModelConfig& c) {
                  EXPECT_EQ(c.num_layers, 53);
                  EXPECT_EQ(c.moe_layer_end, 52);
                }},
        Variant{"SeveralLayersThatAreRemovedAreNotThere", R"({"remove_tail_layer": 2})",
                [](const ModelConfig& c) { EXPECT_EQ(c.num_layers, 52); }},
        Variant{"NoLayerThatIsRemoved", R"({"remove_tail_layer": false})",
                [](const ModelConfig& c) { EXPECT_EQ(c.num_layers, 54); }},
        Variant{"AbsentLayerEndMeansTheLastLayer", R"({"moe_layer_end_index": null})",
                [](const ModelConfig& c) { EXPECT_EQ(c.moe_layer_end, 53); }},
        Variant{"LayerEndMinusOneMeansTheLastLayer", R"({"moe_layer_end_index": -1})",
                [](const ModelConfig& c) { EXPECT_EQ(c.moe_layer_end, 53); }},
        Variant{"VisionListsGiveTheTextEntry",
                R"({"moe_num_experts": [32, 16], "moe_intermediate_size": [1536, 512],
                    "moe_layer_start_index": [2, 1], "moe_layer_end_index": [20, 19]})",
                [](const ModelConfig& c) {
                  EXPECT_EQ(c.num_experts, 32);
                  EXPECT_EQ(c.moe_intermediate_size, 1536);
                  EXPECT_EQ(c.moe_layer_start, 1);
                  EXPECT_EQ(c.moe_layer_end, 20);
                }},
        Variant{"ALayerEndBeyondTheLastLayerIsTheLastLayer", R"({"moe_layer_end_index": [54, 53]})",
                [](const ModelConfig& c) { EXPECT_EQ(c.moe_layer_end, 53); }},
        Variant{"IntervalCountsLayersFromOne", R"({"moe_layer_interval": 2})",
                [](const ModelConfig& c) {
                  EXPECT_TRUE(c.IsMoeLayer(3));
                  EXPECT_FALSE(c.IsMoeLayer(4));
                }},
        Variant{"RopeThetaFromRopeParameters",
                R"({"rope_theta": null,
                    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}})",
                [](const ModelConfig& c) { EXPECT_EQ(c.rope_theta, 10000); }},
        Variant{"NullRopeScaling", R"({"rope_scaling": null})",
                [](const ModelConfig& c) { EXPECT_EQ(c.rope_theta, 500000); }},
        Variant{"AbsentTieIsLeftToTheWeights", R"({"tie_word_embeddings": null})",
                [](const ModelConfig& c) { EXPECT_FALSE(c.tie_word_embeddings_is_set); }},
        Variant{"KvHeadsDefaultToHeads", R"({"num_key_value_heads": null})",
                [](const ModelConfig& c) { EXPECT_EQ(c.num_kv_heads, 64); }},
        Variant{"AbsentAuxFreeIsLeftToTheWeights", R"({"moe_use_aux_free": null})",
                [](const ModelConfig& c) { EXPECT_FALSE(c.has_router_bias_is_set); }},
        Variant{"DtypeSpellingDoesNotMatter", R"({"dtype": null, "torch_dtype": "bfloat16"})",
                [](const ModelConfig& c) { EXPECT_EQ(c.hidden_size, 8192); }},
        Variant{"DenseFirstReleaseName", R"({"architectures": ["Ernie4_5_ForCausalLM"]})",
                [](const ModelConfig& c) {
                  EXPECT_EQ(c.architecture, "Ernie4_5ForCausalLM");
                  EXPECT_EQ(c.num_experts, 0);
                  EXPECT_FALSE(c.IsMoeLayer(5));
                }},
        Variant{"Wint4Only",
                R"({"quantization_config": {"quantization": "mix_quant",
                    "dense_quant_type": "wint8", "moe_quant_type": "wint4",
                    "is_quantized": true, "kv_cache_quant_type": ""}})",
                [](const ModelConfig& c) {
                  EXPECT_TRUE(c.dense_is_wint8);
                  EXPECT_EQ(c.expert_quantization, ExpertQuantization::kWint4);
                }},
        Variant{"Wint4InAllLayersOfThe2BitForm",
                R"({"quantization_config": {"quantization": "wint2", "moe_quant_config":
                    {"moe_w4_quant_config": {"quant_end_layer": 53},
                     "moe_w2_quant_config": null}}})",
                [](const ModelConfig& c) {
                  EXPECT_TRUE(c.dense_is_wint8);
                  EXPECT_EQ(c.expert_quantization, ExpertQuantization::kWint4);
                }},
        Variant{"Wint8InAllLayersOfThe2BitForm",
                R"({"quantization_config": {"quantization": "wint2", "moe_quant_config":
                    {"moe_w4_quant_config": {"quant_type": "wint8", "quant_end_layer": 53},
                     "moe_w2_quant_config": null}}})",
                [](const ModelConfig& c) {
                  EXPECT_EQ(c.expert_quantization, ExpertQuantization::kWint8);
                }},
        Variant{"OneLayerOfWint2IsNotAllLayersOfWint4",
                R"({"quantization_config": {"quantization": "wint2", "moe_quant_config":
                    {"moe_w4_quant_config": {"quant_end_layer": 52},
                     "moe_w2_quant_config": null}}})",
                [](const ModelConfig& c) {
                  EXPECT_EQ(c.expert_quantization, ExpertQuantization::kW4W2);
                  EXPECT_EQ(c.last_wint4_layer, 52);
                }},
        Variant{"DenseMatricesAndFirstExpertsThatAreNotQuantised",
                R"({"quantization_config": {"quantization": "wint2",
                    "dense_quant_type": "bfloat16", "moe_quant_config": {"moe_w4_quant_config":
                    {"quant_type": "bfloat16", "quant_end_layer": 4}}}})",
                [](const ModelConfig& c) {
                  EXPECT_FALSE(c.dense_is_wint8);
                  EXPECT_EQ(c.expert_quantization, ExpertQuantization::kW4W2);
                  EXPECT_TRUE(c.first_experts_are_plain);
                  EXPECT_EQ(c.last_wint4_layer, 4);
                }},
        Variant{"PlainWint8Scheme", R"({"quantization_config": {"quantization": "wint8"}})",
                [](const ModelConfig& c) {
                  EXPECT_EQ(c.expert_quantization, ExpertQuantization::kWint8);
                }},
        Variant{"Wint2Defaults", R"({"quantization_config": {"quantization": "wint2"}})",
                [](const ModelConfig& c) {
                  EXPECT_EQ(c.expert_quantization, ExpertQuantization::kW4W2);
                  EXPECT_EQ(c.last_wint4_layer, 6);
                  EXPECT_TRUE(c.dense_is_wint8);
                  EXPECT_FALSE(c.first_experts_are_plain);
                }},
        Variant{"NestedMoeTypeWinsOverTheTopLevelOne",
                R"({"quantization_config": {"quantization": "wint2", "moe_quant_type": "w2",
                    "moe_quant_config": {"quant_type": "w4w2"}}})",
                [](const ModelConfig& c) {
                  EXPECT_EQ(c.expert_quantization, ExpertQuantization::kW4W2);
                }},
        Variant{"TopLevelIsQuantizedOverridesTheRest",
                R"({"is_quantized": true, "quantization_config":
                    {"quantization": "wint2", "is_quantized": false}})",
                [](const ModelConfig& c) { EXPECT_TRUE(c.dense_is_wint8); }}),
    [](const auto& info) { return info.param.name; });

TEST(ModelConfig, ADeeplyNestedFileIsRefusedBeforeItsStackIs) {
  const absl::Status status = LoadText(R"({"hidden_size": )" + std::string(1'000'000, '[') +
                                       std::string(1'000'000, ']') + "}")
                                  .status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("nested deeper than 64 levels"));
}

struct Refusal {
  const char* name;
  const char* patch;
  std::vector<const char*> pieces;  // of the error: key, value, what is allowed
};

class RefusedConfig : public ::testing::TestWithParam<Refusal> {};

TEST_P(RefusedConfig, NamesFileKeyValueAndWhatIsAllowedOnOneLine) {
  json config = Wint2Config();
  config.merge_patch(json::parse(GetParam().patch));
  const auto loaded = Load(config);
  ASSERT_FALSE(loaded.ok());
  EXPECT_EQ(loaded.status().code(), absl::StatusCode::kInvalidArgument);
  const std::string message(loaded.status().message());
  EXPECT_THAT(message, HasSubstr("config.json: "));
  EXPECT_THAT(message, HasSubstr("; allowed: "));
  for (const char* piece : GetParam().pieces) EXPECT_THAT(message, HasSubstr(piece));
  EXPECT_EQ(message.find('\n'), std::string::npos);
}

INSTANTIATE_TEST_SUITE_P(
    All, RefusedConfig,
    ::testing::Values(
        Refusal{"UnknownArchitecture",
                R"({"architectures": ["LlamaForCausalLM"]})",
                {"architectures", "LlamaForCausalLM", "Ernie4_5_MoeForCausalLM"}},
        Refusal{"NoArchitecture", R"({"architectures": []})", {"architectures is []"}},
        Refusal{"MissingHiddenSize", R"({"hidden_size": null})", {"hidden_size is missing"}},
        Refusal{
            "NegativeLayers", R"({"num_hidden_layers": -3})", {"num_hidden_layers is -3", "1 to"}},
        Refusal{
            "HugeVocabulary", R"({"vocab_size": 99999999999999999999})", {"vocab_size is 1e+20"}},
        Refusal{
            "IntegerBeyond32Bits", R"({"vocab_size": 4294967297})", {"vocab_size is 4294967297"}},
        Refusal{"FractionalHeads",
                R"({"num_attention_heads": 6.5})",
                {"num_attention_heads is 6.5", "whole number"}},
        Refusal{"TextForANumber", R"({"moe_k": "eight"})", {"moe_k is \"eight\""}},
        Refusal{"MoreExpertsPerTokenThanExperts", R"({"moe_k": 65})", {"moe_k is 65", "1 to 64"}},
        Refusal{"UnevenKvHeads",
                R"({"num_key_value_heads": 7})",
                {"num_key_value_heads is 7", "a divisor of num_attention_heads 64"}},
        Refusal{"OddHeadDim", R"({"head_dim": 127})", {"head_dim is 127", "even"}},
        Refusal{"HeadDimNeeded",
                R"({"num_attention_heads": 63, "num_key_value_heads": 9})",
                {"head_dim is missing", "hidden_size 8192"}},
        Refusal{"NoRopeTheta", R"({"rope_theta": null})", {"rope_theta is missing"}},
        Refusal{"ZeroRopeTheta", R"({"rope_theta": 0})", {"rope_theta is 0", "above 0"}},
        Refusal{"NumberBeyondFloat32",
                R"({"rms_norm_eps": 1e300})",
                {"rms_norm_eps is 1e+300", "that a float32 holds"}},
        Refusal{"NumberThatIsZeroInFloat32",
                R"({"rms_norm_eps": 1e-300})",
                {"rms_norm_eps is 1e-300", "that a float32 holds"}},
        Refusal{"ExpertsByTheMillion",
                R"({"num_hidden_layers": 4096, "moe_num_experts": 4096})",
                {"moe_num_experts is 4096", "at most 131072 together in 4096 layers"}},
        Refusal{"LayersRemovedByName",
                R"({"remove_tail_layer": "last"})",
                {"remove_tail_layer is \"last\"", "false, true or a number less than"}},
        Refusal{"RopeScaling",
                R"({"rope_scaling": {"type": "yarn"}})",
                {"rope_scaling is", "yarn", "null"}},
        Refusal{"RopeType",
                R"({"rope_parameters": {"rope_type": "yarn"}})",
                {"rope_parameters.rope_type is \"yarn\"", "\"default\""}},
        Refusal{"Biases", R"({"use_bias": true})", {"use_bias is true", "false"}},
        Refusal{"Activation", R"({"hidden_act": "gelu"})", {"hidden_act is \"gelu\"", "\"silu\""}},
        Refusal{"GateActivation",
                R"({"moe_gate_act": "sigmoid"})",
                {"moe_gate_act is \"sigmoid\"", "\"softmax\""}},
        Refusal{"UnnormalisedGate",
                R"({"moe_norm_gate_logits": false})",
                {"moe_norm_gate_logits is false"}},
        Refusal{"EmptyExpertList", R"({"moe_num_experts": []})", {"moe_num_experts is []"}},
        Refusal{"LayerEndBeforeStart",
                R"({"moe_layer_end_index": 1})",
                {"moe_layer_end_index is 1", "moe_layer_start_index 3"}},
        Refusal{"TieOfAnotherType",
                R"({"tie_word_embeddings": "yes"})",
                {"tie_word_embeddings is \"yes\"", "true or false"}},
        Refusal{"UnknownScheme",
                R"({"quantization_config": {"quantization": "wint3"}})",
                {"quantization_config.quantization is \"wint3\"", "\"wint2\""}},
        Refusal{"NoScheme",
                R"({"quantization_config": {"quantization": null}})",
                {"quantization_config.quantization is missing"}},
        Refusal{"SchemeOfAnotherType",
                R"({"quantization_config": "wint2"})",
                {"quantization_config is \"wint2\"", "an object"}},
        Refusal{"DenseScheme",
                R"({"quantization_config": {"dense_quant_type": "wint4"}})",
                {"quantization_config.dense_quant_type is \"wint4\"", "\"wint8\""}},
        Refusal{"AllLayersRemoved",
                R"({"remove_tail_layer": 54})",
                {"remove_tail_layer is 54", "less than num_hidden_layers 54"}},
        Refusal{"TheOnlyLayerRemoved",
                R"({"num_hidden_layers": 1, "remove_tail_layer": true})",
                {"remove_tail_layer is true", "false"}},
        Refusal{"ExpertScheme",
                R"({"quantization_config": {"moe_quant_type": "w2"}})",
                {"quantization_config.moe_quant_type is \"w2\"", "\"w4w2\""}},
        Refusal{"Wint8BeforeWint2",
                R"({"quantization_config": {"moe_quant_config":
                    {"moe_w4_quant_config": {"quant_type": "wint8"}}}})",
                {"moe_quant_config.moe_w4_quant_config.quant_type is \"wint8\"", "\"wint4\"",
                 "quant_end_layer 6 leaves layers to wint2"}},
        Refusal{"GroupSize",
                R"({"quantization_config": {"moe_quant_config":
                    {"moe_w2_quant_config": {"quant_group_size": 128}}}})",
                {"moe_quant_config.moe_w2_quant_config.quant_group_size is 128", "64"}},
        Refusal{"GapBetweenWint4AndWint2",
                R"({"quantization_config": {"moe_quant_config":
                    {"moe_w2_quant_config": {"quant_start_layer": 9}}}})",
                {"quant_start_layer is 9", "7 to 7"}},
        Refusal{"NotYetQuantized",
                R"({"quantization_config": {"is_quantized": false}})",
                {"quantization_config.is_quantized is false", "quantised already"}},
        Refusal{"NotYetQuantizedExperts",
                R"({"quantization_config": {"is_moe_quantized": false}})",
                {"is_moe_quantized is false"}},
        Refusal{"KvSchemeWithoutTheFlag",
                R"({"quantization_config": {"kv_cache_quant_type": "int8"}})",
                {"is_quantized is missing"}},
        Refusal{"ExpertWidthOfHalfAGroupPair",
                R"({"moe_intermediate_size": 3520})",
                {"moe_intermediate_size is 3520", "a multiple of 128"}}),
    [](const auto& info) { return info.param.name; });

TEST(ModelConfig, AMissingFileIsNotFoundAndNamed) {
  const auto loaded = LoadModelConfig("no/such/dir");
  EXPECT_EQ(loaded.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(loaded.status().message()), HasSubstr("no/such/dir/config.json"));
}

TEST(ModelConfig, TextThatIsNoJsonObjectIsRefused) {
  for (const char* text : {"", "{", "[1]", "null", "\x80\xff", "{\"a\": 1} x"}) {
    const auto loaded = LoadText(text);
    EXPECT_EQ(loaded.status().code(), absl::StatusCode::kInvalidArgument) << text;
    EXPECT_THAT(std::string(loaded.status().message()), HasSubstr("config.json: not ")) << text;
  }
}

TEST(ModelConfig, WhereTheTextIsNoJsonIsTold) {
  const auto comma = LoadText("{\n  \"a\": 1,\n}");
  EXPECT_THAT(std::string(comma.status().message()),
              AllOf(HasSubstr("not valid JSON: parse error at line 3, column 1: "),
                    HasSubstr("; allowed: one JSON object")));
  const auto huge = LoadText("{\"a\": 1e999}");
  EXPECT_THAT(std::string(huge.status().message()), HasSubstr("number overflow parsing '1e999'"));
  const auto binary = LoadText("\xff\x1b" + std::string(1'000'000, '\x01'));
  EXPECT_THAT(std::string(binary.status().message()), Not(HasSubstr("\xff")));
  EXPECT_THAT(std::string(binary.status().message()), Not(HasSubstr("\x1b")));
}

TEST(ModelConfig, EveryTruncationOfTheFileIsAnErrorNotACrash) {
  const std::string text = Wint2Config().dump();
  for (size_t length = 0; length < text.size(); length += 7) {
    EXPECT_FALSE(LoadText(text.substr(0, length)).ok()) << length;
  }
}

struct Fit {
  const char* name;
  const char* patch;
  int world_size;
  const char* error;  // a piece, or null if it fits
};

class TensorParallelFit : public ::testing::TestWithParam<Fit> {};

TEST_P(TensorParallelFit, IsDecidedByWhatMustSplitEvenly) {
  json config = Wint2Config();
  config.merge_patch(json::parse(GetParam().patch));
  const auto loaded = Load(config);
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  const absl::Status fits = CheckTensorParallel(*loaded, GetParam().world_size);
  if (GetParam().error == nullptr) {
    EXPECT_TRUE(fits.ok()) << fits;
  } else {
    EXPECT_EQ(fits.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(fits.message()), HasSubstr(GetParam().error));
  }
}

INSTANTIATE_TEST_SUITE_P(
    All, TensorParallelFit,
    ::testing::Values(
        Fit{"One", "{}", 1, nullptr}, Fit{"Four", "{}", 4, nullptr},
        Fit{"EightGivesSevenGroupsARank", "{}", 8, nullptr},
        Fit{"SixteenSplitsAGroup", R"({"vocab_size": 103424})", 16,
            "moe_intermediate_size is 3584; allowed: a multiple of 1024"},
        Fit{"Zero", "{}", 0, "size is 0"},
        Fit{"ThreeDoesNotDivideTheHeads", "{}", 3, "num_attention_heads is 64"},
        Fit{"KvHeadsAreReplicated", R"({"num_key_value_heads": 2})", 4, nullptr},
        Fit{"KvHeadsThatNeitherSplitNorRepeat",
            R"({"num_attention_heads": 24, "num_key_value_heads": 3, "head_dim": 128})", 2,
            "num_key_value_heads is 3"},
        Fit{"Vocabulary", R"({"vocab_size": 103425})", 2, "vocab_size is 103425"},
        Fit{"DenseWidth", R"({"intermediate_size": 28673, "quantization_config": null})", 2,
            "intermediate_size is 28673"},
        Fit{"PlainExpertsSplitAnywhere", R"({"quantization_config": null})", 16, nullptr}),
    [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace wintserve
