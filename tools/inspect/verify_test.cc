// Checkpoints broken one value at a time.
#include "tools/inspect/verify.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cstring>

#include "common/check.h"
#include "engine_worker/weights/checkpoint_writer.h"

namespace wintserve::inspect {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::MakeTensors;
using testing::SmallConfig;
using testing::SmallWint2Config;
using testing::TempDir;
using testing::TestLayout;
using testing::TestTensors;

constexpr uint32_t kSeed = 7;

CheckpointFiles Open(const TempDir& dir, const ModelConfig& config) {
  auto files = OpenCheckpointFiles(dir.path(), config);
  CHECK(files.ok(), "{}", files.status().ToString());
  return *std::move(files);
}

Verified Verify(const CheckpointFiles& files, int num_threads = 2) {
  return VerifyTensors(files, num_threads, [](int64_t) {});
}

Verified WriteAndVerify(const TestTensors& tensors, const ModelConfig& config) {
  const TempDir dir;
  testing::WriteFile(dir.path() / "model.safetensors", testing::SafetensorsBytes(tensors));
  return Verify(Open(dir, config));
}

template <typename Value>
void Put(testing::TestTensor& tensor, int64_t index, Value value) {
  std::memcpy(tensor.bytes.data() + index * sizeof(value), &value, sizeof(value));
}

TEST(VerifyTensors, FindsNothingInWhatIsSoundAndReadsAllOfIt) {
  for (const ModelConfig& config : {SmallConfig(), SmallWint2Config()}) {
    const TestTensors tensors = MakeTensors(config, TestLayout::kPaddle, kSeed);
    int64_t num_bytes = 0;
    for (const auto& [name, tensor] : tensors) {
      num_bytes += static_cast<int64_t>(tensor.bytes.size());
    }
    const TempDir dir;
    testing::WriteFile(dir.path() / "model.safetensors", testing::SafetensorsBytes(tensors));
    const CheckpointFiles files = Open(dir, config);
    for (const int num_threads : {1, 5}) {
      std::atomic<int64_t> told = 0;
      const Verified verified =
          VerifyTensors(files, num_threads, [&](int64_t bytes) { told += bytes; });
      EXPECT_THAT(verified.problems, IsEmpty());
      EXPECT_EQ(verified.num_tensors, static_cast<int64_t>(tensors.size()));
      EXPECT_EQ(verified.num_bytes, num_bytes);
      EXPECT_EQ(told, num_bytes);
    }
  }
}

struct Breakage {
  const char* name;
  const char* tensor;  // that the problem names
  void (*apply)(testing::TestTensor& tensor);
  const char* problem;
  bool is_quantized = true;
};

class BrokenValue : public ::testing::TestWithParam<Breakage> {};

TEST_P(BrokenValue, IsOneProblemThatNamesFileTensorAndPlace) {
  const ModelConfig config = GetParam().is_quantized ? SmallWint2Config() : SmallConfig();
  TestTensors tensors = MakeTensors(
      config, GetParam().is_quantized ? TestLayout::kPaddle : TestLayout::kHuggingFace, kSeed);
  GetParam().apply(tensors.at(GetParam().tensor));
  const std::vector<std::string> problems = WriteAndVerify(tensors, config).problems;
  ASSERT_EQ(problems.size(), 1u) << ::testing::PrintToString(problems);
  EXPECT_THAT(problems[0],
              HasSubstr(fmt::format("/model.safetensors: tensor {}: found ", GetParam().tensor)));
  EXPECT_THAT(problems[0], HasSubstr(GetParam().problem));
}

constexpr char kDown[] = "ernie.layers.2.mlp.experts.1.down_proj.";

INSTANTIATE_TEST_SUITE_P(
    All, BrokenValue,
    ::testing::Values(
        Breakage{"NanInAMatrix", "model.layers.1.mlp.experts.0.up_proj.weight",
                 [](testing::TestTensor& t) {
                   Put<uint16_t>(t, 3 * 128 + 5, 0x7FC0);
                   Put<uint16_t>(t, 4 * 128, 0xFF80);
                 },
                 "2 of 32768 numbers that are not finite or beyond 65536, the first nan at [3, 5]",
                 false},
        Breakage{"AFlippedExponentBit", "model.norm.weight",
                 [](testing::TestTensor& t) { Put<uint16_t>(t, 127, 0x7E80); },
                 "1 of 128 numbers that are not finite or beyond 65536, the first 8.5", false},
        Breakage{"InfinityInTheRouter", "model.layers.2.mlp.gate.weight",
                 [](testing::TestTensor& t) { Put<float>(t, 128, -INFINITY); },
                 "the first -inf at [1, 0]", false},
        Breakage{"AMatrixOfZeros", "model.layers.0.self_attn.o_proj.weight",
                 [](testing::TestTensor& t) { t.bytes.assign(t.bytes.size(), 0); },
                 "nothing but zeros (is the file incomplete?)", false},
        Breakage{"AScaleThatIsNoNumber", "ernie.layers.0.self_attn.o_proj.weight_scale",
                 [](testing::TestTensor& t) { Put<uint16_t>(t, 9, 0x7FC0); },
                 "the first nan at [9]"},
        Breakage{
            "AHoleInWint8", "ernie.layers.0.mlp.up_gate_proj.quant_weight",
            [](testing::TestTensor& t) { std::fill_n(t.bytes.begin() + 8192, 4096, uint8_t{0}); },
            "4096 zero bytes in a row from byte 8192 on: code -128"},
        Breakage{
            "AHoleInWint4", "ernie.layers.1.mlp.experts.0.down_proj.quant_weight",
            [](testing::TestTensor& t) { std::fill_n(t.bytes.end() - 5000, 5000, uint8_t{0}); },
            "code -8, which no encoder writes"},
        Breakage{"ASuperScaleThatIsNoNumber", "ernie.layers.2.mlp.experts.1.down_proj.super_scales",
                 [](testing::TestTensor& t) { Put<uint16_t>(t, 0, 0x7F80); },
                 "the first inf at [0]"},
        Breakage{"NoLocalScales", "ernie.layers.2.mlp.experts.1.down_proj.weight_scale",
                 [](testing::TestTensor& t) { t.bytes.assign(t.bytes.size(), 0); },
                 "every weight decodes to 0"},
        Breakage{"CodesBeyondFifteenBits", "ernie.layers.2.mlp.experts.1.down_proj.code_scale",
                 [](testing::TestTensor& t) { Put<float>(t, 7, 200); },
                 "1 of 128 columns with codes outside 0 to 32767, the first column 7 (code_scale "
                 "200, "},
        Breakage{"CodesThatAreNoNumbers", "ernie.layers.2.mlp.experts.1.down_proj.code_scale",
                 [](testing::TestTensor& t) { Put<float>(t, 100, NAN); },
                 "1 of 128 numbers that are not finite or beyond 65536, the first nan at [100]"},
        Breakage{"OffsetsOfCodesThatAreNoNumbers", "ernie.layers.2.mlp.experts.1.down_proj.code_zp",
                 [](testing::TestTensor& t) { Put<float>(t, 100, INFINITY); },
                 "the first inf at [100]"}),
    [](const auto& info) { return info.param.name; });

TEST(VerifyTensors, CodesCountOnlyOfBytesThatAColumnHas) {
  const ModelConfig config = SmallWint2Config();
  TestTensors tensors = MakeTensors(config, TestLayout::kPaddle, kSeed);
  // With 200 a byte the largest code of 0 … 32767 is that of byte 157.
  Put<float>(tensors.at(std::string(kDown) + "code_scale"), 7, 200);
  Put<float>(tensors.at(std::string(kDown) + "code_zp"), 7, 1200);
  auto& codes = tensors.at(std::string(kDown) + "quant_weight");
  for (int64_t row = 0; row < codes.shape[0]; ++row) {
    uint8_t& byte = codes.bytes[row * codes.shape[1] + 7];
    byte = std::min<uint8_t>(byte, 157);
  }
  EXPECT_THAT(WriteAndVerify(tensors, config).problems, IsEmpty());
  codes.bytes[7] = 158;
  EXPECT_THAT(WriteAndVerify(tensors, config).problems, ElementsAre(HasSubstr(" to 32800")));
}

TEST(VerifyTensors, AllZerosAreSoundInARoutersBias) {
  const ModelConfig config = SmallConfig();
  TestTensors tensors = MakeTensors(config, TestLayout::kPaddle, kSeed);
  auto& bias = tensors.at("ernie.layers.1.mlp.moe_statics.e_score_correction_bias");
  bias.bytes.assign(bias.bytes.size(), 0);
  EXPECT_THAT(WriteAndVerify(tensors, config).problems, IsEmpty());
}

TEST(VerifyTensors, ProblemsComeInTheOrderOfNamesAndOfSkippedTensorsToo) {
  const ModelConfig config = SmallConfig();
  TestTensors tensors = MakeTensors(config, TestLayout::kHuggingFace, kSeed);
  Put<uint16_t>(tensors.at("model.norm.weight"), 0, 0x7F80);
  Put<uint16_t>(tensors.at("model.embed_tokens.weight"), 0, 0x7F80);
  tensors["model.mtp_emb_norm.0.weight"] = {"BF16", {1}, {0x80, 0x7F}};
  tensors["model.mtp_counter"] = {"I64", {1}, std::vector<uint8_t>(8)};
  EXPECT_THAT(
      WriteAndVerify(tensors, config).problems,
      ElementsAre(HasSubstr("model.embed_tokens.weight"), HasSubstr("model.mtp_emb_norm.0.weight"),
                  HasSubstr("model.norm.weight")));
}

TEST(VerifyTensors, LeavesOutWhatIsMissingOrMisshapen) {
  const ModelConfig config = SmallWint2Config();
  TestTensors tensors = MakeTensors(config, TestLayout::kPaddle, kSeed);
  tensors.erase(std::string(kDown) + "code_zp");
  tensors.erase("ernie.layers.0.self_attn.o_proj.weight_scale");
  tensors.at("ernie.layers.1.mlp.experts.0.down_proj.quant_weight").shape = {64 * 256};
  EXPECT_THAT(WriteAndVerify(tensors, config).problems, IsEmpty());
}

TEST(VerifyTensors, RanksThatDifferInWhatIsReplicatedAreTold) {
  ModelConfig config = SmallConfig();
  config.head_dim = 64;
  const ModelConfig local = ConfigOfShard(config, 2);
  const TestTensors first = MakeTensors(local, TestLayout::kPaddle, kSeed);
  TestTensors second = MakeTensors(local, TestLayout::kPaddle, kSeed + 1);
  for (const auto& [name, tensor] : first) {
    const bool is_replicated = name.ends_with("norm.weight") || name.ends_with("gate.weight") ||
                               name.ends_with("correction_bias");
    if (is_replicated) second[name] = tensor;
  }
  const auto problems = [&] {
    const TempDir dir;
    testing::WriteFile(dir.path() / "rank0/model.safetensors", testing::SafetensorsBytes(first));
    testing::WriteFile(dir.path() / "rank1/model.safetensors", testing::SafetensorsBytes(second));
    return Verify(Open(dir, config)).problems;
  };
  EXPECT_THAT(problems(), IsEmpty());
  second.at("ernie.norm.weight").bytes[0] ^= 1;
  second.at("ernie.layers.2.mlp.gate.weight").bytes[0] ^= 1;
  EXPECT_THAT(
      problems(),
      ElementsAre(HasSubstr("rank1/model.safetensors: tensor ernie.layers.2.mlp.gate.weight: "
                            "found other numbers than in "),
                  HasSubstr("tensor ernie.norm.weight: found other numbers")));
  second = first;
  second["ernie.norm.weight"] = testing::ConvertFloats(first.at("ernie.norm.weight"), "F32");
  EXPECT_THAT(problems(),
              ElementsAre(HasSubstr("ernie.norm.weight: found F32, expected BF16 as in ")));
}

}  // namespace
}  // namespace wintserve::inspect
