// A layer gives the same outputs whether one rank has its weights or several have slices of them.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "common/check.h"
#include "engine_worker/weights/checkpoint.h"
#include "engine_worker/weights/checkpoint_writer.h"
#include "engine_worker/weights/weight_source.h"
#include "kernels/cpu/cpu_backend.h"

namespace wintserve {
namespace {

using kernels::Backend;
using kernels::WeightMatrix;

constexpr int64_t kTokens = 3;

// ERNIE-4.5-21B-A3B, a dense layer and one of its MoE layers with shared experts, all of it
// smaller: at four ranks an expert's width of three 64-groups each, so that the second and the
// fourth rank begin in the middle of a byte of local scales.
ModelConfig Shape21b() {
  ModelConfig config = testing::SmallWint2Config();
  config.vocab_size = 256;
  config.hidden_size = 384;
  config.num_layers = 2;
  config.num_heads = 20;
  config.num_kv_heads = 4;
  config.head_dim = 64;
  config.intermediate_size = 1536;
  config.tie_word_embeddings = true;
  config.num_experts = 4;
  config.num_experts_per_token = 2;
  config.moe_intermediate_size = 768;
  config.num_shared_experts = 2;
  config.moe_layer_start = 1;
  config.moe_layer_end = 1;
  config.last_wint4_layer = 0;
  return config;
}

// ERNIE-4.5-300B-A47B: a dense layer, one of WINT4 and one of WINT2, no shared experts, a head of
// its own; seven 64-groups a rank of four, as 3584 has 14.
ModelConfig Shape300b() {
  ModelConfig config = testing::SmallWint2Config();
  config.vocab_size = 256;
  config.hidden_size = 512;
  config.num_layers = 3;
  config.num_heads = 16;
  config.num_kv_heads = 2;  // fewer than ranks
  config.head_dim = 64;
  config.intermediate_size = 1792;
  config.num_experts = 3;
  config.num_experts_per_token = 2;
  config.moe_intermediate_size = 1792;
  config.num_shared_experts = 0;
  config.last_wint4_layer = 1;
  return config;
}

std::vector<float> RandomRows(int64_t columns, uint32_t seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  std::vector<float> rows(kTokens * columns);
  for (float& value : rows) value = normal(rng);
  return rows;
}

// All weights of one rank, by their order.
class RankWeights {
 public:
  RankWeights(const ModelConfig& config, const Checkpoint& checkpoint, Backend* backend, int rank,
              int world_size) {
    const auto source = MakeCheckpointSource(config, checkpoint, backend, rank, world_size, 2);
    for (const MatrixRef& ref : AllMatrices(config)) {
      auto matrix = source->NextMatrix(ref);
      CHECK(matrix.ok(), "{}", matrix.status().ToString());
      matrices_.push_back(*std::move(matrix));
    }
  }
  const WeightMatrix& operator[](size_t i) const { return *matrices_[i]; }

 private:
  std::vector<std::unique_ptr<WeightMatrix>> matrices_;
};

// [kTokens, n] of x [kTokens, stride] from its column first_column on.
std::vector<float> Product(Backend* backend, const WeightMatrix& w, const std::vector<float>& x,
                           int64_t stride, int64_t first_column) {
  std::vector<float> y(kTokens * w.n());
  backend->Linear({x.data() + first_column, stride}, kTokens, w, {y.data(), w.n()});
  return y;
}

class RankOutputs : public ::testing::TestWithParam<ModelConfig (*)()> {
 protected:
  void SetUp() override {
    const testing::TempDir dir;
    testing::WriteFile(
        dir.path() / "model.safetensors",
        testing::SafetensorsBytes(testing::MakeTensors(config_, testing::TestLayout::kPaddle, 5)));
    auto checkpoint = Checkpoint::Open(dir.path(), config_, KOrderChoice::kMma64);
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
    checkpoint_ = *std::move(checkpoint);
    whole_ = std::make_unique<RankWeights>(config_, *checkpoint_, backend_.get(), 0, 1);
  }

  // What a sum of k products may be off when it is added up in another order: both orders are off
  // the exact sum by at most gamma_k times the sum of magnitudes (Higham, "Accuracy and Stability
  // of Numerical Algorithms", 3.1), gamma_k = k u / (1 - k u), and adding up the ranks' parts is
  // part of an order.
  std::vector<double> Bounds(const MatrixRef& ref, const std::vector<float>& x) {
    const auto matrix = checkpoint_->LoadMatrix(ref, 0, 1);
    CHECK(matrix.ok(), "{}", matrix.status().ToString());
    const std::vector<float> weights = formats::DecodeToFloat(*matrix);
    const int64_t k = matrix->k, n = matrix->n;
    const double unit = 0x1p-24;
    const double gamma = static_cast<double>(k) * unit / (1 - static_cast<double>(k) * unit);
    std::vector<double> bounds(kTokens * n);
    for (int64_t token = 0; token < kTokens; ++token) {
      for (int64_t row = 0; row < k; ++row) {
        for (int64_t column = 0; column < n; ++column) {
          bounds[token * n + column] +=
              2 * gamma * std::fabs(double{x[token * k + row]} * weights[row * n + column]);
        }
      }
    }
    return bounds;
  }

  const ModelConfig config_ = GetParam()();
  const std::unique_ptr<Backend> backend_ = kernels::cpu::CreateCpuBackend({.num_threads = 2});
  std::unique_ptr<Checkpoint> checkpoint_;
  std::unique_ptr<RankWeights> whole_;
};

bool SplitsRows(MatrixRole role) {
  return role == MatrixRole::kOutput || role == MatrixRole::kDown;
}

TEST_P(RankOutputs, OfRowSplitsAddUpToTheWhole) {
  const std::vector<MatrixRef> refs = AllMatrices(config_);
  for (const int world_size : {2, 4}) {
    std::vector<RankWeights> ranks;
    for (int rank = 0; rank < world_size; ++rank) {
      ranks.emplace_back(config_, *checkpoint_, backend_.get(), rank, world_size);
    }
    for (size_t i = 0; i < refs.size(); ++i) {
      if (!SplitsRows(refs[i].role)) continue;
      const int64_t k = (*whole_)[i].k(), n = (*whole_)[i].n();
      const std::vector<float> x = RandomRows(k, static_cast<uint32_t>(i));
      const std::vector<float> expected = Product(backend_.get(), (*whole_)[i], x, k, 0);
      std::vector<float> sum(kTokens * n, 0.0f);
      for (int rank = 0; rank < world_size; ++rank) {
        const WeightMatrix& part = ranks[rank][i];
        ASSERT_EQ(part.k(), k / world_size);
        const auto partial = Product(backend_.get(), part, x, k, rank * part.k());
        for (size_t j = 0; j < sum.size(); ++j) sum[j] += partial[j];
      }
      const std::vector<double> bounds = Bounds(refs[i], x);
      for (size_t j = 0; j < sum.size(); ++j) {
        ASSERT_NEAR(sum[j], expected[j], bounds[j]) << "matrix " << i << " of " << world_size;
      }
    }
  }
}

TEST_P(RankOutputs, OfColumnSplitsAreTheWholesToTheBit) {
  const std::vector<MatrixRef> refs = AllMatrices(config_);
  for (const int world_size : {2, 4}) {
    for (int rank = 0; rank < world_size; ++rank) {
      const RankWeights part(config_, *checkpoint_, backend_.get(), rank, world_size);
      for (size_t i = 0; i < refs.size(); ++i) {
        const MatrixRole role = refs[i].role;
        if (role != MatrixRole::kHead && role != MatrixRole::kQkv) continue;
        const int64_t k = (*whole_)[i].k(), n = (*whole_)[i].n(), local = part[i].n();
        const std::vector<float> x = RandomRows(k, static_cast<uint32_t>(i));
        const auto expected = Product(backend_.get(), (*whole_)[i], x, k, 0);
        const auto got = Product(backend_.get(), part[i], x, k, 0);
        // The queries of a rank, or its share of the vocabulary, come first.
        const int64_t count = role == MatrixRole::kHead
                                  ? local
                                  : int64_t{config_.num_heads / world_size} * config_.head_dim;
        for (int64_t token = 0; token < kTokens; ++token) {
          for (int64_t column = 0; column < count; ++column) {
            ASSERT_EQ(got[token * local + column], expected[token * n + rank * count + column])
                << "matrix " << i << " rank " << rank << " of " << world_size;
          }
        }
      }
    }
  }
}

TEST_P(RankOutputs, OfAnMlpAddUpToTheWhole) {
  const std::vector<MatrixRef> refs = AllMatrices(config_);
  const std::vector<float> x = RandomRows(config_.hidden_size, 99);
  const auto run = [&](const RankWeights& weights, size_t i) {
    std::vector<float> y(kTokens * config_.hidden_size);
    backend_->SwiGluMlp({x.data(), config_.hidden_size}, kTokens, {&weights[i], &weights[i + 1]},
                        {y.data(), config_.hidden_size});
    return y;
  };
  for (const int world_size : {2, 4}) {
    std::vector<RankWeights> ranks;
    for (int rank = 0; rank < world_size; ++rank) {
      ranks.emplace_back(config_, *checkpoint_, backend_.get(), rank, world_size);
    }
    for (size_t i = 0; i < refs.size(); ++i) {
      if (refs[i].role != MatrixRole::kGateUp) continue;
      // A rank's gate and up columns come to the bit of the whole's, so that only down's sums are
      // in another order.
      const int64_t width = (*whole_)[i].n() / 2;
      const auto gate_up = Product(backend_.get(), (*whole_)[i], x, config_.hidden_size, 0);
      std::vector<float> activated(kTokens * width);
      for (int64_t token = 0; token < kTokens; ++token) {
        for (int64_t column = 0; column < width; ++column) {
          const double gate = gate_up[token * 2 * width + column];
          const double up = gate_up[token * 2 * width + width + column];
          activated[token * width + column] = static_cast<float>(gate / (1 + std::exp(-gate)) * up);
        }
      }
      const std::vector<float> expected = run(*whole_, i);
      std::vector<float> sum(expected.size(), 0.0f);
      for (const RankWeights& rank : ranks) {
        const std::vector<float> partial = run(rank, i);
        for (size_t j = 0; j < sum.size(); ++j) sum[j] += partial[j];
      }
      const std::vector<double> bounds = Bounds(refs[i + 1], activated);
      for (size_t j = 0; j < sum.size(); ++j) {
        ASSERT_NEAR(sum[j], expected[j], bounds[j]) << "matrix " << i << " of " << world_size;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, RankOutputs, ::testing::Values(&Shape21b, &Shape300b),
                         [](const auto& info) {
                           return info.param == &Shape21b ? "Of21b" : "Of300b";
                         });

}  // namespace
}  // namespace wintserve
