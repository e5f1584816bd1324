// The command line of `wintserve quantize` and what becomes of it.
#include "tools/quantizer/quantize.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "common/exit_code.h"
#include "tools/quantizer/output/output_test_util.h"

namespace wintserve::quantizer {
namespace {

using ::testing::AllOf;
using testing::FilesOf;
using ::testing::HasSubstr;
using testing::TempDir;
using testing::TestLayout;
using wintserve::testing::MakeTensors;
using wintserve::testing::SmallConfig;

QuantizeCommand Parse(std::vector<std::string> args) {
  args.insert(args.begin(), {"--model", "in", "--output=out"});
  return ParseQuantizeCommand(args, /*num_cores=*/6);
}

TEST(QuantizeCommand, TheDefaultsAreThePublishedMixOnAllCores) {
  const QuantizeCommand command = Parse({});
  ASSERT_TRUE(command.run) << command.error;
  EXPECT_EQ(command.options.model, "in");
  EXPECT_EQ(command.options.output, "out");
  EXPECT_EQ(command.options.scheme.scheme, Scheme::kWint2);
  EXPECT_FALSE(command.options.scheme.wint4_layers.has_value());
  EXPECT_FALSE(command.options.scheme.plain_dense);
  EXPECT_EQ(command.options.method.k_order, formats::KOrder::kMma64);
  EXPECT_EQ(command.options.max_shard_gib, 4);
  EXPECT_EQ(command.options.num_threads, 6);
  EXPECT_FALSE(command.options.overwrite_partial);
}

TEST(QuantizeCommand, EveryOptionIsTaken) {
  const QuantizeCommand command =
      Parse({"--scheme=wint2", "--wint4-layers=0", "--wint4-end-layer", "3", "--dense=bf16",
             "--first-experts", "bf16", "--k-order=natural", "--max-shard-gib=0.5", "--threads=2",
             "--overwrite-partial"});
  ASSERT_TRUE(command.run) << command.error;
  EXPECT_EQ(command.options.scheme.wint4_layers, 0);
  EXPECT_EQ(command.options.scheme.wint4_end_layer, 3);
  EXPECT_TRUE(command.options.scheme.plain_dense);
  EXPECT_TRUE(command.options.scheme.plain_first_experts);
  EXPECT_EQ(command.options.method.k_order, formats::KOrder::kNatural);
  EXPECT_EQ(command.options.max_shard_gib, 0.5);
  EXPECT_EQ(command.options.num_threads, 2);
  EXPECT_TRUE(command.options.overwrite_partial);
}

TEST(QuantizeCommand, CalibrationTakesItsOptions) {
  const QuantizeCommand command =
      Parse({"--calibration=c.jsonl", "--calibration-records=9", "--calibration-tokens=1000",
             "--calibration-sequence=64", "--sweeps=1", "--damping=0.1", "--ridge=0.2",
             "--no-asymmetric", "--repair-residual", "--no-resolve-router", "--no-resolve-dense",
             "--no-resolve-final-norm"});
  ASSERT_TRUE(command.run) << command.error;
  const MethodOptions& method = command.options.method;
  EXPECT_EQ(method.calibration, "c.jsonl");
  EXPECT_EQ(method.limits.max_records, 9);
  EXPECT_EQ(method.limits.max_tokens, 1000);
  EXPECT_EQ(method.limits.max_sequence_tokens, 64);
  EXPECT_EQ(method.feedback.feedback.num_sweeps, 1);
  EXPECT_EQ(method.feedback.feedback.damping, 0.1);
  EXPECT_EQ(method.feedback.target.ridge, 0.2);
  EXPECT_FALSE(method.feedback.asymmetric);
  EXPECT_TRUE(method.feedback.repair_residual);
  EXPECT_FALSE(method.feedback.resolve_router);
  EXPECT_FALSE(method.feedback.resolve_plain);
  EXPECT_FALSE(method.steps.solve_final_norm);
}

TEST(QuantizeCommand, TokensByDefaultFitFourGib) {
  EXPECT_EQ(DefaultCalibrationTokens(*LoadModelConfig("models/shapes/ernie-4.5-300b-a47b-wint2")),
            26214);  // 2^32 / (20 * 8192)
}

struct BadArguments {
  const char* name;
  std::vector<std::string> args;
  const char* error;
};

class RefusedArguments : public ::testing::TestWithParam<BadArguments> {};

TEST_P(RefusedArguments, AreOneLineThatNamesThem) {
  const QuantizeCommand command = Parse(GetParam().args);
  EXPECT_FALSE(command.run);
  EXPECT_THAT(command.error, HasSubstr(GetParam().error));
  EXPECT_EQ(command.error.find('\n'), std::string::npos);
}

INSTANTIATE_TEST_SUITE_P(
    All, RefusedArguments,
    ::testing::Values(
        BadArguments{"Scheme", {"--scheme=int4"}, "--scheme: int4 not in {wint2,wint4,wint8}"},
        BadArguments{"Dense", {"--dense", "fp8"}, "--dense: fp8 not in {wint8,bf16}"},
        BadArguments{"NoThreads", {"--threads=0"}, "--threads: Value 0 not in range 1 to 1024"},
        BadArguments{"NoShard",
                     {"--max-shard-gib=0"},
                     "--max-shard-gib: Value 0 not in range 0.001 to 1000000"},
        BadArguments{"ShardThatIsNoNumber",
                     {"--max-shard-gib=nan"},
                     "--max-shard-gib: Value nan not in range 0.001 to 1000000"},
        BadArguments{
            "NoText", {"--calibration", ""}, "--calibration: must name a file, got nothing"},
        BadArguments{"DampingThatIsNoNumber",
                     {"--calibration=c", "--damping=nan"},
                     "--damping: Value nan not in range 1e-06 to 1000000"},
        BadArguments{"NoDamping",
                     {"--calibration=c", "--damping=0"},
                     "--damping: Value 0 not in range 1e-06 to 1000000"},
        BadArguments{"SweepsWithoutText", {"--sweeps=2"}, "--sweeps requires --calibration"},
        BadArguments{"ManySweeps",
                     {"--calibration=c", "--sweeps=101"},
                     "--sweeps: Value 101 not in range 0 to 100"},
        BadArguments{"NoRidge", {"--calibration=c", "--ridge=0"}, "--ridge: Value 0 not in range"},
        BadArguments{"Unknown", {"--frob"}, "--frob"},
        BadArguments{"NoNumber", {"--wint4-layers=x"}, "--wint4-layers"}),
    [](const auto& info) { return info.param.name; });

TEST(QuantizeCommand, ModelAndOutputAreNeeded) {
  EXPECT_EQ(ParseQuantizeCommand({"--output=x"}, 1).error, "error: --model is required");
  EXPECT_EQ(ParseQuantizeCommand({"--model=x"}, 1).error, "error: --output is required");
  EXPECT_EQ(ParseQuantizeCommand({"--model=x", "--output", ""}, 1).error,
            "error: --output: must name a directory, got nothing");
  EXPECT_EQ(ParseQuantizeCommand({"--model", "", "--output=x"}, 1).error,
            "error: --model: must name a directory, got nothing");
}

TEST(QuantizeCommand, HelpExplainsEveryOption) {
  const std::string help = ParseQuantizeCommand({"--help"}, 1).print;
  for (const char* option :
       {"--model DIR", "--output DIR", "--scheme wint2|wint4|wint8=wint2", "--wint4-layers N",
        "--wint4-end-layer LAYER", "--dense wint8|bf16=wint8", "--first-experts", "--k-order",
        "--max-shard-gib X=4", "--threads N", "--overwrite-partial"}) {
    EXPECT_THAT(help, HasSubstr(option));
  }
  EXPECT_THAT(help, HasSubstr("wintserve quantize [OPTIONS]"));
}

class QuantizeModel : public ::testing::Test {
 protected:
  QuantizeModel() {
    const ModelConfig config = SmallConfig();
    testing::WriteModel(dir_.path() / "model", config,
                        MakeTensors(config, TestLayout::kHuggingFace, 5));
  }
  QuantizeResult Run(std::vector<std::string> args = {}, const std::string& output = "out") {
    const auto is_model = [](const std::string& arg) { return arg.starts_with("--model="); };
    if (std::none_of(args.begin(), args.end(), is_model)) {
      args.push_back("--model=" + (dir_.path() / "model").string());
    }
    args.push_back("--output=" + (dir_.path() / output).string());
    const QuantizeCommand command = ParseQuantizeCommand(args, 2);
    EXPECT_TRUE(command.run) << command.error;
    return Quantize(command.options, &stop_);
  }

  const TempDir dir_;
  std::atomic<bool> stop_ = false;
};

TEST_F(QuantizeModel, TheSummarySaysWhatCameOut) {
  const QuantizeResult result = Run();
  EXPECT_EQ(result.exit_code, kExitOk);
  EXPECT_EQ(result.error, "");
  EXPECT_THAT(result.summary, AllOf(HasSubstr("wint2 experts"), HasSubstr("NMSE"),
                                    HasSubstr("out: 0.001 GiB in 1 "
                                              "file"),
                                    HasSubstr("on 2 threads")));
}

TEST_F(QuantizeModel, TheSameOptionsTwiceGiveTheSameBytes) {
  ASSERT_EQ(Run({}, "first").exit_code, kExitOk);
  ASSERT_EQ(Run({"--threads=1"}, "second").exit_code, kExitOk);
  EXPECT_EQ(FilesOf(dir_.path() / "first"), FilesOf(dir_.path() / "second"));
}

TEST_F(QuantizeModel, EveryErrorHasItsExitCode) {
  EXPECT_EQ(Run({"--wint4-layers=2"}).exit_code, kExitUsage) << "there are two layers";
  EXPECT_EQ(Run({"--model=none"}).exit_code, kExitCheckpoint);
  ASSERT_EQ(Run().exit_code, kExitOk);
  const QuantizeResult again = Run();
  EXPECT_EQ(again.exit_code, kExitOutput);
  EXPECT_THAT(again.error, HasSubstr("is there already"));
  EXPECT_THAT(Run({"--model=models/poet"}, "other").error, HasSubstr("is quantised already"));
}

// Number of threads and --overwrite-partial change nothing in the output.
TEST_F(QuantizeModel, ARunGoesOnWithOptionsThatMeanTheSameAndNoOthers) {
  stop_ = true;
  const QuantizeResult stopped = Run({"--wint4-layers=1"});
  EXPECT_TRUE(stopped.stopped);
  stop_ = false;
  for (const char* other : {"--scheme=wint8", "--dense=bf16", "--k-order=natural",
                            "--wint4-layers=0", "--first-experts=bf16", "--max-shard-gib=1"}) {
    const QuantizeResult refused = Run({other});
    EXPECT_EQ(refused.exit_code, kExitOutput) << other;
    EXPECT_THAT(refused.error, HasSubstr("was begun by another run"));
  }
  EXPECT_EQ(Run({"--wint4-end-layer=1", "--threads=1"}).exit_code, kExitOk);
}

// The text, byte for byte, and what is taken of it.
class QuantizeTiny : public ::testing::Test {
 protected:
  QuantizeResult Run(std::vector<std::string> args, const std::string& output = "out") {
    args.insert(args.end(),
                {"--model=tests/data/tiny-bf16", "--scheme=wint4",
                 "--output=" + (dir_.path() / output).string(), "--calibration=" + Text()});
    const QuantizeCommand command = ParseQuantizeCommand(args, 2);
    EXPECT_TRUE(command.run) << command.error;
    return Quantize(command.options, &stop_);
  }
  std::string Text() const { return (dir_.path() / "text.jsonl").string(); }
  void WriteText(const std::string& first) {
    wintserve::testing::WriteFile(
        Text(), "{\"text\": \"" + first +
                    "\"}\n{\"messages\": [{\"role\": \"user\", \"content\": \"静夜思\"}, "
                    "{\"role\": \"assistant\", \"content\": \"床前明月光\"}]}\n");
  }

  const TempDir dir_;
  std::atomic<bool> stop_ = false;
};

TEST_F(QuantizeTiny, CalibrationMakesOtherWeightsAndTheSameOnesTwice) {
  WriteText("春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。");
  ASSERT_EQ(Run({}, "first").error, "");
  ASSERT_EQ(Run({"--threads=1"}, "second").error, "");
  EXPECT_EQ(FilesOf(dir_.path() / "first"), FilesOf(dir_.path() / "second"));
  ASSERT_EQ(Run({"--calibration-records=1"}, "other").error, "");
  EXPECT_NE(FilesOf(dir_.path() / "first"), FilesOf(dir_.path() / "other"));
}

TEST_F(QuantizeTiny, ARunGoesOnWithTheSameTextOnly) {
  WriteText("春眠不觉晓");
  ASSERT_EQ(Run({}, "whole").error, "");
  stop_ = true;
  EXPECT_TRUE(Run({}).stopped);
  stop_ = false;
  WriteText("春眠不觉暁");
  EXPECT_THAT(Run({}).error, HasSubstr("the calibration file's digest was "));
  WriteText("春眠不觉晓");
  EXPECT_THAT(Run({"--sweeps=3"}).error, HasSubstr("--sweeps was 4 and is 3"));
  EXPECT_EQ(Run({}).error, "");
  EXPECT_EQ(FilesOf(dir_.path() / "whole"), FilesOf(dir_.path() / "out"));
}

TEST_F(QuantizeTiny, ATextThatCannotBeReadIsNamed) {
  const QuantizeResult missing = Run({});
  EXPECT_EQ(missing.exit_code, kExitUsage);
  EXPECT_THAT(missing.error, HasSubstr(Text()));
  wintserve::testing::WriteFile(Text(), "{}\n");
  const QuantizeResult empty = Run({});
  EXPECT_EQ(empty.exit_code, kExitUsage);
  EXPECT_THAT(empty.error, HasSubstr(Text() + ":1"));
  EXPECT_FALSE(std::filesystem::exists(dir_.path() / "out.partial"));
  WriteText("春眠不觉晓");
  EXPECT_EQ(Run({}).error, "") << "nothing is left of the wrong text";
}

// Files that would be read without an error, to no use.
TEST_F(QuantizeTiny, WhatIsNoTextIsRefusedBeforeAnythingIsWritten) {
  const auto error_of = [&](const std::string& file) {
    const QuantizeCommand command = ParseQuantizeCommand(
        {"--model=tests/data/tiny-bf16", "--scheme=wint4",
         "--output=" + (dir_.path() / "out").string(), "--calibration=" + file},
        2);
    const QuantizeResult result = Quantize(command.options, &stop_);
    EXPECT_EQ(result.exit_code, kExitUsage);
    EXPECT_FALSE(std::filesystem::exists(dir_.path() / "out.partial"));
    return result.error;
  };
  for (const std::string file : {"/dev/zero", "/dev/null", "/tmp"}) {
    EXPECT_EQ(error_of(file),
              "--calibration: " + file + " must be a regular file, as it is read twice");
  }
  const std::string text = (dir_.path() / "text.txt").string();
  wintserve::testing::WriteFile(text, "春眠\ncaf\xE9");
  EXPECT_EQ(error_of(text),
            text + ":2: must be text in UTF-8, which byte 0xe9 at offset 10 is not");
}

TEST_F(QuantizeTiny, ATextThatIsReadInAnotherWayIsAnotherText) {
  WriteText("春眠不觉晓");
  stop_ = true;
  EXPECT_TRUE(Run({}).stopped);
  stop_ = false;
  const std::string renamed = (dir_.path() / "text.txt").string();
  std::filesystem::copy_file(Text(), renamed);
  const QuantizeCommand command = ParseQuantizeCommand(
      {"--model=tests/data/tiny-bf16", "--scheme=wint4",
       "--output=" + (dir_.path() / "out").string(), "--calibration=" + renamed},
      2);
  EXPECT_THAT(Quantize(command.options, &stop_).error,
              HasSubstr("its form was *.jsonl and is plain text"));
}

TEST_F(QuantizeModel, AnotherModelIsNotMistakenForTheOneThatWasBegun) {
  stop_ = true;
  EXPECT_TRUE(Run().stopped);
  stop_ = false;
  const ModelConfig config = SmallConfig();
  testing::WriteModel(dir_.path() / "model", config,
                      MakeTensors(config, TestLayout::kHuggingFace, 6));
  EXPECT_THAT(Run().error, HasSubstr("the model's digest was "));
}

// It makes the tokens of a calibration text, and goes into the output.
TEST_F(QuantizeModel, AnotherTokenizerIsAnotherModel) {
  stop_ = true;
  EXPECT_TRUE(Run().stopped);
  stop_ = false;
  const std::filesystem::path tokenizer = dir_.path() / "model" / "tokenizer_config.json";
  wintserve::testing::WriteFile(tokenizer, "{}");
  EXPECT_THAT(Run().error, HasSubstr("the model's digest was "));
  EXPECT_TRUE(std::filesystem::remove_all(dir_.path() / "out.partial") > 0);
  stop_ = true;
  EXPECT_TRUE(Run().stopped);
  stop_ = false;
  std::filesystem::rename(tokenizer, tokenizer.parent_path() / "tokenizer.json");
  EXPECT_THAT(Run().error, HasSubstr("the model's digest was "));
}

}  // namespace
}  // namespace wintserve::quantizer
