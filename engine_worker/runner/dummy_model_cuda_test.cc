// Dummy weights on a GPU, against the same model on the CPU.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "engine_worker/model/dummy_model_test_util.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cuda/cuda_backend.h"

namespace wintserve {
namespace {

std::unique_ptr<kernels::Backend> Cuda() { return *kernels::cuda::CreateCudaBackend({}); }

// Few layers, so that rounding does not send a token to another expert on its way.
ModelConfig ShallowConfig(bool tied, bool quantised) {
  ModelConfig config = DeepConfig();
  config.num_layers = 4;
  config.moe_layer_start = 1;
  config.moe_layer_end = 3;
  config.last_wint4_layer = 1;
  config.num_shared_experts = 1;
  config.tie_word_embeddings = tied;
  if (!quantised) {
    config.dense_is_wint8 = false;
    config.expert_quantization = ExpertQuantization::kNone;
  }
  return config;
}

TEST(DummyModelOnCuda, IsTheModelOfTheCpu) {
  for (const bool tied : {false, true}) {
    for (const bool quantised : {false, true}) {
      SCOPED_TRACE(::testing::Message() << "tied " << tied << " quantised " << quantised);
      const ModelConfig config = ShallowConfig(tied, quantised);
      DummyModel on_cpu(config, kernels::cpu::CreateCpuBackend(
                                    {.rounding = kernels::WeightRounding::kUnrounded}));
      DummyModel on_cuda(config, Cuda());
      const auto expected = on_cpu.DecodeEach(3);
      const auto got = on_cuda.DecodeEach(3);
      std::vector<double> differences;
      for (size_t row = 0; row < expected.size(); ++row) {
        double largest = 0;
        for (size_t id = 0; id < expected[row].size(); ++id) {
          ASSERT_TRUE(std::isfinite(got[row][id]));
          largest = std::max(largest, std::fabs(double{got[row][id]} - expected[row][id]));
        }
        differences.push_back(largest);
      }
      std::sort(differences.begin(), differences.end());
      // Logits have a deviation of 2, and a matrix of other weights would change them by as much.
      // Now and then two experts are so near that rounding swaps them.
      EXPECT_LT(differences[differences.size() / 2], 0.05);
      std::printf("NOTE largest difference of a row: median %.4f, all %.4f\n",
                  differences[differences.size() / 2], differences.back());
    }
  }
}

TEST(DummyModelOnCuda, StaysFiniteAndSpreadThroughManyLayers) {
  DummyModel model(DeepConfig(), Cuda());
  for (const auto& row : model.DecodeEach(3)) {
    for (const float logit : row) ASSERT_TRUE(std::isfinite(logit));
  }
  EXPECT_THAT(model.DistinctExperts(), ::testing::Each(::testing::Ge(15)));
}

TEST(DummyModelOnCuda, ShapesThatNoKernelHasAreRefusedBeforeAnythingIsLoaded) {
  const auto backend = Cuda();
  const auto load = [&](const ModelConfig& config) {
    const auto source = MakeDummySource(config, {}, backend.get(), 0, 1);
    return std::string(
        LoadErnie45(config, source.get(), backend.get(), nullptr, {}).status().message());
  };
  ModelConfig config = DeepConfig();
  config.hidden_size = 65536;
  EXPECT_EQ(load(config), "hidden_size 65536 is not supported on cuda; at most 32768");
  config = DeepConfig();
  config.num_experts = 160;
  EXPECT_EQ(load(config), "160 experts are not supported on cuda; at most 128");
}

}  // namespace
}  // namespace wintserve
