// The program itself: streams and exit codes.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>

#include <cstdio>
#include <nlohmann/json.hpp>
#include <string>

#include "common/exit_code.h"
#include "engine_worker/weights/checkpoint_writer.h"

namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::StartsWith;
using wintserve::testing::TempDir;

std::string program;

struct Ended {
  int exit_code = -1;
  std::string output;
};

// By a shell, which takes apart what it is given.
Ended Inspect(const std::string& arguments) {
  Ended run;
  FILE* pipe = ::popen((program + " " + arguments).c_str(), "r");
  char buffer[4096];
  size_t count;
  while ((count = std::fread(buffer, 1, sizeof(buffer), pipe)) > 0) {
    run.output.append(buffer, count);
  }
  const int status = ::pclose(pipe);
  run.exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  return run;
}

TEST(InspectProgram, SoundModelsEndWith0) {
  const Ended text = Inspect("models/poet --verify 2>&1");
  EXPECT_EQ(text.exit_code, wintserve::kExitOk);
  EXPECT_THAT(text.output, StartsWith("models/poet\n"));
  EXPECT_THAT(text.output, HasSubstr("are sound\n"));
  const Ended json = Inspect("--json tests/data/tiny-bf16 --verify --threads 1");
  EXPECT_EQ(json.exit_code, wintserve::kExitOk);
  EXPECT_EQ(nlohmann::json::parse(json.output)["verified"]["tensors"], 63);
}

TEST(InspectProgram, ABrokenValueIsFoundByVerifyAloneAndEndsWith66) {
  const wintserve::ModelConfig config = wintserve::testing::SmallConfig();
  auto tensors =
      wintserve::testing::MakeTensors(config, wintserve::testing::TestLayout::kHuggingFace, 1);
  tensors.at("model.norm.weight").bytes[1] = 0x7F;
  tensors.at("model.norm.weight").bytes[0] = 0xC0;
  const TempDir dir;
  wintserve::testing::WriteFile(dir.path() / "config.json", wintserve::testing::ConfigJson(config));
  wintserve::testing::WriteFile(dir.path() / "model.safetensors",
                                wintserve::testing::SafetensorsBytes(tensors));
  EXPECT_EQ(Inspect(dir.path().string()).exit_code, wintserve::kExitOk);
  const Ended run = Inspect(dir.path().string() + " --verify");
  EXPECT_EQ(run.exit_code, wintserve::kExitCheckpoint);
  EXPECT_THAT(run.output, HasSubstr("\n1 problem\n"));
  EXPECT_THAT(run.output, HasSubstr("tensor model.norm.weight: found 1 of 128 numbers"));
}

TEST(InspectProgram, WhatCannotBeReadIsOneLineOnStderrAndEndsWith66) {
  EXPECT_THAT(Inspect("no/such/model 2>/dev/null").output, IsEmpty());
  const Ended run = Inspect("no/such/model 2>&1");
  EXPECT_EQ(run.exit_code, wintserve::kExitCheckpoint);
  EXPECT_EQ(run.output, "error: no/such/model: no such directory\n");
  const Ended shape = Inspect("models/shapes/ernie-4.5-0.3b --verify 2>&1");
  EXPECT_EQ(shape.exit_code, wintserve::kExitCheckpoint);
  EXPECT_THAT(shape.output, HasSubstr("no weights to verify"));
}

TEST(InspectProgram, AModelThatDoesNotFitEndsWith69) {
  const char* const model = "models/shapes/ernie-4.5-300b-a47b-wint2";
  EXPECT_EQ(Inspect(std::string(model) + " --memory-gib 80").exit_code,
            wintserve::kExitUnavailable);
  EXPECT_EQ(Inspect(std::string(model) + " --memory-gib 141").exit_code, wintserve::kExitOk);
  EXPECT_EQ(Inspect(std::string(model) + " --memory-gib 80 --tensor-parallel-size 2").exit_code,
            wintserve::kExitOk);
}

TEST(InspectProgram, AWrongFlagEndsWith64AndIsNamed) {
  for (const char* arguments :
       {"", "models/poet --device tpu", "models/poet --memory-gib -1",
        "models/poet --memory-gib nan", "models/poet --memory-gib 9 --gpu-memory-utilization nan",
        "models/poet --nonsense", "models/poet --threads 0"}) {
    const Ended run = Inspect(std::string(arguments) + " 2>&1");
    EXPECT_EQ(run.exit_code, wintserve::kExitUsage) << arguments;
    EXPECT_FALSE(run.output.empty()) << arguments;
  }
  EXPECT_EQ(Inspect("--help").exit_code, wintserve::kExitOk);
}

}  // namespace

int main(int argc, char** argv) {
  ::testing::InitGoogleMock(&argc, argv);
  program = argc > 1 ? argv[1] : "";
  return RUN_ALL_TESTS();
}
