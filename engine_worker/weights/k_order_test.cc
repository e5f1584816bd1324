#include "engine_worker/weights/k_order.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "engine_worker/config/model_config.h"
#include "engine_worker/weights/checkpoint.h"
#include "kernels/formats/wint2.h"

namespace wintserve {
namespace {

using formats::HostMatrix;
using formats::KOrder;

constexpr int64_t kHidden = 128;
constexpr int64_t kWidth = 256;

HostMatrix RandomWint2(int64_t k, int64_t n, std::mt19937& rng) {
  HostMatrix matrix = formats::MakeHostMatrix(formats::WeightFormat::kWint2, k, n);
  for (uint8_t& code : matrix.codes_u8) code = static_cast<uint8_t>(rng());
  for (uint8_t& scale : matrix.local_scale) scale = 8;
  for (int64_t i = 0; i < n; ++i) {
    matrix.channel_scale[i] = 1e-3f;
    matrix.code_scale[i] = 120.961f;
    matrix.code_zp[i] = 1240;
  }
  return matrix;
}

// An expert whose neurons differ in gain, its down rows stored in `order`. The gain of a stored row
// of down is made by choosing, for every byte, among its candidates by the four gains it must
// serve.
void AddExpert(KOrder order, std::mt19937& rng, KOrderVote& vote) {
  std::normal_distribution<double> normal;
  std::vector<double> gain(kWidth);
  for (double& g : gain) g = std::exp(0.5 * normal(rng));
  HostMatrix gate_up = RandomWint2(kHidden, 2 * kWidth, rng);
  for (int64_t i = 0; i < 2 * kWidth; ++i) {
    gate_up.channel_scale[i] = static_cast<float>(1e-3 * gain[i % kWidth]);
  }
  HostMatrix down = RandomWint2(kWidth, kHidden, rng);
  for (int64_t byte_row = 0; byte_row < kWidth / 4; ++byte_row) {
    for (int64_t column = 0; column < kHidden; ++column) {
      double target[4];
      for (int slot = 0; slot < 4; ++slot) {
        const int64_t stored = byte_row * 4 + slot;
        const int64_t row =
            stored / 64 * 64 + formats::Wint2TrueRow(static_cast<int>(stored % 64), order);
        target[slot] = 8 * gain[row] * normal(rng);
      }
      double best = INFINITY;
      for (int byte = 0; byte < 256; ++byte) {
        const int32_t code = formats::Wint2Code(static_cast<uint8_t>(byte), 120.961f, 1240);
        double error = 0;
        for (int slot = 0; slot < 4; ++slot) {
          error += std::pow(formats::Wint2Value(code, slot) - target[slot], 2);
        }
        if (error >= best) continue;
        best = error;
        down.codes_u8[byte_row * kHidden + column] = static_cast<uint8_t>(byte);
      }
    }
  }
  vote.AddExpert(gate_up, down);
}

class KOrderOfExperts : public ::testing::TestWithParam<KOrder> {};

TEST_P(KOrderOfExperts, IsFoundFromTheNormsOfTheirNeurons) {
  std::mt19937 rng(11);
  KOrderVote vote;
  for (int expert = 0; expert < 4; ++expert) AddExpert(GetParam(), rng, vote);
  const bool is_natural = GetParam() == KOrder::kNatural;
  EXPECT_EQ(vote.Decide(), GetParam());
  EXPECT_GT(is_natural ? vote.natural_correlation() : vote.mma64_correlation(), 0.5);
  // The wrong order's correlation is chance: 4 sigma of 4 * 256 neurons.
  EXPECT_LT(std::fabs(is_natural ? vote.mma64_correlation() : vote.natural_correlation()),
            4 / std::sqrt(4.0 * kWidth));
}

INSTANTIATE_TEST_SUITE_P(Both, KOrderOfExperts, ::testing::Values(KOrder::kMma64, KOrder::kNatural),
                         [](const auto& info) {
                           return info.param == KOrder::kMma64 ? "Mma64" : "Natural";
                         });

TEST(KOrderVote, EvidenceThatChanceExplainsLeavesTheDefault) {
  KOrderVote vote;
  EXPECT_EQ(vote.Decide(), KOrder::kMma64);
  std::mt19937 rng(3);
  for (int expert = 0; expert < 4; ++expert) {
    vote.AddExpert(RandomWint2(kHidden, 2 * kWidth, rng), RandomWint2(kWidth, kHidden, rng));
  }
  EXPECT_EQ(vote.Decide(), KOrder::kMma64);
}

TEST(KOrderVote, AllZeroExpertsCountAsNoEvidence) {
  std::mt19937 rng(5);
  HostMatrix gate_up = RandomWint2(kHidden, 2 * kWidth, rng);
  HostMatrix down = RandomWint2(kWidth, kHidden, rng);
  gate_up.local_scale.assign(gate_up.local_scale.size(), 0);
  down.local_scale.assign(down.local_scale.size(), 0);
  KOrderVote vote;
  vote.AddExpert(gate_up, down);
  EXPECT_EQ(vote.natural_correlation(), 0);
  EXPECT_EQ(vote.mma64_correlation(), 0);
  EXPECT_EQ(vote.Decide(), KOrder::kMma64);
}

TEST(KOrderVote, TheDemoModelCorrelatesInMma64OrderAndNotInNaturalOrder) {
  const auto config = LoadModelConfig("models/poet");
  ASSERT_TRUE(config.ok()) << config.status();
  const auto checkpoint = Checkpoint::Open("models/poet", *config, KOrderChoice::kNatural);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  KOrderVote vote;
  for (int expert = 0; expert < config->num_experts; ++expert) {
    const auto gate_up = (*checkpoint)->LoadMatrix({MatrixRole::kGateUp, 4, expert}, 0, 1);
    const auto down = (*checkpoint)->LoadMatrix({MatrixRole::kDown, 4, expert}, 0, 1);
    vote.AddExpert(*gate_up, *down);
  }
  const double chance = 4 / std::sqrt(16.0 * 256);
  EXPECT_GT(vote.mma64_correlation(), 2 * chance);
  EXPECT_LT(std::fabs(vote.natural_correlation()), chance);
  EXPECT_EQ(vote.Decide(), KOrder::kMma64);
}

}  // namespace
}  // namespace wintserve
