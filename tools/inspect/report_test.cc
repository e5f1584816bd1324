#include "tools/inspect/report.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "common/check.h"
#include "engine_worker/weights/checkpoint.h"
#include "engine_worker/weights/checkpoint_writer.h"
#include "engine_worker/weights/dummy_source.h"
#include "engine_worker/weights/weight_source.h"
#include "kernels/cpu/cpu_backend.h"

namespace wintserve::inspect {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::MakeTensors;
using ::testing::Not;
using testing::SmallConfig;
using testing::SmallWint2Config;
using testing::TempDir;
using testing::TestLayout;
using testing::TestTensors;

constexpr char k300b[] = "models/shapes/ernie-4.5-300b-a47b-wint2";
constexpr char k21b[] = "models/shapes/ernie-4.5-21b-a3b-wint2";
constexpr char k03b[] = "models/shapes/ernie-4.5-0.3b";

Report MustInspect(const InspectOptions& options) {
  auto report = Inspect(options);
  CHECK(report.ok(), "{}", report.status().ToString());
  return *std::move(report);
}
Report MustInspect(const std::string& dir) { return MustInspect(InspectOptions{.dir = dir}); }

void Write(const TempDir& dir, const ModelConfig& config, const TestTensors& tensors,
           const std::string& file = "model.safetensors") {
  testing::WriteFile(dir.path() / "config.json", testing::ConfigJson(config));
  testing::WriteFile(dir.path() / file, testing::SafetensorsBytes(tensors));
}

// The keys of layer 1: its qkv becomes float32 as a whole when it is loaded.
void WriteWithKeysInFloat32(const TempDir& dir) {
  const ModelConfig config = SmallConfig();
  TestTensors tensors = MakeTensors(config, TestLayout::kHuggingFace, 1);
  testing::TestTensor& keys = tensors.at("model.layers.1.self_attn.k_proj.weight");
  keys = testing::ConvertFloats(keys, "F32");
  Write(dir, config, tensors);
}

TEST(Sizes, OfThe2BitReleaseOf300bAreTheKnownOnes) {
  const Report report = MustInspect(k300b);
  EXPECT_FALSE(report.opened.has_value());
  const auto& parts = report.sizes.parts;
  // Bytes of one expert by its tables of shapes, and how many of each there are.
  EXPECT_EQ(parts.at(Part::kExperts).on_disk,
            int64_t{22'861'824} * 64 * 47 + int64_t{44'070'912} * 64 * 4);
  EXPECT_EQ(parts.at(Part::kExperts).num_parameters, int64_t{3} * 8192 * 3584 * 64 * 51);
  EXPECT_EQ(parts.at(Part::kEmbedding).on_disk, int64_t{2} * 103424 * 8192);
  EXPECT_EQ(parts.at(Part::kHead).on_disk, int64_t{2} * 103424 * 8192);
  // Published as 89 GB, which is 87.4 GiB.
  EXPECT_NEAR(static_cast<double>(report.sizes.total().on_disk), 93.8e9, 0.05e9);
  EXPECT_NEAR(static_cast<double>(report.active_parameters), 47e9, 0.5e9);  // "A47B"
}

TEST(Sizes, ATiedHeadHasNoParametersButIsPacked) {
  const Report report = MustInspect(k21b);
  const Size head = report.sizes.parts.at(Part::kHead);
  EXPECT_EQ(head.num_parameters, 0);
  EXPECT_EQ(head.on_disk, 0);
  EXPECT_GE(head.on_cpu, int64_t{2} * 103424 * 2560);
  EXPECT_NEAR(static_cast<double>(report.active_parameters), 3e9, 0.5e9);  // "A3B"
}

TEST(Sizes, OnAGpuAreThoseThatAWorkerAsksItsMemoryFor) {
  for (const char* dir : {k300b, k21b, k03b}) {
    const auto config = LoadModelConfig(dir);
    ASSERT_TRUE(config.ok()) << config.status();
    for (const int world_size : {1, 2}) {
      for (int rank = 0; rank < world_size; ++rank) {
        const ModelSizes sizes = SizesOf(*config, nullptr, rank, world_size);
        int64_t matrices = sizes.total().on_cuda - sizes.parts.at(Part::kNorms).on_cuda;
        for (int layer = 0; layer < config->num_layers; ++layer) {
          if (config->IsMoeLayer(layer)) matrices -= int64_t{4} * config->num_experts;  // biases
        }
        EXPECT_EQ(matrices, CudaWeightBytes(*config, rank, world_size)) << dir;
      }
    }
  }
}

TEST(Sizes, OnACpuAreThoseOfTheMatricesThatItPacks) {
  const auto backend = kernels::cpu::CreateCpuBackend({});
  const TempDir mixed;
  WriteWithKeysInFloat32(mixed);
  for (const std::string& dir :
       {std::string("models/poet"), std::string("tests/data/tiny-bf16"), mixed.path().string()}) {
    SCOPED_TRACE(dir);
    const Report report = MustInspect(dir);
    const auto checkpoint = Checkpoint::Open(dir, report.config, KOrderChoice::kAuto);
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
    for (const int world_size : {1, 2}) {
      const auto source =
          MakeCheckpointSource(report.config, **checkpoint, backend.get(), 0, world_size, 2);
      std::map<MatrixRole, int64_t> packed;
      for (const MatrixRef& ref : AllMatrices(report.config)) {
        const auto matrix = source->NextMatrix(ref);
        ASSERT_TRUE(matrix.ok()) << matrix.status();
        packed[ref.role] += (*matrix)->size_bytes();
      }
      const ModelSizes sizes = SizesOf(report.config, &*report.opened, 0, world_size);
      const auto of = [&](Part part) {
        const auto it = sizes.parts.find(part);
        return it == sizes.parts.end() ? 0 : it->second.on_cpu;
      };
      EXPECT_EQ(of(Part::kEmbedding), packed[MatrixRole::kEmbedding]);
      EXPECT_EQ(of(Part::kHead), packed[MatrixRole::kHead]);
      EXPECT_EQ(of(Part::kAttention), packed[MatrixRole::kQkv] + packed[MatrixRole::kOutput]);
      EXPECT_EQ(of(Part::kDenseMlp) + of(Part::kExperts) + of(Part::kSharedExperts),
                packed[MatrixRole::kGateUp] + packed[MatrixRole::kDown]);
    }
  }
}

TEST(Sizes, OnDiskAreThoseOfTheTensorsInTheFiles) {
  for (const char* dir : {"models/poet", "tests/data/tiny-bf16"}) {
    const Report report = MustInspect(dir);
    int64_t tensors = 0;
    for (const TensorSet& set : report.opened->sets) {
      for (const auto& [name, entry] : set.tensors()) {
        tensors += static_cast<int64_t>(entry.view->data.size());
      }
    }
    EXPECT_EQ(report.sizes.total().on_disk, tensors) << dir;
  }
}

TEST(Sizes, AreTheSameWhateverLayoutHoldsTheModel) {
  const ModelConfig config = SmallConfig();
  std::vector<Size> totals;
  for (const TestLayout layout : {TestLayout::kPaddle, TestLayout::kHuggingFace}) {
    const TempDir dir;
    Write(dir, config, MakeTensors(config, layout, 1));
    const Report report = MustInspect(dir.path().string());
    EXPECT_THAT(report.problems, IsEmpty());
    totals.push_back(report.sizes.total());
  }
  EXPECT_EQ(totals[0].num_parameters, totals[1].num_parameters);
  EXPECT_EQ(totals[0].on_disk, totals[1].on_disk);
  EXPECT_EQ(totals[0].on_cpu, totals[1].on_cpu);
}

TEST(Layers, AreJoinedWhereTheyAreAlike) {
  const Report report = MustInspect(k300b);
  ASSERT_EQ(report.layers.size(), 3u);
  EXPECT_EQ(report.layers[1].first, 3);
  EXPECT_EQ(report.layers[1].last, 6);
  EXPECT_EQ(report.layers[1].mlp, "wint4");
  EXPECT_EQ(report.layers[2].mlp, "wint2");
  EXPECT_EQ(report.layers[2].last, 53);
  EXPECT_EQ(report.layers[0].num_experts, 0);
  EXPECT_EQ(report.layers[0].mlp, "wint8");
}

TEST(Fit, SaysHowManyTokensThereIsRoomFor) {
  FitOptions options = {.memory_gib = 141, .utilization = 0.92, .max_model_len = 32768};
  const Report report = MustInspect({.dir = k300b, .fit = options});
  const Fit& fit = *report.fit;
  EXPECT_TRUE(fit.fits);
  // Two of 8 KV heads of 128 in bf16, for each of 54 layers.
  EXPECT_EQ(fit.kv_bytes_per_token, int64_t{2} * 8 * 128 * 2 * 54);
  EXPECT_EQ(fit.allowed, static_cast<int64_t>(141 * 0.92 * (1 << 30)));
  EXPECT_EQ(fit.kv_bytes, fit.allowed - fit.weights - fit.activations);
  EXPECT_EQ(fit.kv_tokens, fit.kv_bytes / fit.kv_bytes_per_token / 64 * 64);
  options.kv_cache = kernels::plan::KvCacheKind::kInt8;
  const Report int8 = MustInspect({.dir = k300b, .fit = options});
  EXPECT_GT(int8.fit->kv_tokens, fit.kv_tokens * 19 / 10);
}

// Residual, its norm and what a block adds to it, in float32, of as many tokens as serve takes.
TEST(Fit, CountsTheStepsOfTheDevice) {
  FitOptions options = {.memory_gib = 141};
  const Report gpu = MustInspect({.dir = k300b, .fit = options});
  EXPECT_GE(gpu.fit->activations, int64_t{4} * 8192 * 3 * 8192);
  options.on_cpu = true;
  const Report cpu = MustInspect({.dir = k300b, .fit = options});
  EXPECT_GE(cpu.fit->activations, int64_t{4} * 256 * 3 * 8192);
  EXPECT_LT(cpu.fit->activations, gpu.fit->activations / 16);
}

TEST(Fit, NamesTheNumberOfGpusThatWould) {
  const FitOptions options = {.memory_gib = 80, .max_model_len = 32768};
  const Report report = MustInspect({.dir = k300b, .fit = options});
  EXPECT_FALSE(report.fit->fits);
  EXPECT_EQ(report.fit->kv_bytes, 0);
  EXPECT_EQ(report.fit->smallest_fitting_tp, 2);
  EXPECT_THAT(ToText(report, false), HasSubstr("; --tensor-parallel-size 2 does"));
  EXPECT_TRUE(MustInspect({.dir = k300b, .tensor_parallel_size = 2, .fit = options}).fit->fits);
}

TEST(Fit, RanksOfACpuShareTheHost) {
  const FitOptions options = {.memory_gib = 128, .on_cpu = true};
  const Report one = MustInspect({.dir = k300b, .fit = options});
  const Report four = MustInspect({.dir = k300b, .tensor_parallel_size = 4, .fit = options});
  EXPECT_EQ(one.fit->allowed, int64_t{128} << 30);
  EXPECT_EQ(one.fit->kv_bytes_per_token, int64_t{2} * 8 * 128 * 4 * 54);  // float32
  EXPECT_EQ(four.fit->kv_bytes_per_token, one.fit->kv_bytes_per_token);
  // Every rank has the whole embedding.
  EXPECT_GE(four.fit->weights - one.fit->weights, int64_t{3} * 2 * 103424 * 8192);
}

TEST(Inspect, ProblemsOfTensorsAreToldAllAndStopNothing) {
  const ModelConfig config = SmallWint2Config();
  TestTensors tensors = MakeTensors(config, TestLayout::kPaddle, 1);
  tensors.erase("ernie.norm.weight");
  tensors["surplus"] = {"U8", {1}, {0}};
  tensors["ernie.mtp_emb_norm.0.weight"] = {"BF16", {1}, {0, 0}};
  const TempDir dir;
  Write(dir, config, tensors);
  const Report report = MustInspect(dir.path().string());
  EXPECT_FALSE(report.is_whole());
  EXPECT_EQ(report.problems.size(), 2u);
  EXPECT_FALSE(report.k_order.has_value());
  EXPECT_EQ(report.skipped.num_tensors(), 1);
  const std::string text = ToText(report, false);
  EXPECT_THAT(text, AllOf(HasSubstr("2 problems\n"),
                          HasSubstr("tensor ernie.norm.weight: found "
                                    "none, expected"),
                          HasSubstr("tensor surplus: found U8 [1], expected no tensor"),
                          HasSubstr("skipped     1 tensor of 2 B: multi-token prediction")));
}

TEST(Inspect, ManyProblemsAreCut) {
  const ModelConfig config = SmallWint2Config();
  TestTensors tensors = MakeTensors(config, TestLayout::kPaddle, 1);
  for (int i = 0; i < 30; ++i) tensors[fmt::format("surplus.{}", i)] = {"U8", {1}, {0}};
  const TempDir dir;
  Write(dir, config, tensors);
  const Report report = MustInspect(dir.path().string());
  EXPECT_EQ(report.problems.size(), 30u);
  EXPECT_THAT(ToText(report, false), HasSubstr("  and 10 more; --json has all\n"));
  EXPECT_EQ(nlohmann::json::parse(ToJson(report))["problems"].size(), 30u);
}

TEST(Inspect, APreShardedCheckpointIsForItsNumberOfRanksAlone) {
  ModelConfig config = SmallWint2Config();
  config.head_dim = 64;
  config.intermediate_size = 256;
  const ModelConfig local = ConfigOfShard(config, 2);
  const TempDir dir;
  for (int rank = 0; rank < 2; ++rank) {
    Write(dir, config, MakeTensors(local, TestLayout::kPaddle, rank),
          fmt::format("rank{}/model.safetensors", rank));
  }
  const Report report = MustInspect(dir.path().string());
  EXPECT_THAT(report.problems, IsEmpty());
  EXPECT_EQ(report.tensor_parallel_size, 2);
  EXPECT_THAT(ToText(report, false),
              AllOf(HasSubstr(", split for tensor parallel size 2"), HasSubstr("  a rank of 2 ")));
  const auto other = Inspect({.dir = dir.path().string(), .tensor_parallel_size = 1});
  EXPECT_EQ(other.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(other.status().message()), HasSubstr("it cannot be loaded with 1"));
}

TEST(Inspect, MatricesInOtherFloatsAreNotForAGpu) {
  const ModelConfig config = SmallConfig();
  TestTensors tensors = MakeTensors(config, TestLayout::kHuggingFace, 1);
  for (auto& [name, tensor] : tensors) {
    if (tensor.type == "BF16") tensor = testing::ConvertFloats(tensor, "F16");
  }
  const TempDir dir;
  Write(dir, config, tensors);
  const Report report = MustInspect(dir.path().string());
  EXPECT_EQ(report.layers[0].attention, "F16");
  EXPECT_THAT(ToText(report, false), HasSubstr("Not for a GPU"));
  EXPECT_TRUE(nlohmann::json::parse(ToJson(report))["sizes"]["total"]["cuda_bytes"].is_null());
}

TEST(Inspect, OnePartOfAMatrixInAnotherFloatIsTold) {
  const TempDir dir;
  WriteWithKeysInFloat32(dir);
  const Report report = MustInspect(dir.path().string());
  EXPECT_EQ(report.layers[0].attention, "BF16");
  EXPECT_EQ(report.layers[1].attention, "BF16 and F32");
  EXPECT_EQ(report.layers[1].first, 1);
  EXPECT_EQ(report.layers[1].last, 1);
  EXPECT_TRUE(report.sizes.has_float32_matrices);
}

TEST(Inspect, AValueThatHidesTheKOrderIsToldOnce) {
  const ModelConfig config = SmallWint2Config();
  TestTensors tensors = MakeTensors(config, TestLayout::kPaddle, 1);
  auto& zero_points = tensors.at("ernie.layers.2.mlp.experts.0.down_proj.code_zp");
  std::fill_n(zero_points.bytes.begin(), 4, uint8_t{0xFF});  // the first float32: not a number
  const TempDir dir;
  Write(dir, config, tensors);
  Report report = MustInspect(dir.path().string());
  EXPECT_THAT(report.problems, ElementsAre(HasSubstr("down_proj.code_zp: found -nan at index 0")));
  EXPECT_FALSE(report.is_whole());
  AddVerified(VerifyTensors(*report.opened, 1, [](int64_t) {}), report);
  EXPECT_THAT(report.problems, IsEmpty());
  EXPECT_THAT(report.verified->problems, ElementsAre(HasSubstr("down_proj.code_zp: found 1 of ")));
  EXPECT_FALSE(report.is_whole());
}

TEST(Inspect, AKOrderThatNothingTellsIsTheDefaultAndSaysSo) {
  const ModelConfig config = SmallWint2Config();
  const TempDir dir;
  Write(dir, config, MakeTensors(config, TestLayout::kPaddle, 1));
  const Report report = MustInspect(dir.path().string());
  EXPECT_THAT(ToText(report, false),
              HasSubstr("mma64, the default: 2 experts of 1 layer tell no more than chance\n"));
  EXPECT_EQ(nlohmann::json::parse(ToJson(report))["k_order"]["conclusive"], false);
}

TEST(Inspect, WhatCannotBeReadIsAnErrorThatNamesIt) {
  const TempDir dir;
  const auto error = [&](const std::string& path) {
    return std::string(Inspect({.dir = path}).status().message());
  };
  EXPECT_THAT(error((dir.path() / "none").string()), HasSubstr("none: no such directory"));
  EXPECT_THAT(error("models/poet/config.json"), HasSubstr("config.json: not a directory"));
  EXPECT_THAT(error(dir.path().string()), HasSubstr("config.json"));
  testing::WriteFile(dir.path() / "config.json", testing::ConfigJson(SmallConfig()));
  EXPECT_EQ(error(dir.path().string()), "");  // the shape alone
  testing::WriteFile(dir.path() / "model_state.pdparams", "");
  EXPECT_THAT(error(dir.path().string()), HasSubstr("*.pdparams files are not supported"));
  testing::WriteFile(dir.path() / "model.safetensors", "short");
  EXPECT_THAT(error(dir.path().string()), HasSubstr("is the file truncated?"));
  const auto uneven = Inspect({.dir = k300b, .tensor_parallel_size = 3});
  EXPECT_EQ(uneven.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(uneven.status().message()), HasSubstr("num_attention_heads is 64"));
}

TEST(Text, OfTheDemoModelSaysWhatItIs) {
  Report report = MustInspect("models/poet");
  EXPECT_TRUE(report.is_whole());
  report.verified = VerifyTensors(*report.opened, 2, [](int64_t) {});
  const std::string text = ToText(report, false);
  for (const char* piece :
       {"models/poet\n", "42.1 M parameters, 17.4 M of them for a token",
        "experts     16 of width 256, 4 for a token\n", "3 files of 22.0 MiB with 1,092 tensors\n",
        "layout      ernie.*, fused matrices in quantised layouts, head tied to the embedding\n",
        "K order     mma64, by 64 experts of 6 layers\n", "norms of neurons ",
        "norms of hidden dimensions ", "  2-7         attention wint8, 16 experts wint2\n",
        "Verified: all 1,092 tensors of 21.9 MiB are sound\n"}) {
    EXPECT_THAT(text, HasSubstr(piece));
  }
  EXPECT_THAT(text, Not(HasSubstr("\033")));
  EXPECT_THAT(ToText(report, true), HasSubstr("\033[1mmodels/poet\033[m\n"));
}

TEST(Json, HasWhatTheTextHas) {
  FitOptions options = {.memory_gib = 1};
  Report report = MustInspect({.dir = "models/poet", .tensor_parallel_size = 2, .fit = options});
  const nlohmann::json json = nlohmann::json::parse(ToJson(report));
  EXPECT_EQ(json["architecture"], "Ernie4_5_MoeForCausalLM");
  EXPECT_EQ(json["shape"]["experts"], 16);
  EXPECT_EQ(json["sizes"]["total"]["parameters"], report.sizes.total().num_parameters);
  EXPECT_EQ(json["sizes"]["parts"]["experts"]["cpu_bytes"],
            report.sizes.parts.at(Part::kExperts).on_cpu);
  EXPECT_EQ(json["checkpoint"]["files"].size(), 3u);
  EXPECT_TRUE(json["checkpoint"]["orientation"].is_null());
  const nlohmann::json plain = nlohmann::json::parse(ToJson(MustInspect("tests/data/tiny-bf16")));
  EXPECT_EQ(plain["checkpoint"]["orientation"], "out_in");
  EXPECT_EQ(json["k_order"]["verdict"], "mma64");
  EXPECT_NEAR(json["k_order"]["neurons"]["mma64"].get<double>(), report.k_order->neurons.mma64,
              1e-12);
  EXPECT_EQ(json["rank"]["tensor_parallel_size"], 2);
  EXPECT_EQ(json["memory"]["kv_tokens"], report.fit->kv_tokens);
  EXPECT_TRUE(json["verified"].is_null());
  EXPECT_EQ(json["whole"], true);
  const nlohmann::json shape = nlohmann::json::parse(ToJson(MustInspect(k03b)));
  EXPECT_TRUE(shape["checkpoint"].is_null());
  EXPECT_TRUE(shape["k_order"].is_null());
}

}  // namespace
}  // namespace wintserve::inspect
