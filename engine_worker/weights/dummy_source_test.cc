#include "engine_worker/weights/dummy_source.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <set>
#include <string>
#include <vector>

#include "engine_worker/weights/checkpoint_writer.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/plan/dummy_weights.h"

namespace wintserve {
namespace {

using formats::DummyMatrix;
using formats::WeightFormat;

constexpr char kShape300B[] = "models/shapes/ernie-4.5-300b-a47b-wint2";
constexpr char kShape21B[] = "models/shapes/ernie-4.5-21b-a3b-wint2";
constexpr char kShape03B[] = "models/shapes/ernie-4.5-0.3b";

ModelConfig ConfigOf(const std::string& dir) {
  auto config = LoadModelConfig(dir);
  EXPECT_TRUE(config.ok()) << config.status();
  return *config;
}

// Every format, and fewer KV heads than the most ranks.
ModelConfig SmallConfig() { return testing::SmallWint2Config(); }

TEST(DummySource, PublishedShapesHaveThePublishedFormats) {
  const ModelConfig config = ConfigOf(kShape300B);
  const auto describe = [&](const MatrixRef& ref) {
    return DescribeDummyMatrix(config, ref, 0, 1);
  };
  const auto expect = [&](const MatrixRef& ref, WeightFormat format, int64_t k, int64_t n) {
    const DummyMatrix matrix = describe(ref);
    EXPECT_EQ(matrix.format, format);
    EXPECT_EQ(matrix.k, k);
    EXPECT_EQ(matrix.n, n);
  };
  expect({MatrixRole::kEmbedding}, WeightFormat::kBfloat16, 103424, 8192);
  expect({MatrixRole::kHead}, WeightFormat::kBfloat16, 8192, 103424);
  expect({MatrixRole::kQkv, 0}, WeightFormat::kWint8, 8192, 10240);
  expect({MatrixRole::kOutput, 53}, WeightFormat::kWint8, 8192, 8192);
  expect({MatrixRole::kGateUp, 2}, WeightFormat::kWint8, 8192, 57344);
  expect({MatrixRole::kDown, 2}, WeightFormat::kWint8, 28672, 8192);
  expect({MatrixRole::kRouter, 3}, WeightFormat::kFloat32, 8192, 64);
  expect({MatrixRole::kGateUp, 3, 0}, WeightFormat::kWint4, 8192, 7168);
  expect({MatrixRole::kDown, 6, 63}, WeightFormat::kWint4, 3584, 8192);
  expect({MatrixRole::kGateUp, 7, 0}, WeightFormat::kWint2, 8192, 7168);
  expect({MatrixRole::kDown, 53, 63}, WeightFormat::kWint2, 3584, 8192);
  // spec: 93.8 GB; the CUDA layouts add their column infos.
  EXPECT_NEAR(static_cast<double>(CudaWeightBytes(config, 0, 1)), 94.3e9, 0.5e9);
  EXPECT_NEAR(static_cast<double>(CudaWeightBytes(config, 1, 2)), 48.1e9, 0.5e9);
}

TEST(DummySource, OtherPublishedShapes) {
  const ModelConfig moe = ConfigOf(kShape21B);
  EXPECT_EQ(DescribeDummyMatrix(moe, {MatrixRole::kGateUp, 1, kSharedExperts}, 0, 1).n, 2 * 3072);
  EXPECT_TRUE(DescribeDummyMatrix(moe, {MatrixRole::kHead}, 0, 1).transposed);
  // 7.1 GB as spec, and the tied head once more in its own layout.
  EXPECT_NEAR(static_cast<double>(CudaWeightBytes(moe, 0, 1)), 7.6e9, 0.3e9);
  const ModelConfig dense = ConfigOf(kShape03B);
  EXPECT_EQ(DescribeDummyMatrix(dense, {MatrixRole::kDown, 17}, 0, 1).format,
            WeightFormat::kBfloat16);
  EXPECT_EQ(DescribeDummyMatrix(dense, {MatrixRole::kQkv, 0}, 0, 1).n, (16 + 2 * 2) * 128);
}

// Rank r's slice holds what the whole matrix has at the rank's places: for every matrix of a model.
TEST(DummySource, RanksHaveSlicesOfTheSameMatrices) {
  const ModelConfig config = SmallConfig();
  for (const int world_size : {2, 4}) {
    for (const MatrixRef& ref : AllMatrices(config)) {
      const DummyMatrix whole = DescribeDummyMatrix(config, ref, 0, 1);
      const std::vector<float> weights =
          formats::DecodeToFloat(kernels::plan::MakeDummyHostMatrix(whole));
      for (int rank = 0; rank < world_size; ++rank) {
        SCOPED_TRACE(::testing::Message() << "role " << static_cast<int>(ref.role) << " layer "
                                          << ref.layer << " rank " << rank << " of " << world_size);
        const DummyMatrix slice = DescribeDummyMatrix(config, ref, rank, world_size);
        std::vector<int64_t> columns;
        for (int i = 0; i < slice.num_ranges; ++i) {
          for (int64_t c = 0; c < slice.ranges[i].count; ++c) {
            columns.push_back(slice.ranges[i].first + c);
          }
        }
        ASSERT_EQ(static_cast<int64_t>(columns.size()), slice.n);
        const std::vector<float> part =
            formats::DecodeToFloat(kernels::plan::MakeDummyHostMatrix(slice));
        for (int64_t row = 0; row < slice.k; ++row) {
          for (int64_t c = 0; c < slice.n; ++c) {
            ASSERT_EQ(part[row * slice.n + c],
                      weights[(slice.first_row + row) * whole.n + columns[c]]);
          }
        }
      }
    }
  }
}

TEST(DummySource, ATiedHeadIsTheEmbedding) {
  ModelConfig config = SmallConfig();
  config.tie_word_embeddings = true;
  const auto table = kernels::plan::MakeDummyHostMatrix(
      DescribeDummyMatrix(config, {MatrixRole::kEmbedding}, 0, 1));
  const auto head =
      kernels::plan::MakeDummyHostMatrix(DescribeDummyMatrix(config, {MatrixRole::kHead}, 1, 2));
  ASSERT_EQ(head.n, 48);
  for (int64_t id = 0; id < head.n; ++id) {
    for (int64_t i = 0; i < config.hidden_size; ++i) {
      ASSERT_EQ(head.values_bf16[i * head.n + id],
                table.values_bf16[(48 + id) * config.hidden_size + i]);
    }
  }
}

TEST(DummySource, NoTwoMatricesAreAlike) {
  const ModelConfig config = SmallConfig();
  std::set<uint64_t> seeds;
  for (const MatrixRef& ref : AllMatrices(config)) {
    EXPECT_TRUE(seeds.insert(DescribeDummyMatrix(config, ref, 0, 1).seed).second);
  }
}

TEST(DummySource, BiasesComeWithASkewAndAreZeroWithout) {
  ModelConfig config = SmallConfig();
  const auto backend = kernels::cpu::CreateCpuBackend({});
  const auto biases = [&](double skew) {
    return *MakeDummySource(config, {.router_skew = skew}, backend.get(), 0, 1)
                ->LoadVector(VectorRole::kRouterBias, 1);
  };
  EXPECT_THAT(biases(0), ::testing::Each(0.0f));
  const std::vector<float> skewed = biases(2);
  ASSERT_EQ(std::ssize(skewed), config.num_experts);
  for (const float bias : skewed) EXPECT_LE(std::fabs(bias), 2.0f / config.num_experts);
  EXPECT_NE(skewed[0], skewed[1]);
  config.has_router_bias = false;
  EXPECT_FALSE(MakeDummySource(config, {}, backend.get(), 0, 1)->has_router_bias());
  EXPECT_TRUE(MakeDummySource(config, {.router_skew = 1}, backend.get(), 0, 1)->has_router_bias());
}

}  // namespace
}  // namespace wintserve
