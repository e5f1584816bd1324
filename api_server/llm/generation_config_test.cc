#include "api_server/llm/generation_config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>

#include "common/temp_dir_test_util.h"

namespace wintserve {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

class GenerationConfigTest : public testing::Test {
 protected:
  absl::StatusOr<GenerationConfig> Load(const std::string& text) {
    std::ofstream(directory_ / "generation_config.json") << text;
    return LoadGenerationConfig(directory_);
  }
  const TempDir temp_dir_;
  const std::filesystem::path directory_ = temp_dir_.path();
};

TEST_F(GenerationConfigTest, ReadsTheDefaultsOfTheDemoModel) {
  const auto config = LoadGenerationConfig("models/poet");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_FLOAT_EQ(config->defaults.temperature, 0.8f);
  EXPECT_FLOAT_EQ(config->defaults.top_p, 0.8f);
  EXPECT_EQ(config->defaults.top_k, 0);
  EXPECT_THAT(config->eos_ids, ElementsAre(2));
}

TEST_F(GenerationConfigTest, AMissingFileLeavesTheBuiltInDefaults) {
  const auto config = LoadGenerationConfig(directory_);
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->defaults.temperature, 1.0f);
  EXPECT_THAT(config->eos_ids, IsEmpty());
}

TEST_F(GenerationConfigTest, TakesAListOfStopTokensAndTurnsSamplingOff) {
  const auto config = Load(
      R"({"eos_token_id": [2, 7], "do_sample": false, "temperature": 0.9, "top_k": -1, "top_p": null})");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_THAT(config->eos_ids, ElementsAre(2, 7));
  EXPECT_EQ(config->defaults.temperature, 0);
  EXPECT_EQ(config->defaults.top_k, 0);
  EXPECT_EQ(config->defaults.top_p, 1);
}

TEST_F(GenerationConfigTest, TakesPenaltiesAndMinP) {
  const auto config = Load(
      R"({"min_p": 0.1, "repetition_penalty": 1.2, "presence_penalty": -0.5, "frequency_penalty": 2})");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->defaults.min_p, 0.1f);
  EXPECT_EQ(config->defaults.repetition_penalty, 1.2f);
  EXPECT_EQ(config->defaults.presence_penalty, -0.5f);
  EXPECT_EQ(config->defaults.frequency_penalty, 2.0f);
}

struct BadFile {
  const char* name;
  const char* text;
  const char* error;
};

class BadGenerationConfigTest : public GenerationConfigTest,
                                public testing::WithParamInterface<BadFile> {};

TEST_P(BadGenerationConfigTest, IsRefusedByFileAndKey) {
  const absl::Status status = Load(GetParam().text).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr(GetParam().error));
}

INSTANTIATE_TEST_SUITE_P(
    All, BadGenerationConfigTest,
    testing::Values(
        BadFile{"NoJson", "{", "generation_config.json: is no JSON object"},
        BadFile{"NoObject", "[1]", "generation_config.json: is no JSON object"},
        BadFile{"TemperatureText", R"({"temperature": "hot"})",
                "generation_config.json: temperature is \"hot\", must be a number from 0 to 2"},
        BadFile{"TopPTwo", R"({"top_p": 2})",
                "generation_config.json: top_p is 2, must be a number from 0 to 1"},
        BadFile{"TopKFraction", R"({"top_k": 1.5})",
                "generation_config.json: top_k is 1.5, must be an integer, -1 or more"},
        BadFile{"RepetitionZero", R"({"repetition_penalty": 0})",
                "generation_config.json: repetition_penalty is 0, must be a number above 0"},
        BadFile{"PresenceThree", R"({"presence_penalty": 3})",
                "generation_config.json: presence_penalty is 3, must be a number from -2 to 2"},
        BadFile{"DoSampleNumber", R"({"do_sample": 1})",
                "generation_config.json: do_sample is 1, must be true or false"},
        BadFile{"EosNegative", R"({"eos_token_id": [2, -1]})",
                "generation_config.json: eos_token_id is [2,-1], must be a token id or a list"},
        BadFile{"EosHuge", R"({"eos_token_id": 99999999999999})",
                "generation_config.json: eos_token_id is 99999999999999, must be a token id"}),
    [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace wintserve
